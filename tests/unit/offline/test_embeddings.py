"""Embeddings, driven by the official client over real HTTP."""

from __future__ import annotations

import json
import math
from typing import Any

import aiohttp
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import AsyncOpenAI

from agentq.offline import embeddings
from agentq.offline.embeddings import vector
from agentq.offline.server import Running
from tests.unit.offline.test_batches import journal, scenario


def likeness(one: list[float], other: list[float]) -> float:
    """The cosine of the angle between vectors of length 1."""
    return math.fsum(a * b for a, b in zip(one, other, strict=True))


async def embed(client: AsyncOpenAI, *texts: str, **more: Any) -> list[list[float]]:
    answer = await client.embeddings.create(model="any", input=list(texts), **more)
    assert [item.index for item in answer.data] == list(range(len(texts)))
    return [item.embedding for item in answer.data]


class TestVectors:
    @pytest.mark.parametrize(
        ("text", "alike", "unlike"),
        [
            ("How do I renew my loan?", "Renewing loans: a loan can be renewed twice.", "The library closes at 20."),
            ("a damaged lamp", "The lamp arrived, but it was damaged.", "Shipping to Norway takes five days."),
            ("wireless headphones", "wirless headphone", "garden furniture"),
            ("Где мой заказ?", "Мой заказ не пришёл", "погода сегодня хорошая"),
        ],
    )
    async def test_texts_that_are_alike_are_closer(
        self, client: AsyncOpenAI, text: str, alike: str, unlike: str
    ) -> None:
        for size in (256, 1536):
            one, near, far = await embed(client, text, alike, unlike, dimensions=size)
            assert likeness(one, near) > likeness(one, far) + 0.2

    async def test_they_are_of_length_one_and_as_many_dimensions_as_asked_for(self, client: AsyncOpenAI) -> None:
        for size, found in ((256, await embed(client, "a text")), (64, await embed(client, "a text", dimensions=64))):
            assert [len(each) for each in found] == [size]
            assert likeness(found[0], found[0]) == pytest.approx(1)

    async def test_both_formats_hold_the_same_numbers(self, client: AsyncOpenAI) -> None:
        as_base64 = await embed(client, "a text", "another")  # what the client asks for and unpacks by default
        assert await embed(client, "a text", "another", encoding_format="float") == as_base64
        answer = await client.embeddings.create(model="m", input="a text", encoding_format="base64")
        assert isinstance(answer.data[0].embedding, str)

    async def test_a_text_is_a_list_of_one_and_always_the_same(self, client: AsyncOpenAI) -> None:
        answer = await client.embeddings.create(model="any", input="renew my loan")
        assert [item.embedding for item in answer.data] == await embed(client, "renew my loan")
        assert [place for place, value in enumerate(vector("renew")) if value] == [8, 51, 110, 126, 143, 225]

    @given(st.text(min_size=1, max_size=80), st.integers(1, 300))
    def test_any_text_has_a_vector(self, text: str, size: int) -> None:
        found = vector(text, size)
        assert len(found) == size
        assert likeness(found, found) == pytest.approx(1)


class TestServer:
    async def test_usage_and_model(self, client: AsyncOpenAI) -> None:
        answer = await client.embeddings.create(model="any-name", input=["12345678", "1234"])
        assert (answer.model, answer.object) == ("any-name", "list")
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == 3

    async def test_it_says_that_it_is_no_language_model(self, http: aiohttp.ClientSession, server: Running) -> None:
        async with http.post(f"{server.url}/v1/embeddings", json={"model": "m", "input": "x"}) as response:
            assert "not a language model" in response.headers["X-Agentq-Offline"]

    async def test_one_call_in_the_journal_with_the_number_of_texts(
        self, client: AsyncOpenAI, http: aiohttp.ClientSession, server: Running
    ) -> None:
        texts = [f"text {n}" for n in range(2048)]
        assert len(await embed(client, *texts, dimensions=8, extra_headers={"Idempotency-Key": "k"})) == 2048
        (call,) = await journal(http, server)
        assert (call["purpose"], call["inputs"], call["key"], call["status"], call["batch"]) == (
            "embed", 2048, "k", 200, "",
        )  # fmt: skip
        assert "text 1" not in json.dumps(call)

    async def test_faults_are_those_of_any_call(
        self, client: AsyncOpenAI, http: aiohttp.ClientSession, server: Running
    ) -> None:
        actions: list[dict[str, Any]] = [
            {"status": 429, "retry_after": 1},
            {"cut": True},
            {"malformed": True},
            {"time_out": True, "hold_s": 0.01},
        ]
        match = {"purpose": "embed", "contains": "LOAN"}
        await scenario(http, server, rules=[{"match": match, "action": action, "times": 1} for action in actions])
        await embed(client, "something else")
        errors: list[type[Exception]] = [
            openai.RateLimitError, openai.APIConnectionError, json.JSONDecodeError, openai.APIConnectionError,
        ]  # fmt: skip
        for error in errors:
            with pytest.raises(error):
                await embed(client, "x", "renew my loan")
        await embed(client, "renew my loan")
        assert [call["status"] for call in await journal(http, server)] == [200, 429, 200, 200, 0, 200]

    async def test_usage_can_be_missing(
        self, client: AsyncOpenAI, http: aiohttp.ClientSession, server: Running
    ) -> None:
        await scenario(http, server, rules=[{"action": {"no_usage": True}}])
        async with http.post(f"{server.url}/v1/embeddings", json={"model": "m", "input": "x"}) as response:
            assert sorted(await response.json()) == ["data", "model", "object"]

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"input": "x"}, "model"),
            ({"model": "m"}, "input"),
            ({"model": "m", "input": ""}, "input"),
            ({"model": "m", "input": []}, "input"),
            ({"model": "m", "input": ["x", ""]}, "input"),
            ({"model": "m", "input": [1, 2]}, "input"),
            ({"model": "m", "input": ["x"] * 2049}, "input"),
            ({"model": "m", "input": "x" * 4 * 8193}, "input"),
            ({"model": "m", "input": "x", "dimensions": 0}, "dimensions"),
            ({"model": "m", "input": "x", "dimensions": 4097}, "dimensions"),
            ({"model": "m", "input": "x", "dimensions": "9"}, "dimensions"),
            ({"model": "m", "input": "x", "encoding_format": "int8"}, "encoding_format"),
        ],
    )
    async def test_what_cannot_be_embedded_is_refused(
        self, http: aiohttp.ClientSession, server: Running, body: dict[str, Any], param: str
    ) -> None:
        async with http.post(f"{server.url}/v1/embeddings", json=body) as response:
            assert response.status == 400
            assert (await response.json())["error"]["param"] == param
        assert await journal(http, server) == []


def test_the_longest_text_is_allowed() -> None:
    assert embeddings.read({"model": "m", "input": "x" * 4 * 8192}).dimensions == 256
