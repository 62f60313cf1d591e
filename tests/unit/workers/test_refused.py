"""What is kept of a refused request."""

from __future__ import annotations

import json
from typing import Any

import pytest
from bson import encode
from hypothesis import given
from hypothesis import strategies as st

from workers.refused import MAX_KEPT_BYTES, refused, refused_message


def body(kept: dict[str, Any]) -> Any:
    return json.loads(kept["body"])


@pytest.mark.parametrize(
    ("args", "kwargs", "found"),
    [
        ((), {"request": {"input": ""}}, {"input": ""}),
        (({"input": ""},), {}, {"input": ""}),
        (("a", "b"), {"c": 1}, {"args": ["a", "b"], "kwargs": {"c": 1}}),
        ((), {"request": "no object"}, "no object"),
    ],
)
def test_a_tasks_request_is_kept_as_it_was_sent(args: tuple[Any, ...], kwargs: dict[str, Any], found: Any) -> None:
    kept = refused("some_code", args, kwargs)
    assert (kept["code"], body(kept)) == ("some_code", found)
    assert len(kept["sha256"]) == 64


@pytest.mark.parametrize("raw", [b"", b"\xff\xfe not json", b'[[], {"request": ', b"[NaN]", "1" * 5000, None, 17])
def test_of_what_is_no_json_only_size_and_hash_are_kept(raw: Any) -> None:
    kept = refused_message("undecodable", raw)
    assert kept["bytes"] == (len(raw) if isinstance(raw, bytes | str) else 0)
    assert "body" not in kept


def test_a_message_that_holds_a_request_gives_it_and_another_its_whole_body() -> None:
    assert body(refused_message("unknown_task", b'[[], {"request": {"input": "x"}}, {}]')) == {"input": "x"}
    assert body(refused_message("invalid_message", '{"any": "thing"}')) == {"any": "thing"}


def test_what_is_too_large_or_too_deep_is_not_kept() -> None:
    assert "body" not in refused("c", ({"input": "x" * MAX_KEPT_BYTES},), {})
    assert "body" not in refused_message("c", b"[" * 100_000 + b"]" * 100_000)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text() | st.floats(), lambda inner: st.lists(inner)
                    | st.dictionaries(st.text(), inner)))  # fmt: skip
def test_whatever_was_sent_what_is_kept_can_be_stored(value: Any) -> None:
    encode(refused("c", (value,), {}))
    encode(refused_message("c", json.dumps([[value], {}, {}])))
