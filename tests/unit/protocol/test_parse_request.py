"""Untrusted requests: a good one comes through unchanged, everything else is refused with a code and a way out."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import bson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentq.errors import InvalidRequest
from agentq.protocol import MAX_INPUT_BYTES, Request, parse_request
from agentq.run import HINT_GRACE, Registered, new_run, rejected_run
from schemas.run import RUN

NOW = datetime(2026, 1, 1, tzinfo=UTC)
WORKFLOW: Registered = {
    "name": "default", "hash": "h", "start_pool": "router", "start_recovery": "retry", "max_wall_s": 900.0
}  # fmt: skip
CODES = {
    "wrong_type", "missing_field", "unknown_field", "empty_input", "input_too_large", "metadata_too_large", "too_deep",
    "control_characters", "invalid_value",
}  # fmt: skip

# What json.loads can give, and a little of what only Python can.
TEXT = st.text(st.characters(exclude_categories=[]), max_size=8)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from([2**63, -(2**70), "\ud800"])
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=12
)
FIELDS = st.sampled_from([*Request.model_fields, "inptu", "$where", "\ud800"])
BODIES = st.fixed_dictionaries(
    {"input": st.just("hello") | ANYTHING}, optional={"metadata": st.dictionaries(TEXT, ANYTHING, max_size=3)}
).flatmap(lambda body: st.dictionaries(FIELDS, ANYTHING, max_size=2).map(lambda more: {**more, **body}))


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        (None, "wrong_type", None),
        (["input"], "wrong_type", None),
        ("hello", "wrong_type", None),
        ({}, "missing_field", "input"),
        ({"input": "x", "inptu": 1}, "unknown_field", "inptu"),
        ({"input": 7}, "wrong_type", "input"),
        ({"input": "x", "metadata": [1]}, "wrong_type", "metadata"),
        ({"input": "x", "budget_usd": "1"}, "wrong_type", "budget_usd"),
        ({"input": "x", "budget_usd": True}, "wrong_type", "budget_usd"),
        ({"input": "x", "tenant": {"$ne": None}}, "wrong_type", "tenant"),
        ({"input": "x", "conversation": {"$gt": ""}}, "wrong_type", "conversation"),
        ({"input": "x", "metadata": {"n": float("nan")}}, "wrong_type", None),
        ({"input": "x", "metadata": {"n": 2**63}}, "wrong_type", None),
        ({"input": "x", "metadata": {"a": {1: 2}}}, "wrong_type", None),
        ({"input": "x", "metadata": {"a": b"x"}}, "wrong_type", None),
        ({"input": " \n\t"}, "empty_input", None),
        ({"input": "x" * (MAX_INPUT_BYTES + 1)}, "input_too_large", None),
        ({"input": "€" * (MAX_INPUT_BYTES // 3 + 1)}, "input_too_large", None),
        ({"input": "x", "metadata": {"a": "x" * 17_000}}, "metadata_too_large", None),
        ({"input": "x", "metadata": {"a": nested(40)}}, "too_deep", None),
        ({"input": "x", "metadata": {"a": (nested(5000),)}}, "wrong_type", None),
        ({"input": "a\x00b"}, "control_characters", "input"),
        ({"input": "x", "metadata": {"a": ["\x1b[2J"]}}, "control_characters", "metadata.a[0]"),
        ({"input": "x", "metadata": {"a\x00": 1}}, "control_characters", None),
        ({"input": "\ud800"}, "control_characters", "input"),
        ({"input": "x", "metadata": {"a": "\udfff"}}, "control_characters", "metadata.a"),
        ({"input": "x", "priority": "urgent"}, "invalid_value", "priority"),
        ({"input": "x", "budget_usd": 0}, "invalid_value", "budget_usd"),
        ({"input": "x", "budget_usd": float("inf")}, "invalid_value", "budget_usd"),
        ({"input": "x", "budget_usd": float("nan")}, "invalid_value", "budget_usd"),
        ({"input": "x", "deadline_s": -1}, "invalid_value", "deadline_s"),
        ({"input": "x", "at": "tomorrow"}, "invalid_value", "at"),
        ({"input": "x", "at": "0001-01-01T00:00:00+14:00"}, "invalid_value", "at"),
        ({"input": "x", "at": "2999-01-01T00:00:00Z", "delay_s": 5}, "invalid_value", "request"),
        ({"input": "x", "tenant": "a b"}, "invalid_value", "tenant"),
        ({"input": "x", "user": "$where"}, "invalid_value", "user"),
        ({"input": "x", "idempotency_key": ""}, "invalid_value", "idempotency_key"),
        ({"input": "x", "idempotency_key": "k" * 256}, "invalid_value", "idempotency_key"),
    ],
)
def test_each_fault_has_its_code_names_its_field_and_tells_the_way_out(body: Any, code: str, field: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_request(body)
    assert caught.value.code == code
    assert caught.value.hint
    assert not caught.value.retryable
    if field is not None:
        assert caught.value.details.get("field") == field
    bson.encode(caught.value.as_dict())


@given(ANYTHING | BODIES)
def test_whatever_comes_in_a_request_or_a_refusal_comes_out_and_both_can_be_stored(body: Any) -> None:
    """Only ``InvalidRequest`` is ever raised; what is accepted and what is refused both fit into MongoDB."""
    try:
        request = parse_request(body)
    except InvalidRequest as error:
        assert error.code in CODES  # noqa: PT017 - either way out is checked
        bson.encode(rejected_run(error, run_id="r1", now=NOW, facts={}))
        return
    bson.encode(dict(new_run(request, WORKFLOW, run_id="r1", now=NOW)))
    assert len(request.fingerprint) == 64


@given(st.dictionaries(TEXT, ANYTHING, max_size=3))
def test_metadata_that_is_accepted_comes_back_from_mongodb_as_it_was(metadata: dict[str, Any]) -> None:
    try:
        kept = parse_request({"input": "x", "metadata": metadata}).metadata
    except InvalidRequest:
        return
    assert bson.decode(bson.encode({"metadata": kept})) == {"metadata": metadata}


def test_all_that_is_allowed_is_allowed() -> None:
    """Tabs, line breaks, emoji, the largest input, keys with dollars and dots in the caller's own notes."""
    body = {
        "input": "Grüße 🙂\r\n\t" + "x" * (MAX_INPUT_BYTES - 30), "workflow": "support_desk", "tenant": "acme",
        "user": "u@example.org", "conversation": "mail/2026-01", "priority": "batch", "budget_usd": 1, "deadline_s": 5,
        "idempotency_key": "any thing", "metadata": {"$where": {"a.b": [1, 2.5, None, True, "x"]}},
    }  # fmt: skip
    assert parse_request(body).model_dump(exclude_unset=True) == {**body, "budget_usd": 1.0, "deadline_s": 5.0}


