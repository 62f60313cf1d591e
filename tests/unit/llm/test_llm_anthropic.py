"""Anthropic's wire format, against answers in the shape the API sends them."""

from __future__ import annotations

import json

import pytest
from llm_calls import CLOSED, LOOK_UP, OPEN, TOOL_TURN, a_call

from agentq.errors import ProviderError
from agentq.llm import anthropic


def answer(*blocks: dict, stop: str | None = "end_turn", **fields) -> bytes:
    return json.dumps(
        {
            "id": "msg_9",
            "type": "message",
            "role": "assistant",
            "model": "claude-x",
            "content": list(blocks),
            "stop_reason": stop,
            "stop_sequence": None,
            "usage": {"input_tokens": 100, "cache_creation_input_tokens": 15, "cache_read_input_tokens": 5,
                      "output_tokens": 30},
            **fields,
        }
    ).encode()  # fmt: skip


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def use(name: str, given, call_id: str = "toolu_1") -> dict:
    return {"type": "tool_use", "id": call_id, "name": name, "input": given}


def decode(body: bytes, **fields):
    return anthropic.decode(a_call("anthropic", **fields), body)


def test_a_plain_call_is_sent_with_nothing_that_was_not_asked_for():
    path, headers, body = anthropic.encode(a_call("anthropic", max_output_tokens=77))
    assert (path, headers) == ("/v1/messages", {"anthropic-version": "2023-06-01"})
    assert body == {
        "model": "m-1",
        "messages": [{"role": "user", "content": [text("Where is my order A-17?")]}],
        "max_tokens": 77,
    }


def test_a_tool_turn_becomes_alternating_turns_with_all_results_in_one():
    _, _, body = anthropic.encode(a_call("anthropic", messages=TOOL_TURN, tools=[LOOK_UP], model={"temperature": 0.5}))
    assert body["system"] == "You help."
    assert body["temperature"] == 0.5
    assert body["tools"] == [
        {"name": "look_up_order", "description": "Find an order.", "input_schema": LOOK_UP["parameters"]}
    ]
    assert [turn["role"] for turn in body["messages"]] == ["user", "assistant", "user"]
    assert body["messages"][1]["content"] == [
        use("look_up_order", {"order": "A-17"}, "c1"),
        use("look_up_order", {"INVALID_JSON": '{"order": '}, "c2"),
    ]
    assert body["messages"][2]["content"] == [
        {"type": "tool_result", "tool_use_id": "c1", "content": "sent"},
        {"type": "tool_result", "tool_use_id": "c2", "content": "not JSON"},
        text("And?"),
    ]


def test_blank_texts_are_left_out_because_the_api_refuses_them():
    messages = [
        {"role": "system", "content": " "},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "\n"},
        {"role": "user", "content": "there?"},
    ]
    _, _, body = anthropic.encode(a_call("anthropic", messages=messages))
    assert "system" not in body
    assert body["messages"] == [{"role": "user", "content": [text("hi"), text("there?")]}]


def test_encoding_leaves_the_call_as_it_was():
    before = json.dumps(TOOL_TURN)
    anthropic.encode(a_call("anthropic", messages=TOOL_TURN))
    assert json.dumps(TOOL_TURN) == before


def test_structured_output_is_asked_for_where_the_schema_is_closed():
    _, _, body = anthropic.encode(a_call("anthropic", schema=CLOSED))
    assert body["output_config"] == {"format": {"type": "json_schema", "schema": CLOSED}}
    assert "tool_choice" not in body, "models that always think refuse a forced tool call"
    assert "output_config" not in anthropic.encode(a_call("anthropic", schema=OPEN))[2]
    assert (
        "output_config" not in anthropic.encode(a_call("anthropic", schema=CLOSED, model={"structured_output": 0}))[2]
    )


def test_a_text_answer_and_all_input_tokens_count():
    reply = decode(answer({"type": "thinking", "thinking": "", "signature": "x"}, text("On its "), text("way.")))
    assert (reply.text, reply.tool_calls, reply.finish) == ("On its way.", [], "stop")
    assert reply.usage == {"input_tokens": 120, "output_tokens": 30}
    assert reply.cost_nano_usd == 120 * 2_000 + 30 * 8_000
    assert (reply.model, reply.provider_id) == ("claude-x", "msg_9")


def test_tool_calls_with_words():
    reply = decode(answer(text("Let me see."), use("look_up_order", {"order": "A-17"}), stop="tool_use"))
    assert (reply.text, reply.finish) == ("Let me see.", "tool_calls")
    assert reply.tool_calls == [{"id": "toolu_1", "name": "look_up_order", "arguments": {"order": "A-17"}}]


def test_input_that_cannot_be_stored_becomes_text():
    reply = decode(answer(use("t", {"n": 10**30}), use("t", [1]), use("t", None)))
    assert [wish["arguments"] for wish in reply.tool_calls] == ['{"n": 1' + "0" * 30 + "}", "[1]", {}]


def test_structured_output_is_text():
    assert decode(answer(text('{"route": "billing"}')), schema=CLOSED).text == '{"route": "billing"}'


def test_structured_output_given_as_a_tool_call_is_text_too():
    body = answer(text("Routing."), use("route", {"route": "Zürich"}), stop="tool_use")
    reply = decode(body, schema=CLOSED, schema_name="route")
    assert (json.loads(reply.text), reply.tool_calls, reply.finish) == ({"route": "Zürich"}, [], "stop")


@pytest.mark.parametrize(
    ("said", "finish"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("refusal", "content_filter"),
        ("pause_turn", "stop"),
        (None, "stop"),
    ],
)
def test_stop_reasons_are_translated(said, finish):
    assert decode(answer(text("x"), stop=said)).finish == finish


def test_an_empty_turn_is_an_empty_answer():
    assert decode(answer()).text == ""


@pytest.mark.parametrize("usage", [None, {}, {"input_tokens": "3"}, 7])
def test_missing_usage_is_estimated_and_says_so(usage):
    reply = decode(answer(text("x" * 40), usage=usage))
    assert reply.usage == {"input_tokens": 10, "output_tokens": 10, "estimated": True}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b'{"content": "hi"}',
        b'{"content": [1]}',
        b'{"content": [{"type": "tool_use", "id": "x"}]}',
        b'{"type": "error", "error": {"type": "overloaded_error", "message": "secret"}}',
    ],
)
def test_an_answer_that_does_not_fit_the_format_is_a_retryable_bad_response(body):
    with pytest.raises(ProviderError) as caught:
        decode(body)
    assert (caught.value.code, caught.value.retryable) == ("bad_response", True)
    assert "secret" not in str(caught.value)
