"""Reading batch files: both formats, and every kind of bad line with its number, code and fix."""

from __future__ import annotations

import io
import json
from typing import Any

import bson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentq.batch import lines
from agentq.batch.lines import Bad, Defaults, Good, parse_line, read_lines
from agentq.run import Registered

KNOWN: Registered = {
    "name": "default", "hash": "h", "start_pool": "router", "start_recovery": "retry", "max_wall_s": 60.0,
}  # fmt: skip
DEFAULTS = Defaults(workflows={"default": KNOWN, "support_desk": {**KNOWN, "name": "support_desk"}}, tenant="acme")


def parsed(line: Any) -> Good | Bad:
    raw = line if isinstance(line, bytes) else json.dumps(line).encode()
    return parse_line(7, raw, DEFAULTS)


def good(line: Any) -> Good:
    found = parsed(line)
    assert isinstance(found, Good), found
    return found


def bad(line: Any) -> Bad:
    found = parsed(line)
    assert isinstance(found, Bad), found
    assert found.line == 7
    assert found.message
    assert found.hint
    return found


def openai(custom_id: str = "a", **body: Any) -> dict[str, Any]:
    body = {"model": "agentq/support_desk", "messages": [{"role": "user", "content": "hello"}], **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def test_our_format_is_a_request_plus_an_id() -> None:
    line = good({"id": "m-1", "input": "hello", "workflow": "support_desk", "user": "u", "budget_usd": 0.5})
    assert (line.custom_id, line.format, line.request.workflow) == ("m-1", "agentq", "support_desk")
    assert (line.request.input, line.request.user, line.request.budget_usd) == ("hello", "u", 0.5)
    assert (line.request.tenant, line.request.priority) == ("acme", "batch")
    assert good({"id": "m-1", "input": "x", "priority": "standard"}).request.priority == "standard"


def test_openais_format_names_the_workflow_by_model() -> None:
    line = good(openai(user="u", metadata={"k": "v"}, temperature=0.2, n=1, stream=False, tools=None))
    assert (line.custom_id, line.format, line.request.workflow) == ("a", "openai", "support_desk")
    assert (line.request.input, line.request.user, line.request.metadata) == ("hello", "u", {"k": "v"})
    assert good(openai(model="support_desk")).request.workflow == "support_desk"


def test_earlier_messages_stand_before_the_request_and_none_is_lost() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "four"},
    ]
    assert good(openai(messages=messages)).request.input == (
        "Earlier messages:\nsystem: Be brief.\nuser: one two\nassistant: three\n\nRequest:\nfour"
    )


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (b'{"id": "a", "input": "x"', "invalid_json", "column"),
        (b'\xef\xbb\xbf{"id": "a", "input": "x"}', "invalid_json", "byte order mark"),
        (b'{"id": "a", "id": "b", "input": "x"}', "duplicate_key", "'id'"),
        (b'{"id": "a", "input": "x", "metadata": {"k": 1, "k": 1}}', "duplicate_key", "'k'"),
        (b'{"custom_id": "a", "body": {"messages": [{"role": "user", "role": "user"}]}}', "duplicate_key", "'role'"),
        (b"\xff\xfe{", "invalid_utf8", "Byte 1"),
        (b"[1]", "wrong_type", "array"),
        (b"7", "wrong_type", "number"),
        (b"[" * 100_000, "too_deep", "deep"),
        (b'{"id": "a", "input": "x", "metadata": {"n": ' + b"9" * 5000 + b"}}", "invalid_json", "number"),
        (b'{"id": "a", "input": "x", "metadata": {"n": NaN}}', "wrong_type", "metadata.n"),
        ({"input": "x"}, "missing_field", "id is missing"),
        ({"id": 7, "input": "x"}, "wrong_type", "number"),
        ({"id": "", "input": "x"}, "invalid_value", "1 to 255"),
        ({"id": "a" * 256, "input": "x"}, "invalid_value", "1 to 255"),
        ({"id": "a\ud800", "input": "x"}, "invalid_value", "printable"),
        ({"id": "a"}, "missing_field", "input"),
        ({"id": "a", "input": "  "}, "empty_input", "empty"),
        ({"id": "a", "input": "x" * 300_000}, "input_too_large", "300000"),
        ({"id": "a", "input": "x", "inptu": 1}, "unknown_field", "inptu"),
        ({"id": "a", "input": "x", "\ud800": 1}, "control_characters", ""),
        ({"id": "a", "input": "x", "workflow": "nope"}, "unknown_workflow", "nope"),
        ({"id": "a", "input": "x", "tenant": "other"}, "wrong_tenant", "other"),
        ({"id": "a", "input": "x", "idempotency_key": "k"}, "not_in_a_batch", "idempotency"),
        ({"id": "a", "input": "x", "conversation": "c"}, "not_in_a_batch", "conversation"),
        ({"body": {}, "url": "/v1/chat/completions"}, "missing_field", "custom_id"),
        ({**openai(), "url": "/v1/embeddings"}, "unsupported_url", "/v1/chat/completions"),
        ({**openai(), "method": "GET"}, "unsupported_method", "POST"),
        ({**openai(), "more": 1}, "unknown_field", "more"),
        ({**openai(), "body": "x"}, "wrong_type", "body"),
        (openai(model=3), "wrong_type", "model"),
        (openai(model="agentq/nope"), "unknown_workflow", "nope"),
        (openai(stream=True), "unsupported_parameter", "stream"),
        (openai(n=2), "unsupported_parameter", "body.n"),
        (openai(tools=[{"type": "function"}]), "unsupported_parameter", "tools"),
        (openai(messages=[]), "missing_field", "messages"),
        (openai(messages=[{"role": "assistant", "content": "x"}]), "last_message", "assistant"),
        (openai(messages=[{"role": "tool", "content": "x"}]), "unsupported_message", "messages[0]"),
        (openai(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "unsupported_content", "text"),
        (openai(messages=[{"role": "user", "content": ""}]), "empty_input", "empty"),
    ],
)
def test_a_bad_line_says_what_is_wrong_and_what_to_do(line: Any, code: str, said: str) -> None:
    found = bad(line)
    assert found.code == code
    assert said in found.message
    bson.encode(found.as_error())  # it can be stored


