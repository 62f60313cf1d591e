"""A run's journal gives its state again, whatever happened in between, and so proves that advance is pure."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentq.engine import advance
from agentq.engine.decision import entry_of, outcome_of
from agentq.engine.replay import agrees, hashes, replay
from agentq.errors import Conflict, NotFound
from tests.unit.engine.play import ACCEPT, REVISE, TO_BILLING, Play, bundle, wish
from tests.unit.engine.test_commit import ACTS, act


def known(play: Play) -> dict[str, Any]:
    return {play.bundle.hash: play.bundle}


def busy() -> Play:
    """Parallel tools with a retry in between, a revision, an answer; s3 to s5 are the tools."""
    play = Play().fails().says(TO_BILLING).says("draft", [wish("look_up"), wish("refund"), wish("post")])
    play.sees("late", "s4", unknown=True).sees("posted", "s5").sees("found", "s3").sees("refunded", "s4")
    return play.says("Done.").says(REVISE).says("Done, order 17.").says(ACCEPT)


def test_a_whole_run_comes_out_as_it_is_stored() -> None:
    play = busy()
    again = replay(known(play), play.whole)
    assert (again["state"], again["usage"], again["steps"]) == (play.run["state"], play.run["usage"], {})
    assert len(play.journal) == 10
    assert agrees(known(play), play.whole)


def test_a_changed_journal_or_state_shows() -> None:
    play = busy()
    for index, text in ((-2, "Done, order 18."), (-3, "no verdict at all")):
        whole = play.whole
        changed = {**play.journal[index], "reply": {**play.journal[index]["reply"], "text": text}}
        whole["journal"][index] = changed  # type: ignore[typeddict-item]
        assert not agrees(known(play), whole)


@given(st.lists(st.tuples(ACTS, st.booleans(), st.integers(0, 90)), max_size=40))
def test_whatever_befalls_a_run_its_journal_gives_its_state(life: list[tuple[str, bool, int]]) -> None:
    """Losses, time-outs, unusable answers, held steps, limits: the journal needs to know of none of them."""
    play = Play(bundle(run={"max_steps": 25}))
    for what, grant, seconds in life:
        if play.run["ended_at"] is not None:
            break
        play.pass_time(seconds)
        act(play, what, grant)
    assert agrees(known(play), play.whole)


@given(st.lists(st.tuples(ACTS, st.booleans(), st.integers(0, 90)), min_size=5, max_size=40), st.data())
def test_the_state_before_any_step_is_what_it_was_then(life: list[tuple[str, bool, int]], data: st.DataObject) -> None:
    """Replay up to the first outcome of a step gives the state and the open steps that this outcome met."""
    play = Play()
    met: dict[str, tuple[Any, set[str]]] = {}
    for what, grant, seconds in life:
        if play.run["ended_at"] is not None:
            break
        play.pass_time(seconds)
        before, seen = play.run, len(play.journal)
        act(play, what, grant)
        if len(play.journal) > seen:
            met.setdefault(play.journal[-1]["step"], (before["state"], set(before["steps"])))
    if met:
        step = data.draw(st.sampled_from(sorted(met)))
        again = replay(known(play), play.whole, step)
        assert (again["state"], set(again["steps"])) == met[step]


def test_a_start_that_is_an_agents_counts_its_time_from_when_the_run_was_entered() -> None:
    node = {"type": "agent", "agent": "orders", "next": "end"}
    play = Play(bundle({"agent": node}, "agent"))
    entered = play.run["state"]
    play.pass_time(7)
    play.fails().pass_time(30)
    play.says("", [wish("look_up")]).sees().says("It is shipped.")
    assert agrees(known(play), play.whole)
    assert replay(known(play), play.whole, "s1")["state"] == entered


def test_outcomes_survive_the_journal_as_plain_data() -> None:
    """JSON there and back: nothing but plain values is kept, and the outcome is the same."""
    play = Play().says(TO_BILLING).says("", [wish("look_up", {"order": "17", "deep": [1, {"a": None}]})])
    for entry in play.journal:
        assert entry_of(Play().run, "s1", outcome_of(json.loads(json.dumps(entry))))["reply"] == entry["reply"]


def test_a_failed_attempt_and_a_cancelled_end_are_no_outcomes() -> None:
    play = Play().fails()
    assert play.journal == []
    assert agrees(known(play), play.whole)
    play.run["cancel"] = {"reason": "", "at": play.now}
    play.says(TO_BILLING)
    assert (play.run["status"], play.journal) == ("cancelled", [])
    assert agrees(known(play), play.whole)


def test_a_run_that_a_limit_ended_agrees_too() -> None:
    play = Play(bundle(run={"max_steps": 3})).says(TO_BILLING).says("Seems shipped.", [wish("look_up")]).sees()
    assert play.result["acceptance"] == "budget"
    assert agrees(known(play), play.whole)
    late = Play().says(TO_BILLING).says("Seems shipped.", [wish("look_up")])
    late.decide(advance.expire(late.run, late.at_ms))
    assert agrees(known(late), late.whole)


def test_a_step_that_never_was_and_a_run_without_a_journal_are_refused() -> None:
    play = busy()
    with pytest.raises(NotFound):
        replay(known(play), play.whole, "s99")
    with pytest.raises(Conflict, match="no journal"):
        replay(known(play), play.run)


def test_a_replay_needs_the_bundles_it_names() -> None:
    play = busy()
    assert hashes(play.whole) == {play.bundle.hash}
