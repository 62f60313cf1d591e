"""From a decision to a commit: the audit chain goes on, and the scheduler is never told to look too late."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentq.engine import advance, audit
from agentq.engine.commit import Grant, hints, plan, step_due
from agentq.engine.decision import Decision, Opening
from agentq.protocol import TERMINAL
from agentq.run import HINT_GRACE
from schemas.run import RunDoc
from tests.unit.engine.play import ACCEPT, REVISE, START, TO_BILLING, Play, bundle, wish

ACTS = st.sampled_from(["answer", "empty", "tools", "observe", "unknown", "fail", "lose", "wake", "hint", "route"])


def earliest(run: RunDoc) -> datetime:
    """When something about a live run is due, counted afresh from its steps, its leases and its deadline."""
    dues = [step_due(step, run["leases"].get(key)) for key, step in run["steps"].items()]
    return min([run["deadline_at"], *(due for due in dues if due is not None)])


def act(play: Play, what: str, grant: bool) -> None:
    """One step of a random life: an outcome of an open step, or an act of the scheduler."""
    key = list(play.run["steps"])[-1]
    kind = play.run["steps"][key]["kind"]
    if what in ("lose", "wake", "hint"):
        lease = {"token": "t", "worker": "w", "ms": 30_000, "at": play.now}
        if what == "lose":
            play.run = {**play.run, "leases": {**play.run["leases"], key: lease}}  # type: ignore[typeddict-item]
        decided = {
            "lose": lambda: advance.lost(play.run, key, 5, play.at_ms),
            "wake": lambda: advance.wake(play.run, key, 0),
            "hint": lambda: advance.hint_again(play.run, key),
        }[what]()
        play.run = plan(play.run, decided, now=play.now).after
    elif kind == "tool":
        if what == "fail":
            return
        play.end(_observed(play, unknown=what == "unknown"), key)
    elif what == "fail":
        play.end(_failed(play), key)
    else:
        said = {"answer": {"turn": "It is shipped.", "critique": ACCEPT}, "route": {"route": TO_BILLING},
                "empty": {"critique": REVISE}}.get(what, {}).get(kind, "")  # fmt: skip
        calls = [wish("look_up"), wish("refund"), wish("post")] if what == "tools" and kind == "turn" else []
        play.end(_replied(said, calls, play), key)
    if grant and play.run["ended_at"] is None:
        opened = list(play.run["steps"])[-1]
        at = {"token": "g", "worker": "w", "ms": 30_000, "at": play.now}
        play.run = {**play.run, "leases": {**play.run["leases"], opened: at}}  # type: ignore[typeddict-item]


def _replied(text: str, calls: list, play: Play):  # type: ignore[no-untyped-def,type-arg]
    from agentq.engine.decision import Replied
    from schemas.llm import LlmReply

    return Replied(LlmReply(text, calls, "stop", {"input_tokens": 3, "output_tokens": 2}, 7, "m-1", 1), play.at_ms)


def _observed(play: Play, *, unknown: bool):  # type: ignore[no-untyped-def]
    from agentq.engine.decision import Observed

    return Observed(not unknown, "timeout" if unknown else "ok", "x", unknown, 1, play.at_ms)


def _failed(play: Play):  # type: ignore[no-untyped-def]
    from agentq.engine.decision import Failed

    return Failed("busy", "busy", True, None, play.at_ms)


@given(st.lists(st.tuples(ACTS, st.booleans(), st.integers(0, 90)), max_size=40))
def test_over_a_random_life_the_run_stays_consistent(life: list[tuple[str, bool, int]]) -> None:
    """``next_due`` is never later than anything is due, ``waiting`` means that all steps are held, a live run has
    steps, an ended one none, and its audit chain is whole."""
    play = Play(bundle(run={"max_steps": 25}))
    for what, grant, seconds in life:
        if play.run["ended_at"] is not None:
            break
        play.pass_time(seconds)
        act(play, what, grant)
        run = play.run
        assert audit.check("r1", run["audit"], run["events"]) == []
        assert (run["ended_at"] is not None) == (run["status"] in TERMINAL) == (not run["steps"])
        assert set(run["leases"]) <= set(run["steps"])
        if run["ended_at"] is None:
            assert run["next_due"] is not None
            assert run["next_due"] <= earliest(run)
            held = all("held" in step for step in run["steps"].values())
            assert run["status"] == ("waiting" if held else "running")


def test_a_due_time_that_still_holds_is_left_alone() -> None:
    """An unchanged index entry costs nothing."""
    play = Play()
    before = play.run["next_due"]
    play.pass_time(5)
    play.says(TO_BILLING)
    assert play.run["next_due"] == before
    play.pass_time(40)
    play.says("", [wish("look_up")])
    assert play.run["next_due"] == play.now + HINT_GRACE


def test_a_run_that_has_ended_is_due_once_more() -> None:
    """To have its audit events copied out, should its worker die before."""
    play = Play().says(TO_BILLING).says("a").says(ACCEPT)
    assert play.run["ended_at"] == play.now
    assert play.run["next_due"] is not None
    assert play.run["next_due"] <= play.now + HINT_GRACE


@pytest.mark.parametrize(("times", "seconds"), [(1, 10), (2, 10), (3, 20), (4, 40), (9, 1280), (20, 1280)])
def test_a_hint_that_goes_unheard_is_repeated_soon_and_then_ever_more_rarely(times: int, seconds: float) -> None:
    step = {**Play().run["steps"]["s1"], "hints": times}
    assert step_due(step, None) == START + timedelta(seconds=seconds)  # type: ignore[arg-type]


def test_hints_are_for_steps_that_may_be_claimed_and_that_nobody_holds() -> None:
    openings = {
        "s2": Opening("turn", "specialist", "agent", "retry"),
        "s3": Opening("turn", "specialist", "agent", "retry"),
        "s4": Opening("turn", "specialist", "agent", "retry", delay_s=1),
        "s5": Opening("turn", "specialist", "agent", "retry", held="approval"),
    }
    decision = Decision([], closed=("s1",), opened=openings)
    planned = plan(Play().run, decision, now=START, grants={"s3": Grant("t", "w", 1)})
    assert [(pool, hint.step_id) for pool, hint in hints(planned)] == [("specialist", "s2")]
    assert set(planned.after["leases"]) == {"s3"}


def test_events_that_are_copied_out_leave_the_run_and_the_chain_goes_on() -> None:
    play = Play().says(TO_BILLING)
    planned = plan(play.run, advance.cancel(play.run, 1), now=START, copied=1)
    assert [event["seq"] for event in planned.after["events"]] == [2, 3]
    assert planned.trimmed
    assert planned.after["audit"]["seq"] == 3


def test_a_step_that_a_lapsed_lease_takes_away_leaves_no_receipt() -> None:
    """Only the holder of a live lease has done the step."""
    play = Play()
    decision = advance.wake(play.run, "s1", 0)
    assert plan(play.run, decision, now=START, step_id="s1", token="t", lapsed=True).after["receipts"] == {}
    assert plan(play.run, decision, now=START, step_id="s1", token="t").after["receipts"] == {"s1": "t"}
