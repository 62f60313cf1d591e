"""What a broker message may say."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import bson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentq.engine.commit import Grant
from agentq.protocol import Hint
from agentq.store import documents
from workers.hints import parse_hints


def test_a_list_of_run_step_and_attempt_is_read() -> None:
    assert parse_hints([["r1", "s1", 1], ["r2", "s12", 3]]) == [Hint("r1", "s1", 1), Hint("r2", "s12", 3)]
    assert parse_hints([]) == []


@pytest.mark.parametrize(
    "value",
    [
        None, "r1", {"r1": "s1"}, [["r1", "s1"]], [["r1", "s1", 1, 1]], [["r1", "s1", "1"]], [["r1", 1, 1]],
        [["r1", "s1.lease", 1]], [["r1", "$where", 1]], [["r1", "", 1]], [["r1", "s" * 65, 1]], [["r1", "s1", 1.0]],
        [[{"$ne": ""}, "s1", 1]], [["r1", "s1\x00", 1]], [["r1", "s1", 10**30]], [["r1", "s1", -1]], ["abc"],
        [["r1", "s1", 1]] * 10_001,
    ],
)  # fmt: skip
def test_anything_else_is_refused(value: Any) -> None:
    """Ids become parts of MongoDB's field paths; an attempt past 64 bits would fail the claims of all others."""
    with pytest.raises(ValueError, match="hint"):
        parse_hints(value)


NOW = datetime(2026, 1, 1, tzinfo=UTC)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
)


@given(JSON | st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5), st.integers()).map(list), max_size=3))
def test_whatever_a_message_holds_it_is_hints_that_can_be_claimed_or_a_value_error(value: Any) -> None:
    try:
        hints = parse_hints(value)
    except ValueError:
        return
    for hint in hints:
        bson.encode({"written": list(documents.claim(hint, Grant("t", "w", 1), NOW))})