@pytest.mark.parametrize("raw", [b"{", b'  "id": "a",', b'  "id"', b"[", b"},", b"7", b'\xef\xbb\xbf{"id": "a"}'])
def test_a_document_over_several_lines_is_told_to_be_one_object_a_line(raw: bytes) -> None:
    assert "one JSON object a line" in bad(raw).hint


def test_a_bad_line_keeps_its_id_where_it_has_one() -> None:
    assert bad({"id": "m-9", "input": ""}).custom_id == "m-9"
    assert bad({"input": ""}).custom_id is None


@given(st.one_of(st.binary(max_size=200), st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(
        ["id", "input", "custom_id", "body", "url", "method", "messages", "role", "content", "model", "metadata"]
    ), inner), max_leaves=12).map(lambda value: json.dumps(value).encode())))  # fmt: skip
def test_whatever_a_line_holds_it_is_one_good_or_one_bad_line(raw: bytes) -> None:
    found = parse_line(7, raw, DEFAULTS)
    bson.encode(found.as_error() if isinstance(found, Bad) else found.request.model_dump())


def test_line_numbers_count_blank_lines_and_a_byte_order_mark_does_no_harm() -> None:
    file = io.BytesIO(b'\xef\xbb\xbf{"a": 1}\r\n\n   \n{"b": 2}')
    assert list(read_lines(file)) == [(1, b'{"a": 1}\r\n'), (4, b'{"b": 2}')]


def test_a_line_without_an_end_is_refused_and_never_held_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 10)
    file = io.BytesIO(b"x" * 95 + b"\n" + b"123456789\n" + b"y" * 11)
    assert list(read_lines(file)) == [(1, None), (2, b"123456789\n"), (3, None)]
    found = parse_line(1, None, DEFAULTS)
    assert isinstance(found, Bad)
    assert found.code == "line_too_long"