def test_the_names_of_fields_in_a_refusal_are_short() -> None:
    """An unknown field's name is the caller's text, and a refusal is stored and logged."""
    with pytest.raises(InvalidRequest) as caught:
        parse_request({"input": "x", "k" * 100_000: 1})
    assert len(str(caught.value)) < 1000


@given(st.permutations(["input", "tenant", "metadata", "budget_usd"]))
def test_equal_requests_have_equal_fingerprints_in_whatever_order_and_with_whatever_key(order: list[str]) -> None:
    body = {"input": "x", "tenant": "t", "metadata": {"b": 1, "a": [1, {"d": 1, "c": 2}]}, "budget_usd": 1.5}
    again = {name: body[name] for name in order} | {"metadata": {"a": [1, {"c": 2, "d": 1}], "b": 1}}
    assert parse_request(again | {"idempotency_key": "k"}).fingerprint == parse_request(body).fingerprint


@pytest.mark.parametrize(
    "change",
    [{"input": "y"}, {"workflow": "other"}, {"tenant": "t2"}, {"user": "u"}, {"conversation": "c"},
     {"priority": "batch"}, {"budget_usd": 2.0}, {"deadline_s": 9.0}, {"metadata": {"a": 2}}, {"metadata": {"a": "1"}}],
)  # fmt: skip
def test_a_request_that_differs_in_anything_has_another_fingerprint(change: dict[str, Any]) -> None:
    body = {"input": "x", "metadata": {"a": 1}}
    assert parse_request({**body, **change}).fingerprint != parse_request(body).fingerprint


def test_defaults_said_aloud_are_the_same_request() -> None:
    said = {"input": "x", "workflow": "default", "tenant": "default", "priority": "standard", "metadata": {}}
    assert parse_request(said).fingerprint == parse_request({"input": "x"}).fingerprint


def test_a_new_run_is_what_the_schema_says_and_due_when_its_hint_may_have_been_lost() -> None:
    request = parse_request({"input": "x", "deadline_s": 60, "budget_usd": 0.25, "idempotency_key": "k"})
    run: Any = new_run(request, WORKFLOW, run_id="r1", now=NOW)
    RUN.validate_python(run)
    assert (run["next_due"] - NOW).total_seconds() == HINT_GRACE.total_seconds()
    assert (run["deadline_at"] - NOW).total_seconds() == 60
    assert run["budget_nano_usd"] == 250_000_000
    assert new_run(request, WORKFLOW, run_id="r1", now=NOW, hinted=False)["next_due"] == NOW


def test_the_workflows_time_limit_holds_where_the_callers_is_longer_or_missing() -> None:
    for body in ({"input": "x"}, {"input": "x", "deadline_s": 5000}):
        run = new_run(parse_request(body), WORKFLOW, run_id="r1", now=NOW)
        assert (run["deadline_at"] - NOW).total_seconds() == 900


def test_a_refused_request_is_a_run_that_has_ended_and_keeps_nothing_of_the_body() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_request({"input": "CANARY\x00", "user": "u"})
    run: Any = rejected_run(caught.value, run_id="r1", now=NOW, facts={"task_id": "t", "bytes": 7})
    RUN.validate_python(run)
    assert run["status"] == "rejected"
    assert "CANARY" not in repr(run)
    assert run["events"][0]["data"]["code"] == "control_characters"
