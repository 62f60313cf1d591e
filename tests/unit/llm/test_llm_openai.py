"""OpenAI's wire format, against answers in the shape the API sends them."""

from __future__ import annotations

import json

import pytest
from llm_calls import CLOSED, LOOK_UP, OPEN, TOOL_TURN, a_call

from agentq.errors import ProviderError
from agentq.llm import openai


def answer(message: dict, finish: str | None = "stop", **fields) -> bytes:
    return json.dumps(
        {
            "id": "chatcmpl-9",
            "object": "chat.completion",
            "created": 1795000000,
            "model": "gpt-x-2026-10-01",
            "choices": [{"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}],
            "usage": {"prompt_tokens": 120, "completion_tokens": 30, "total_tokens": 150},
            **fields,
        }
    ).encode()


def wish(arguments, **fields) -> dict:
    return {
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "look_up_order", "arguments": arguments}, **fields}
        ],
    }


def test_a_plain_call_is_sent_with_nothing_that_was_not_asked_for():
    path, headers, body = openai.encode(a_call())
    assert (path, headers) == ("/chat/completions", {})
    assert body == {
        "model": "m-1",
        "messages": [{"role": "user", "content": "Where is my order A-17?"}],
        "max_completion_tokens": 1024,
    }


def test_a_tool_turn_is_sent_back_in_full_and_broken_arguments_arrive_as_valid_json():
    _, _, body = openai.encode(a_call(messages=TOOL_TURN, tools=[LOOK_UP], model={"temperature": 0.5}))
    assert body["temperature"] == 0.5
    assert body["tools"] == [{"type": "function", "function": LOOK_UP}]
    assistant, first = body["messages"][2:4]
    assert assistant["content"] is None
    sent = [(c["id"], c["type"], json.loads(c["function"]["arguments"])) for c in assistant["tool_calls"]]
    assert sent == [("c1", "function", {"order": "A-17"}), ("c2", "function", {"INVALID_JSON": '{"order": '})]
    assert first == {"role": "tool", "content": "sent", "tool_call_id": "c1"}


@pytest.mark.parametrize(("schema", "strict"), [(CLOSED, True), (OPEN, False), ({"anyOf": [CLOSED, OPEN]}, False)])
def test_strict_structured_output_is_asked_for_only_where_the_schema_allows_it(schema, strict):
    _, _, body = openai.encode(a_call(schema=schema, schema_name="route"))
    assert body["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "route", "schema": schema, "strict": strict},
    }


def test_a_model_that_can_neither_tools_nor_schemas_is_sent_neither():
    call = a_call(tools=[LOOK_UP], schema=CLOSED, model={"native_tools": False, "structured_output": False})
    assert not {"tools", "response_format"} & set(openai.encode(call)[2])


def test_a_text_answer():
    reply = openai.decode(a_call(), answer({"content": "On its way."}), latency_ms=12)
    assert (reply.text, reply.tool_calls, reply.finish) == ("On its way.", [], "stop")
    assert reply.usage == {"input_tokens": 120, "output_tokens": 30}
    assert reply.cost_nano_usd == 120 * 2_000 + 30 * 8_000
    assert (reply.model, reply.provider_id, reply.latency_ms) == ("gpt-x-2026-10-01", "chatcmpl-9", 12)


def test_a_tool_call():
    reply = openai.decode(a_call(), answer(wish('{"order": "A-17"}'), "tool_calls"))
    assert reply.tool_calls == [{"id": "c1", "name": "look_up_order", "arguments": {"order": "A-17"}}]
    assert (reply.text, reply.finish) == ("", "tool_calls")


@pytest.mark.parametrize(
    "raw",
    [
        '{"order": "A-',
        "[1]",
        "7",
        "null",
        '{"n": NaN}',
        '{"n": 1e999}',
        '{"n": 99999999999999999999}',
        "[" * 5000,
        '{"a":' * 40 + "1" + "}" * 40,
    ],
)
def test_arguments_that_are_no_storable_json_object_stay_as_the_raw_text(raw):
    assert openai.decode(a_call(), answer(wish(raw))).tool_calls[0]["arguments"] == raw


