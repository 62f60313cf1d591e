"""Whoever touches a run's audit chain is found out."""

from __future__ import annotations

import contextlib
import copy
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentq.engine.audit import check
from agentq.event import AuditHead, Event, chain, event_hash, genesis

DATA = st.dictionaries(st.text(max_size=5), st.none() | st.booleans() | st.integers() | st.text(max_size=5), max_size=3)
NEWS = st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(["a", "b"]), "at_ms": st.integers(0, 9), "step": st.none(),
                           "data": DATA}),
    min_size=1, max_size=8,
)  # fmt: skip


def chained(news: list[Any]) -> tuple[list[Event], AuditHead]:
    return chain("r1", genesis("r1"), news)


@given(NEWS)
def test_an_untouched_chain_is_whole(news: list[Any]) -> None:
    events, head = chained(news)
    assert check("r1", head, events) == []


def test_a_chain_made_in_pieces_is_one_chain() -> None:
    one: Any = {"type": "a", "at_ms": 1, "step": None, "data": {}}
    first, head = chained([one])
    second, head = chain("r1", head, [one, one])
    assert check("r1", head, [*first, *second]) == []


@given(NEWS, st.data())
def test_any_edit_of_any_field_is_found(news: list[Any], data: st.DataObject) -> None:
    """Also where the editor computes the event's hash anew, removes a field, or writes what no event can hold."""
    events, head = chained(news)
    victim = copy.deepcopy(events[data.draw(st.integers(0, len(events) - 1))])
    index = victim["seq"] - 1
    field = data.draw(st.sampled_from(["run", "seq", "type", "at_ms", "step", "data", "prev", "hash", "more"]))
    written = data.draw(
        st.sampled_from(["x", 77, None, {"forged": True}, float("nan"), datetime(2026, 1, 1, tzinfo=UTC), "gone"])
    )
    edited: Any = dict(victim)
    if written == "gone":
        edited.pop(field, None)
    else:
        edited[field] = written
    if edited == victim:
        return
    if data.draw(st.booleans()) and field != "hash":
        with contextlib.suppress(TypeError, ValueError):  # what cannot be hashed keeps its old hash
            edited["hash"] = event_hash(edited)
    assert check("r1", head, [*events[:index], edited, *events[index + 1 :]]) != []


@given(NEWS, st.data())
def test_any_deletion_truncation_insertion_and_reordering_is_found(news: list[Any], data: st.DataObject) -> None:
    events, head = chained(news)
    index = data.draw(st.integers(0, len(events) - 1))
    other = data.draw(st.integers(0, len(events) - 1))
    foreign, _ = chain("r2", genesis("r2"), news)
    past, _ = chain("r1", head, news[:1])
    changed = {
        "deleted": events[:index] + events[index + 1 :],
        "truncated": events[:index],
        "repeated": [*events[:index], events[other], *events[index:]],
        "inserted": [*events[:index], foreign[other], *events[index:]],
        "replaced": [*events[:index], foreign[index], *events[index + 1 :]],
        "appended": [*events, *past],
        "empty": [],
    }
    for what, now in changed.items():
        if now != events:
            assert check("r1", head, now) != [], what
    order = data.draw(st.permutations(events))
    if order != events:
        assert check("r1", head, order) != []


def test_a_chain_cannot_be_moved_to_another_run() -> None:
    events, head = chained([{"type": "a", "at_ms": 1, "step": None, "data": {}}])
    assert check("r2", head, [{**event, "run": "r2"} for event in events]) != []  # type: ignore[misc]


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ([0, 2, 3], "event 2 is missing"),
        ([0, 3], "events 2 to 3 are missing"),
        ([0, 1], "the chain ends at event 2, the run has 4"),
        ([], "the chain ends at event 0, the run has 4"),
    ],
)
def test_the_verdict_says_what_is_gone(kept: list[int], said: str) -> None:
    events, head = chained([{"type": "a", "at_ms": at, "step": None, "data": {}} for at in range(4)])
    assert check("r1", head, [events[index] for index in kept]) == [said]
