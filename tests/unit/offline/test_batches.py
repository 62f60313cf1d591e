"""Files and batches, driven by the official client over real HTTP."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from io import BytesIO
from typing import Any

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI
from openai.types import Batch
from openai.types.chat import ChatCompletion

from agentq.offline import batch_lines, files, wire
from agentq.offline.batches import Batch as OurBatch
from agentq.offline.batches import Order
from agentq.offline.server import Running, offline_server
from tests.unit.offline.test_server import ROUTE, TURN

ENDED = ("completed", "failed", "expired", "cancelled")
URL = "/v1/chat/completions"
Lines = list[dict[str, Any]]


def asking(custom_id: str, body: Any = ROUTE, **other: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": URL, "body": body, **other}


def many(count: int) -> Lines:
    return [asking(f"c-{n}") for n in range(count)]


async def upload(client: AsyncOpenAI, content: Lines | bytes) -> str:
    if isinstance(content, list):
        content = b"".join(json.dumps(line).encode() + b"\n" for line in content)
    return (await client.files.create(file=("input.jsonl", content), purpose="batch")).id


async def create(client: AsyncOpenAI, content: Lines | bytes, **metadata: str) -> Batch:
    file_id = await upload(client, content)
    return await client.batches.create(
        input_file_id=file_id, endpoint=URL, completion_window="24h", metadata=metadata or None
    )


async def until(client: AsyncOpenAI, batch: Batch, *statuses: str, answered: int = 0) -> Batch:
    """The batch, when it has one of the statuses and so many lines answered."""
    async with asyncio.timeout(30):
        while True:
            batch = await client.batches.retrieve(batch.id)
            assert batch.request_counts is not None
            done = batch.request_counts.completed + batch.request_counts.failed
            if batch.status in statuses and done >= answered:
                return batch
            assert batch.status not in ENDED, batch


async def run(client: AsyncOpenAI, content: Lines | bytes) -> Batch:
    return await until(client, await create(client, content), *ENDED)


async def read(client: AsyncOpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    """The lines of a file by their custom_id."""
    if file_id is None:
        return {}
    text = (await client.files.content(file_id)).text
    lines = [json.loads(line) for line in text.splitlines()]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines)
    assert len({line["id"] for line in lines}) == len(lines)
    return found


async def scenario(http: aiohttp.ClientSession, server: Running, **content: Any) -> None:
    async with http.post(f"{server.url}/_scenario", json=content) as response:
        assert response.status == 200, await response.text()


async def journal(http: aiohttp.ClientSession, server: Running) -> list[dict[str, Any]]:
    async with http.get(f"{server.url}/_calls") as response:
        calls: list[dict[str, Any]] = (await response.json())["calls"]
        return calls


def counts(batch: Batch) -> tuple[int, int, int]:
    assert batch.request_counts is not None
    return batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed


class TestFiles:
    async def test_a_file_comes_back_as_it_was_sent(self, client: AsyncOpenAI) -> None:
        made = await client.files.create(file=("input.jsonl", b'{"a": 1}\n'), purpose="batch")
        shown = await client.files.retrieve(made.id)
        assert shown == made
        assert (shown.filename, shown.bytes, shown.purpose, shown.status) == ("input.jsonl", 9, "batch", "processed")
        assert (await client.files.content(made.id)).content == b'{"a": 1}\n'

    async def test_a_deleted_file_is_gone(self, client: AsyncOpenAI) -> None:
        file_id = await upload(client, many(1))
        assert (await client.files.delete(file_id)).deleted
        for gone in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError, match="No such File object"):
                await gone(file_id)

    async def test_a_large_file_survives_in_slices(self, client: AsyncOpenAI) -> None:
        content = b"0123456789abcde\n" * 100_000
        file_id = await upload(client, content)
        assert (await client.files.content(file_id)).content == content

    async def test_a_file_beyond_the_limit_is_refused(
        self, client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(files, "MAX_FILE_BYTES", 1000)
        await upload(client, b"x" * 1000)
        with pytest.raises(openai.APIStatusError) as refusal:
            await upload(client, b"x" * 1001)
        assert refusal.value.status_code == 413
        assert refusal.value.type == "invalid_request_error"

    async def test_all_files_together_have_a_limit(self, client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(files, "MAX_TOTAL_BYTES", 1000)
        kept = await upload(client, b"x" * 600)
        with pytest.raises(openai.APIStatusError, match="Delete some"):
            await upload(client, b"x" * 600)
        await client.files.delete(kept)
        await upload(client, b"x" * 600)

    async def test_a_name_or_purpose_that_is_not_for_batches_is_refused(self, client: AsyncOpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match=r"Must be \.jsonl"):
            await client.files.create(file=b"{}", purpose="batch")
        with pytest.raises(openai.BadRequestError, match="purpose must be 'batch'"):
            await client.files.create(file=("input.jsonl", b"{}"), purpose="fine-tune")

    @pytest.mark.parametrize(
        ("kind", "body"),
        [
            ("application/json", b"{}"),
            ("multipart/form-data", b"{}"),
            ("multipart/form-data; boundary=x", b"nothing"),
            ("multipart/form-data; boundary=x", b"--x\r\n\r\nno header"),
            ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\ncut'),
            (
                "multipart/form-data; boundary=x",
                b"--x\r\nContent-Type: multipart/mixed; boundary=y\r\n\r\n--y--\r\n--x--",
            ),
            (
                "multipart/form-data; boundary=x",
                b'--x\r\nContent-Disposition: form-data; name="p"\r\n\r\n1\r\n--x--\r\n',
            ),
        ],
    )
    async def test_a_body_that_is_no_such_form_is_refused(
        self, http: aiohttp.ClientSession, server: Running, kind: str, body: bytes
    ) -> None:
        async with http.post(f"{server.url}/v1/files", data=body, headers={"Content-Type": kind}) as response:
            assert response.status == 400, await response.text()
            assert (await response.json())["error"]["type"] == "invalid_request_error"


class TestLife:
    async def test_a_batch_is_answered_as_live_calls_are(self, client: AsyncOpenAI) -> None:
        created = await create(client, [asking("route"), asking("turn", {**TURN, "model": "fast"})], night="12")
        assert (created.status, created.metadata, counts(created)) == ("validating", {"night": "12"}, (0, 0, 0))
        batch = await until(client, created, *ENDED)
        assert (batch.status, counts(batch), batch.model) == ("completed", (2, 2, 0), "fast")
        assert (batch.error_file_id, batch.errors, batch.metadata) == (None, None, {"night": "12"})
        found = await read(client, batch.output_file_id)
        live = await client.chat.completions.create(**ROUTE)
        line = found["route"]
        assert (line["error"], line["response"]["status_code"]) == (None, 200)
        assert ChatCompletion.model_validate(line["response"]["body"]) == live
        assert found["turn"]["response"]["body"]["choices"][0]["finish_reason"] == "tool_calls"
        assert batch.usage is not None
        used = [line["response"]["body"]["usage"]["total_tokens"] for line in found.values()]
        assert batch.usage.total_tokens == sum(used)

    async def test_the_times_are_in_order(self, client: AsyncOpenAI) -> None:
        batch = await run(client, many(2))
        times = (batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at)
        assert None not in times
        assert list(times) == sorted(times)
        assert batch.expires_at == batch.created_at + 24 * 3600
        assert batch.failed_at is batch.cancelling_at is batch.cancelled_at is batch.expired_at is None

    async def test_lines_come_in_another_order_and_always_the_same(self, client: AsyncOpenAI) -> None:
        orders = []
        for _ in range(2):
            batch = await run(client, many(20))
            orders.append(list(await read(client, batch.output_file_id)))
        assert orders[0] == orders[1]
        assert orders[0] != [line["custom_id"] for line in many(20)]
        assert sorted(orders[0]) == sorted(line["custom_id"] for line in many(20))

    async def test_the_journal_tells_batches_from_live_calls(
        self, client: AsyncOpenAI, http: aiohttp.ClientSession, server: Running
    ) -> None:
        batch = await run(client, many(3))
        await client.chat.completions.create(**ROUTE, extra_headers={"Idempotency-Key": "live"})
        calls = await journal(http, server)
        assert [(call["batch"], call["key"]) for call in calls] == [
            *((batch.id, f"c-{n}") for n in range(3)),
            ("", "live"),
        ]
        assert {(call["api"], call["purpose"], call["model"], call["status"]) for call in calls} == {
            ("openai", "route", "fast", 200)
        }

    async def test_live_calls_are_answered_meanwhile(
        self, client: AsyncOpenAI, http: aiohttp.ClientSession, server: Running
    ) -> None:
        batch = await create(client, many(100))
        await until(client, batch, "in_progress", answered=1)
        await client.chat.completions.create(**ROUTE)
        assert (await client.batches.retrieve(batch.id)).status == "in_progress"
        await until(client, batch, "completed")
        calls = await journal(http, server)
        assert len(calls) == 101
        assert calls[-1]["batch"] == batch.id

    async def test_batches_go_side_by_side(self, client: AsyncOpenAI) -> None:
        first = await create(client, many(100))
        second = await create(client, many(3))
        await until(client, second, "completed")
        assert (await client.batches.retrieve(first.id)).status in ("validating", "in_progress")

    async def test_the_input_may_be_deleted_once_the_batch_is_created(self, client: AsyncOpenAI) -> None:
        batch = await create(client, many(2))
        await client.files.delete(batch.input_file_id)
        assert (await until(client, batch, *ENDED)).status == "completed"

    async def test_a_stopping_server_leaves_its_batches(self) -> None:
        async with (
            asyncio.timeout(10),
            offline_server() as server,
            AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        ):
            await create(client, many(1000))


class TestLines:
    async def test_what_fails_is_in_the_error_file_with_its_status(
        self, client: AsyncOpenAI, http: aiohttp.ClientSession, server: Running
    ) -> None:
        rules = [{"match": {"nth": 1}, "action": {"status": 429}}, {"match": {"nth": 2}, "action": {"status": 500}}]
        await scenario(http, server, rules=rules)
        deep = {"model": "fast", "messages": [{"role": "user", "content": "x"}], "response_format": {"json_schema": 3}}
        batch = await run(client, [*many(3), asking("bad", {"model": "fast"}), asking("no", {}), asking("deep", deep)])
        assert (batch.status, counts(batch)) == ("completed", (6, 1, 5))
        found = await read(client, batch.error_file_id)
        assert {name: line["response"]["status_code"] for name, line in found.items()} == {
            "c-0": 429, "c-1": 500, "bad": 400, "no": 400, "deep": 400,
        }  # fmt: skip
        assert found["c-0"]["response"]["body"]["error"]["code"] == "rate_limit_exceeded"
        assert {line["error"] for line in found.values()} == {None}
        assert list(await read(client, batch.output_file_id)) == ["c-2"]
        assert [call["status"] for call in await journal(http, server)] == [429, 500, 200]

    async def test_no_line_succeeded_means_no_output_file(
        self, client: AsyncOpenAI, http: aiohttp.ClientSession, server: Running
    ) -> None:
        await scenario(http, server, rules=[{"action": {"status": 500}}])
        batch = await run(client, many(2))
        assert (batch.status, batch.output_file_id, counts(batch)) == ("completed", None, (2, 0, 2))

    async def test_a_call_that_times_out_has_no_response(
        self, client: AsyncOpenAI, http: aiohttp.ClientSession, server: Running
    ) -> None:
        await scenario(http, server, rules=[{"action": {"time_out": True, "latency_ms": 60_000}, "times": 1}])
        batch = await run(client, many(2))
        (line,) = (await read(client, batch.error_file_id)).values()
        assert (line["response"], line["error"]["code"]) == (None, "request_timeout")
        assert [(call["status"], call["latency_ms"]) for call in await journal(http, server)] == [(0, 0), (200, 0)]

    @pytest.mark.parametrize("action", [{"cut": True}, {"malformed": True}])
    async def test_a_spoiled_answer_is_half_a_line_that_was_paid(
        self, client: AsyncOpenAI, http: aiohttp.ClientSession, server: Running, action: dict[str, Any]
    ) -> None:
        await scenario(http, server, rules=[{"action": action, "times": 1}])
        batch = await run(client, many(2))
        assert counts(batch) == (2, 2, 0)
        assert batch.output_file_id is not None
        lines = (await client.files.content(batch.output_file_id)).text.splitlines()
        whole = [line for line in lines if line.endswith("}")]
        assert (len(lines), len(whole)) == (2, 1)
        assert [call["status"] for call in await journal(http, server)] == [200, 200]

    async def test_other_faults_are_those_of_live_calls(
        self, client: AsyncOpenAI, http: aiohttp.ClientSession, server: Running
    ) -> None:
        rules = [{"match": {"nth": 1}, "action": {"unknown_tool": True}}, {"action": {"no_usage": True}}]
        await scenario(http, server, rules=rules)
        batch = await run(client, [asking("a", TURN), asking("b", TURN)])
        bodies = {name: line["response"]["body"] for name, line in (await read(client, batch.output_file_id)).items()}
        assert bodies["a"]["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "get_loan_v2"
        assert "usage" not in bodies["b"]

    async def test_a_line_the_server_fails_on_fails_no_other(
        self, client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(wire, "write_openai", lambda *_, **__: 1 / 0)
        batch = await run(client, many(2))
        assert (batch.status, counts(batch)) == ("completed", (2, 0, 2))
        found = await read(client, batch.error_file_id)
        assert {line["response"]["status_code"] for line in found.values()} == {500}


class TestBadInput:
    @pytest.mark.parametrize(
        ("content", "code", "line"),
        [
            (b"", "empty_file", None),
            (b"\n  \n", "empty_file", None),
            (b"nothing\n", "invalid_json_line", 1),
            (b"[1]\n", "invalid_json_line", 1),
            (b"\n\n" + b"[" * 100_000, "invalid_json_line", 3),
            (b'{"custom_id": "\xff"}', "invalid_json_line", 1),
            (b'{"custom_id": "\\ud800"}', "invalid_json_line", 1),
            (b'{"custom_id": NaN}', "invalid_json_line", 1),
            (b"{}", "missing_required_parameter", 1),
            ([*many(2), asking("c-0")], "duplicate_custom_id", 3),
            ([asking("")], "invalid_custom_id", 1),
            ([{**asking("a"), "custom_id": 7}], "invalid_custom_id", 1),
            ([asking("a", method="GET")], "invalid_method", 1),
            ([asking("a", url="/v1/embeddings")], "url_mismatch", 1),
            ([asking("a", "body")], "invalid_type", 1),
            ([asking("a"), asking("b", TURN)], "mismatched_model", 2),
        ],
    )
    async def test_a_file_that_is_no_input_fails_the_batch(
        self,
        client: AsyncOpenAI,
        http: aiohttp.ClientSession,
        server: Running,
        content: Lines | bytes,
        code: str,
        line: int | None,
    ) -> None:
        batch = await run(client, content)
        assert (batch.status, counts(batch)) == ("failed", (0, 0, 0))
        assert batch.failed_at is not None
        assert batch.in_progress_at is batch.output_file_id is batch.error_file_id is None
        assert batch.errors is not None
        assert batch.errors.data is not None
        (problem,) = batch.errors.data
        assert (problem.code, problem.line) == (code, line)
        assert problem.message
        assert await journal(http, server) == []

    async def test_every_bad_line_is_told_up_to_a_limit(self, client: AsyncOpenAI) -> None:
        batch = await run(client, b"no\n" * 150)
        assert batch.errors is not None
        assert batch.errors.data is not None
        assert [problem.line for problem in batch.errors.data] == list(range(1, 101))

    async def test_too_many_or_too_long_lines(self, client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(batch_lines, "MAX_LINES", 3)
        monkeypatch.setattr(batch_lines, "MAX_BODY", 2000)
        batch = await run(client, [*many(4), asking("x" * 2000)])
        assert batch.errors is not None
        assert batch.errors.data is not None
        found = [(problem.code, problem.line) for problem in batch.errors.data]
        assert found == [("too_many_tasks", 4), ("line_too_long", 5)]

    @pytest.mark.parametrize(
        ("change", "param"),
        [
            ({"input_file_id": None}, "input_file_id"),
            ({"input_file_id": 3}, "input_file_id"),
            ({"endpoint": "/v1/responses"}, "endpoint"),
            ({"completion_window": "1h"}, "completion_window"),
            ({"metadata": {"a": 1}}, "metadata"),
            ({"metadata": {"a": "x" * 513}}, "metadata"),
            ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ],
    )
    async def test_a_creation_that_is_wrong_is_refused(
        self, client: AsyncOpenAI, change: dict[str, Any], param: str
    ) -> None:
        order: dict[str, Any] = {"input_file_id": await upload(client, many(1)), "endpoint": URL}
        with pytest.raises(openai.BadRequestError) as refusal:
            await client.batches.create(**{**order, "completion_window": "24h", **change})
        assert refusal.value.param == param
        assert (await client.batches.list()).data == []

    async def test_a_file_must_exist_and_be_an_input(self, client: AsyncOpenAI) -> None:
        batch = await run(client, many(1))
        assert batch.output_file_id is not None
        with pytest.raises(openai.NotFoundError):
            await client.batches.create(input_file_id="file-none", endpoint=URL, completion_window="24h")
        with pytest.raises(openai.BadRequestError, match="batch_output"):
            await client.batches.create(input_file_id=batch.output_file_id, endpoint=URL, completion_window="24h")

    async def test_an_unknown_batch_is_not_found(self, client: AsyncOpenAI) -> None:
        with pytest.raises(openai.NotFoundError, match="No batch found"):
            await client.batches.retrieve("batch_none")
        with pytest.raises(openai.NotFoundError, match="No batch found"):
            await client.batches.cancel("batch_none")

    @pytest.mark.parametrize("body", [b"", b"[]", b"{", b"[" * 100_000, b'{"a": "\\ud800"}', b'{"a": "\xff"}'])
    async def test_a_body_that_is_no_json_object_is_refused(
        self, http: aiohttp.ClientSession, server: Running, body: bytes
    ) -> None:
        for path in ("/v1/batches", "/v1/embeddings", URL):
            async with http.post(server.url + path, data=body) as response:
                assert response.status == 400
                assert (await response.json())["error"]["type"] == "invalid_request_error"

    async def test_a_body_beyond_the_limit_is_refused(self, http: aiohttp.ClientSession, server: Running) -> None:
        async with http.post(f"{server.url}/v1/batches", data=BytesIO(b" " * (9 << 20))) as response:
            assert response.status == 413
            assert (await response.json())["error"]["type"] == "invalid_request_error"


class TestList:
    async def test_pages_have_the_newest_first(self, client: AsyncOpenAI) -> None:
        ids = [(await create(client, many(1))).id for _ in range(5)]
        pages = [page async for page in (await client.batches.list(limit=2)).iter_pages()]
        assert [[batch.id for batch in page.data] for page in pages] == [ids[:2:-1], ids[2:0:-1], ids[:1]]
        assert [page.has_more for page in pages] == [True, True, False]

    async def test_a_page_stays_where_it_was_when_batches_come(self, client: AsyncOpenAI) -> None:
        ids = [(await create(client, many(1))).id for _ in range(3)]
        first = await client.batches.list(limit=1)
        await create(client, many(1))
        assert [batch.id for batch in (await first.get_next_page()).data] == [ids[1]]

    async def test_first_and_last_id(self, http: aiohttp.ClientSession, server: Running, client: AsyncOpenAI) -> None:
        async with http.get(f"{server.url}/v1/batches") as response:
            empty = await response.json()
        assert empty == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
        ids = [(await create(client, many(1))).id for _ in range(2)]
        async with http.get(f"{server.url}/v1/batches") as response:
            found = await response.json()
        assert (found["first_id"], found["last_id"], found["has_more"]) == (ids[1], ids[0], False)

    async def test_a_page_that_cannot_be_is_refused(self, client: AsyncOpenAI) -> None:
        for limit in (0, 101, -1, 10**30):
            with pytest.raises(openai.BadRequestError, match="limit"):
                await client.batches.list(limit=limit)
        with pytest.raises(openai.NotFoundError):
            await client.batches.list(after="batch_none")


class TestScenario:
    async def test_a_stuck_batch_answers_nothing_until_it_is_cancelled(
        self, client: AsyncOpenAI, http: aiohttp.ClientSession, server: Running
    ) -> None:
        await scenario(http, server, batches={"stuck": True})
        batch = await until(client, await create(client, many(3)), "in_progress")
        assert counts(batch) == (3, 0, 0)
        cancelling = await client.batches.cancel(batch.id)
        assert cancelling.status == "cancelling"
        assert cancelling.cancelling_at is not None
        batch = await until(client, batch, "cancelled")
        assert (counts(batch), batch.output_file_id) == ((3, 0, 0), None)
        assert batch.cancelled_at is not None
        assert batch.finalizing_at is None
        found = await read(client, batch.error_file_id)
        assert Counter(line["error"]["code"] for line in found.values()) == {"batch_cancelled": 3}
        assert {line["response"] for line in found.values()} == {None}
        assert await journal(http, server) == []

    async def test_what_was_answered_before_a_cancel_is_kept_and_paid(
        self, client: AsyncOpenAI, http: aiohttp.ClientSession, server: Running
    ) -> None:
        rules = [{"match": {"nth": 1}, "action": {"status": 500}}]
        await scenario(http, server, rules=rules, batches={"stuck": True, "partial": 0.5})
        batch = await until(client, await create(client, many(7)), "in_progress", answered=3)
        await client.batches.cancel(batch.id)
        batch = await until(client, batch, "cancelled")
        assert counts(batch) == (7, 2, 1)
        assert set(await read(client, batch.output_file_id)) == {"c-1", "c-2"}
        failed = await read(client, batch.error_file_id)
        assert {name for name, line in failed.items() if line["error"]} == {"c-3", "c-4", "c-5", "c-6"}
        assert len(await journal(http, server)) == 3

    async def test_a_stuck_batch_expires_when_its_window_has_passed(
        self, client: AsyncOpenAI, http: aiohttp.ClientSession, server: Running
    ) -> None:
        await scenario(http, server, batches={"stuck": True, "partial": 0.5, "window_s": 0.05})
        batch = await until(client, await create(client, many(4)), "expired")
        assert (counts(batch), batch.completion_window) == ((4, 2, 0), "24h")
        assert batch.expired_at is not None
        assert batch.finalizing_at is not None
        assert set(await read(client, batch.output_file_id)) == {"c-0", "c-1"}
        found = await read(client, batch.error_file_id)
        assert {name: line["error"]["code"] for name, line in found.items()} == {
            "c-2": "batch_expired",
            "c-3": "batch_expired",
        }
        assert len(await journal(http, server)) == 2

    async def test_a_batch_whose_seconds_exceed_its_window_expires(
        self, client: AsyncOpenAI, http: aiohttp.ClientSession, server: Running
    ) -> None:
        await scenario(http, server, batches={"seconds": 60, "partial": 1, "window_s": 0.1})
        batch = await until(client, await create(client, many(2)), "expired")
        assert (counts(batch), batch.error_file_id) == ((2, 2, 0), None)

    async def test_answering_past_the_window_expires_as_well(
        self, client: AsyncOpenAI, http: aiohttp.ClientSession, server: Running
    ) -> None:
        await scenario(http, server, batches={"window_s": 0.01})
        batch = await until(client, await create(client, many(100)), "expired")
        failed = await read(client, batch.error_file_id)
        assert {line["error"]["code"] for line in failed.values()} == {"batch_expired"}
        answered = await read(client, batch.output_file_id)
        assert len(failed) + len(answered) == 100
        assert len(await journal(http, server)) == len(answered) == counts(batch)[1]

    async def test_a_batch_takes_its_seconds(
        self, client: AsyncOpenAI, http: aiohttp.ClientSession, server: Running
    ) -> None:
        await scenario(http, server, batches={"seconds": 0.2})
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert counts(await run(client, many(2))) == (2, 2, 0)
        assert loop.time() - began >= 0.2

    async def test_a_part_of_the_lines_is_answered_at_once(
        self, client: AsyncOpenAI, http: aiohttp.ClientSession, server: Running
    ) -> None:
        await scenario(http, server, batches={"seconds": 3600, "partial": 0.5})
        batch = await until(client, await create(client, many(3)), "in_progress", answered=1)
        assert counts(batch) == (3, 1, 0)
        await client.batches.cancel(batch.id)
        assert counts(await until(client, batch, "cancelled")) == (3, 1, 0)

    async def test_another_scenario_leaves_batches_under_way_alone(
        self, client: AsyncOpenAI, http: aiohttp.ClientSession, server: Running
    ) -> None:
        await scenario(http, server, batches={"stuck": True})
        stuck = await until(client, await create(client, many(1)), "in_progress")
        await scenario(http, server)
        assert (await run(client, many(1))).status == "completed"
        assert (await client.batches.retrieve(stuck.id)).status == "in_progress"

    async def test_a_refused_creation_makes_no_batch(
        self, client: AsyncOpenAI, http: aiohttp.ClientSession, server: Running
    ) -> None:
        await scenario(http, server, batches={"refuse": 429, "retry_after": 2, "times": 1})
        with pytest.raises(openai.RateLimitError) as refusal:
            await create(client, many(1))
        assert refusal.value.response.headers["Retry-After"] == "2"
        assert (await client.batches.list()).data == []
        assert (await run(client, many(1))).status == "completed"

    async def test_a_batch_whose_answer_was_lost_is_found_by_its_metadata(
        self, client: AsyncOpenAI, http: aiohttp.ClientSession, server: Running
    ) -> None:
        await scenario(http, server, batches={"lose_answer": True, "times": 1})
        with pytest.raises(openai.APIConnectionError):
            await create(client, many(2), job="night-7")
        (found,) = [batch async for batch in client.batches.list() if (batch.metadata or {}).get("job") == "night-7"]
        assert (await until(client, found, *ENDED)).status == "completed"
        assert len(await journal(http, server)) == 2
        await create(client, many(2), job="night-8")


class TestCancel:
    async def test_a_cancel_while_lines_are_answered_stops_there(
        self, client: AsyncOpenAI, http: aiohttp.ClientSession, server: Running
    ) -> None:
        batch = await until(client, await create(client, many(100)), "in_progress", answered=1)
        await client.batches.cancel(batch.id)
        batch = await until(client, batch, "cancelled")
        paid = len(await journal(http, server))
        assert 1 <= paid < 100
        assert counts(batch) == (100, paid, 0)
        done, undone = await read(client, batch.output_file_id), await read(client, batch.error_file_id)
        assert (len(done), len(undone)) == (paid, 100 - paid)
        assert {line["error"]["code"] for line in undone.values()} == {"batch_cancelled"}

    async def test_a_bad_file_that_was_cancelled_first_is_cancelled(self, client: AsyncOpenAI) -> None:
        batch = await create(client, b"no\n" * 100)
        assert (await client.batches.cancel(batch.id)).status == "cancelling"
        batch = await until(client, batch, "cancelled")
        assert batch.errors is not None

    async def test_a_second_cancel_changes_nothing_and_a_late_one_is_refused(self, client: AsyncOpenAI) -> None:
        batch = await create(client, many(100))
        first, second = await client.batches.cancel(batch.id), await client.batches.cancel(batch.id)
        assert (second.status, second.cancelling_at) == ("cancelling", first.cancelling_at)
        await until(client, batch, "cancelled")
        done = await run(client, many(1))
        for ended in (batch, done):
            with pytest.raises(openai.ConflictError, match="Cannot cancel a batch with status"):
                await client.batches.cancel(ended.id)


def test_a_batch_goes_no_other_way() -> None:
    batch = OurBatch("batch_1", Order("file-1", URL), created_at=0, expires_at=1)
    with pytest.raises(AssertionError, match="validating is not followed by completed"):
        batch.moved("completed", 0)