@pytest.mark.parametrize("raw", ["", " ", None, {}])
def test_no_arguments_are_empty_arguments(raw):
    assert openai.decode(a_call(), answer(wish(raw))).tool_calls[0]["arguments"] == {}


def test_an_object_in_place_of_json_text_is_taken_as_it_is_and_a_missing_id_is_made_up():
    reply = openai.decode(a_call(), answer(wish({"order": "A-17"}, id="")))
    assert reply.tool_calls == [{"id": "chatcmpl-9-0", "name": "look_up_order", "arguments": {"order": "A-17"}}]
    assert reply.finish == "tool_calls", "although the server said stop"


@pytest.mark.parametrize(
    ("said", "finish"),
    [("length", "length"), ("content_filter", "content_filter"), ("function_call", "tool_calls"), ("eos", "stop")],
)
def test_finish_reasons_are_translated(said, finish):
    assert openai.decode(a_call(), answer({"content": "x"}, said)).finish == finish


def test_a_refusal_is_an_answer_that_was_filtered():
    reply = openai.decode(a_call(), answer({"content": None, "refusal": "I cannot help with that."}))
    assert (reply.text, reply.finish) == ("I cannot help with that.", "content_filter")


def test_all_tokens_spent_on_thinking_is_an_empty_answer_of_finish_length():
    reply = openai.decode(a_call(), answer({"content": None}, "length"))
    assert (reply.text, reply.finish) == ("", "length")


def test_content_in_parts_is_joined():
    parts = [{"type": "text", "text": "On its "}, {"type": "image"}, {"type": "text", "text": "way."}]
    assert openai.decode(a_call(), answer({"content": parts})).text == "On its way."


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": -1, "completion_tokens": True}, [], "many"])
def test_missing_usage_is_estimated_and_says_so(usage):
    reply = openai.decode(a_call(), answer({"content": "x" * 40}, usage=usage))
    assert reply.usage == {"input_tokens": 10, "output_tokens": 10, "estimated": True}
    assert reply.cost_nano_usd == 10 * 2_000 + 10 * 8_000


def test_text_that_cannot_be_stored_is_replaced_everywhere():
    bad, good = "a\x00b\ud800c", "a\ufffdb\ufffdc"
    call = {"id": bad, "type": "function", "function": {"name": bad, "arguments": json.dumps({bad: [bad]})}}
    reply = openai.decode(a_call(), answer({"content": bad, "tool_calls": [call]}, id=bad, model=bad))
    assert (reply.text, reply.provider_id, reply.model) == (good, good, good)
    assert reply.tool_calls == [{"id": good, "name": good, "arguments": {good: [good]}}]


def test_an_emoji_sent_as_two_escapes_survives():
    assert openai.decode(a_call(), answer({"content": "\U0001f600"})).text == "\U0001f600"


def test_bytes_that_are_no_utf8_are_replaced():
    body = answer({"content": "Gr#e"}).replace(b"#", b"\xfc")
    assert openai.decode(a_call(), body).text == "Gr\ufffde"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b"null",
        b"{}",
        b'{"choices": []}',
        b'{"choices": {}}',
        b'{"choices": [1]}',
        b'{"choices": [{}]}',
        b'{"choices": [{"message": {}}]}',
        b'{"choices": [{"message": {"content": null}}]}',
        b'{"choices": [{"message": {"tool_calls": 3}}]}',
        b'{"choices": [{"message": {"tool_calls": [3]}}]}',
        b'{"choices": [{"message": {"tool_calls": [{"function": {}}]}}]}',
        b'{"error": {"message": "secret prompt"}}',
        b"[" * 100_000,
    ],
)
def test_an_answer_that_does_not_fit_the_format_is_a_retryable_bad_response(body):
    with pytest.raises(ProviderError) as caught:
        openai.decode(a_call(), body)
    assert (caught.value.code, caught.value.retryable) == ("bad_response", True)
    assert "secret" not in str(caught.value)
