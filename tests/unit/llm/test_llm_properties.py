"""Whatever a provider sends: an answer that can be stored, or a ProviderError."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llm_calls import CLOSED, a_call

from agentq.canonical import canonical_json
from agentq.errors import ProviderError
from agentq.llm import anthropic, errors, openai, wire

CODECS = {"openai": openai, "anthropic": anthropic}

any_text = st.text(st.characters(exclude_categories=()))  # lone surrogates and NUL included


def json_of(numbers: st.SearchStrategy) -> st.SearchStrategy:
    return st.recursive(
        st.none() | st.booleans() | numbers | any_text,
        lambda child: st.lists(child, max_size=3) | st.dictionaries(any_text, child, max_size=3),
        max_leaves=8,
    )


any_json = json_of(st.integers() | st.floats())
finite_json = json_of(st.integers() | st.floats(allow_nan=False, allow_infinity=False))


def shaped(fields: dict[str, st.SearchStrategy]) -> st.SearchStrategy:
    """Objects that have the right fields, each right or wrong, present or not."""
    return st.fixed_dictionaries({}, optional={name: value | any_json for name, value in fields.items()})


function = shaped({"name": any_text, "arguments": any_text | any_json.map(json.dumps)})
message = shaped({
    "content": any_text, "refusal": any_text, "tool_calls": st.lists(shaped({"id": any_text, "function": function})),
})  # fmt: skip
usage = shaped({"prompt_tokens": st.integers(), "input_tokens": st.integers(), "output_tokens": st.integers()})
block = shaped({
    "type": st.sampled_from(["text", "tool_use"]), "text": any_text, "id": any_text,
    "name": st.sampled_from(["answer", "t"]), "input": any_json,
})  # fmt: skip
bodies = shaped({
    "choices": st.lists(shaped({"message": message, "finish_reason": any_text}), max_size=2),
    "content": st.lists(block, max_size=3), "usage": usage, "id": any_text, "model": any_text, "stop_reason": any_text,
})  # fmt: skip
wire_bytes = (bodies | any_json).map(lambda value: json.dumps(value).encode()) | st.binary()


@pytest.mark.parametrize("provider", CODECS)
@given(body=wire_bytes, schema=st.sampled_from([None, CLOSED]))
def test_any_answer_gives_a_storable_reply_or_a_provider_error(provider, body, schema):
    try:
        reply = CODECS[provider].decode(a_call(provider, schema=schema), body)
    except ProviderError:
        return
    stored = [reply.text, reply.tool_calls, reply.finish, dict(reply.usage), reply.model, reply.provider_id]
    canonical_json(stored)  # no NaN
    json.dumps(stored, ensure_ascii=False).encode()  # no lone surrogate
    assert "\x00" not in json.dumps(stored).replace("\\u0000", "\x00")
    assert reply.finish in {"stop", "tool_calls", "length", "content_filter"}
    assert 0 <= reply.cost_nano_usd < 1 << 63


@given(
    status=st.integers(0, 999),
    body=wire_bytes,
    wish=st.dictionaries(st.sampled_from(["retry-after", "retry-after-ms", "request-id"]), any_text),
)
def test_any_refusal_gives_one_short_safe_error(status, body, wish):
    error = errors.from_status(status, wish, body, where="openai at h:1", now=0.0)
    assert len(str(error)) < 400
    str(error).encode()
    json.dumps(error.as_dict(), ensure_ascii=False).encode()
    assert error.retry_after_s is None or 0 <= error.retry_after_s <= errors.MAX_RETRY_AFTER_S


@given(prompt=st.text(min_size=16), before=st.text(max_size=40), after=st.text(max_size=40))
def test_a_provider_that_repeats_the_prompt_is_not_quoted(prompt, before, after):
    body = json.dumps({"error": {"message": before + prompt + after}}).encode()
    error = errors.from_status(400, {}, body, where="w", private=lambda: [prompt])
    shown = str(error)
    assert not any(prompt[i : i + 16] in shown for i in range(len(prompt) - 15))


texts = st.text(max_size=20)
arguments = st.dictionaries(texts, finite_json, max_size=2) | texts
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": any_text},
        optional={
            "tool_calls": st.lists(st.fixed_dictionaries({"id": texts, "name": texts, "arguments": arguments})),
            "tool_call_id": texts,
        },
    ),
    max_size=6,
)


@given(messages=messages)
def test_turns_for_anthropic_alternate_and_hold_no_empty_text(messages):
    _, _, body = anthropic.encode(a_call("anthropic", messages=messages))
    roles = [turn["role"] for turn in body["messages"]]
    assert all(a != b for a, b in itertools.pairwise(roles))
    blocks = [block for turn in body["messages"] for block in turn["content"]]
    assert all(block["text"].strip() for block in blocks if block["type"] == "text")
    assert sum(b["type"] == "tool_result" for b in blocks) == sum(m["role"] == "tool" for m in messages)


@pytest.mark.parametrize("provider", CODECS)
@given(messages=messages)
def test_any_call_can_be_put_on_the_wire_as_utf8(provider, messages):
    _, _, body = CODECS[provider].encode(a_call(provider, messages=messages))
    assert json.loads(wire.dumps(body).decode())["model"] == "m-1"
