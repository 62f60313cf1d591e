"""What the scheduler does about a run that is due."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentq.engine.recovery import Act, look, look_again
from agentq.protocol import POOLS
from schemas.run import RunDoc
from tests.unit.engine.play import START, TO_BILLING, Play, wish


def waiting_tools() -> Play:
    """Three parallel tool steps: s3 read, s4 keyed, s5 unsafe."""
    return Play().says(TO_BILLING).says("draft", [wish("look_up"), wish("refund"), wish("post")])


def lease(run: RunDoc, step: str, at: Any = START, ms: int = 30_000) -> None:
    run["leases"] = {**run["leases"], step: {"token": f"t-{step}", "worker": "w", "ms": ms, "at": at}}


def see(run: RunDoc, seconds: float) -> Act | None:
    """With queues that have been heard up to now: what nobody claimed is lost."""
    now = START + timedelta(seconds=seconds)
    return look(run, now, 5, dict.fromkeys(POOLS, now))


def test_nothing_is_due_before_its_time() -> None:
    assert see(Play().run, 9.9) is None


def test_a_step_that_nobody_claimed_is_hinted_again_unless_somebody_claims_it_meanwhile() -> None:
    act = see(Play().run, 10)
    assert act is not None
    assert (act.unclaimed, act.token) == (("s1",), None)
    assert act.decision.opened["s1"].hints == 2
    assert act.decision.opened["s1"].attempt == 1


def test_a_hint_that_still_waits_in_its_queue_is_not_published_again_and_looked_at_when_it_may_have_been_heard() -> (
    None
):
    run, now = Play().run, START + timedelta(seconds=40)
    behind = {"router": START - timedelta(seconds=5)}
    assert look(run, now, 5, behind) is None
    assert look(run, now, 5, {}) is None
    assert look_again(run, now, behind, lambda pool, since: since + timedelta(seconds=50)) == START + timedelta(
        seconds=50
    )
    assert look(run, now, 5, {"router": START + timedelta(seconds=5)}) is not None


def test_while_one_hint_waits_the_next_look_misses_nothing_else_that_becomes_due() -> None:
    """Not the lease of a parallel step, not the deadline."""
    run, now = waiting_tools().run, START + timedelta(seconds=40)
    lease(run, "s4", now, ms=5_000)
    for expected, wanted in ((1, 41), (60, 45)):
        assert look_again(run, now, {}, lambda _, __, s=expected: now + timedelta(seconds=s)) == START + timedelta(
            seconds=wanted
        )
    run["leases"] = {}
    assert look_again(run, now, {}, lambda _, __: run["deadline_at"] + timedelta(hours=1)) == run["deadline_at"]


def test_a_lease_that_has_run_out_is_taken_away_only_if_it_is_still_that_lease_and_has_still_run_out() -> None:
    run = waiting_tools().run
    for step in run["steps"]:
        lease(run, step)
    act = see(run, 30)
    assert act is not None
    assert (act.step_id, act.token, act.lapsed) == ("s3", "t-s3", True)
    assert act.decision.opened["s3"].attempt == 2


def test_a_step_whose_time_has_come_is_woken() -> None:
    play = Play().fails(after_s=20)
    assert see(play.run, 19.9) is None
    act = see(play.run, 20)
    assert act is not None
    assert act.unclaimed == ("s1",)
    assert act.decision.opened["s1"].delay_s == 0
    assert act.decision.opened["s1"].attempt == 2


def test_a_held_step_is_left_to_its_person_until_the_deadline() -> None:
    run = waiting_tools().run
    run["steps"] = {"s5": {**run["steps"]["s5"], "held": "outcome_unknown"}}
    assert see(run, 899) is None
    act = see(run, 900)
    assert act is not None
    assert act.decision.status == "succeeded"


def test_a_cancelled_run_ends() -> None:
    run = Play().run
    run["cancel"] = {"reason": "no", "at": START}
    act = see(run, 0)
    assert act is not None
    assert act.decision.status == "cancelled"


def test_a_run_past_its_deadline_ends_unless_somebody_works_on_it() -> None:
    run = waiting_tools().run
    lease(run, "s3", START + timedelta(seconds=890))
    acts = [see(run, 900), see(run, 921)]
    assert acts[0] is not None
    assert acts[0].decision.status is None  # the other two steps' hints went unheard long ago
    assert acts[1] is not None
    assert (acts[1].decision.status, acts[1].decision.result and acts[1].decision.result["reason"]) == (
        "succeeded", "max_wall_s"
    )  # fmt: skip


@given(st.data())
def test_a_live_lease_is_never_touched(data: st.DataObject) -> None:
    """Whatever is due about the other steps: no act but a cancellation closes, opens or takes a step in work."""
    run = waiting_tools().run
    seconds = data.draw(st.integers(0, 2000))
    live = set()
    for step in run["steps"]:
        age = data.draw(st.none() | st.integers(0, 60))
        if age is not None:
            lease(run, step, START + timedelta(seconds=seconds - age))
            if age < 30:
                live.add(step)
    act = see(run, seconds)
    if act is not None:
        assert live.isdisjoint({*act.decision.closed, *act.decision.opened, *act.unclaimed, act.step_id})


@pytest.mark.parametrize("seconds", [0, 30, 31, 900, 2000])
def test_acts_come_to_an_end(seconds: int) -> None:
    """Looking again at the run as each act leaves it is not an endless loop."""
    from agentq.engine.commit import plan

    run, now = waiting_tools().run, START + timedelta(seconds=seconds)
    for step in run["steps"]:
        lease(run, step)
    for _ in range(10):
        act = look(run, now, 5, dict.fromkeys(POOLS, now))
        if act is None or run["ended_at"] is not None:
            break
        run = plan(run, act.decision, now=now, step_id=act.step_id, token=act.token, lapsed=act.lapsed).after
    else:
        pytest.fail("still due after ten acts")
