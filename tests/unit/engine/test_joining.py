"""Calls that wait for a provider's job: there is always time left for a live call, and waiting costs a run nothing."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from agentq.engine import advance, joining
from agentq.engine.commit import due, hints, plan
from agentq.engine.decision import Failed
from agentq.engine.joining import WaitingCall, deferral, gather, window
from agentq.engine.recovery import look
from agentq.engine.replay import agrees
from schemas.catalog import BatchEndpoint
from schemas.run import RunDoc
from tests.unit.engine.play import ACCEPT, DAY, START, TO_BILLING, WALL_S, Line, Play, wish, with_endpoint


def test_a_call_waits_only_where_the_window_leaves_time_for_a_job_and_for_live_calls() -> None:
    line = Line()
    assert deferral(line.call(), line.run, "s1", START) is not None
    assert deferral(line.call(), line.run, "s1", START + 0.7 * DAY) is not None
    assert deferral(line.call(), line.run, "s1", START + 0.75 * DAY) is None, "a job may take an hour more"
    plain: Any = {name: value for name, value in line.run.items() if name != "batch"}
    assert deferral(line.call(), plain, "s1", START) is None, "somebody waits for a request outside a batch"
    assert deferral(Play().call(), line.run, "s1", START) is None, "the model has no such endpoint"
    line.fails()
    line.pass_time(60)
    line.decide(advance.wake(line.run, "s1", line.at_ms))
    assert deferral(line.call(), line.run, "s1", line.now) is None, "a second attempt is live"


def test_a_deferred_step_is_not_told_to_anybody_and_its_run_keeps_nobody_from_a_place() -> None:
    line = Line().deferred()
    assert (line.run["status"], line.kind) == ("waiting", "route")
    assert line.last is not None
    assert hints(line.last) == []
    assert line.run["joins"]["until"] == START + 0.75 * DAY
    assert due(line.run, START) == START + 0.875 * DAY == line.run["steps"]["s1"]["not_before"]
    assert look(line.run, START + 0.8 * DAY, 5, {}) is None, "its deadline does not come nearer"
    assert line.happened()[-1] == "step.deferred"


def test_an_answer_goes_on_as_if_no_time_had_passed() -> None:
    line = Line().deferred()
    line.pass_time(3600)
    line.joined(TO_BILLING)
    assert (line.run["status"], line.kind) == ("running", "turn")
    assert "joins" not in line.run
    assert line.run["deadline_at"] == START + timedelta(seconds=WALL_S + 3600)
    assert line.run["usage"]["cost_nano_usd"] == 7
    assert line.run["state"]["visits"]["agent"]["since_ms"] == line.at_ms
    line.deferred()
    line.pass_time(7200)
    line.joined("draft", [wish("look_up")])
    assert line.run["state"]["visits"]["agent"]["since_ms"] == line.at_ms, "an agent's clock stands still as well"
    line.sees("found").deferred().pass_time(60)
    line.joined("Order 17 is on its way.").deferred().joined(ACCEPT)
    assert line.run["status"] == "succeeded"
    assert "joins" not in line.run
    assert agrees({line.bundle.hash: line.bundle}, line.whole)
    assert line.happened().count("step.joined") == 4


def test_a_call_that_failed_in_its_job_is_tried_again_live() -> None:
    line = Line().deferred()
    line.pass_time(3600)
    line.joined(outcome=Failed("rate_limited", "Slowly.", True, None, line.at_ms))
    assert line.run["steps"]["s1"]["attempt"] == 2
    assert deferral(line.call(), line.run, "s1", line.now) is None
    line.pass_time(60)
    line.decide(advance.wake(line.run, "s1", line.at_ms)).says(TO_BILLING)
    assert agrees({line.bundle.hash: line.bundle}, line.whole)


def test_who_gets_no_answer_is_made_live_by_the_scheduler_and_loses_no_attempt() -> None:
    line = Line().deferred()
    line.pass_time(0.875 * 86_400)
    act = look(line.run, line.now, 5, {})
    assert act is not None
    line.decide(act.decision)
    step = line.run["steps"]["s1"]
    assert (step["attempt"], step["forgiven"], line.run["status"]) == (2, 1, "running")
    assert line.last is not None
    assert [hint.attempt for _, hint in hints(line.last)] == [2]
    assert line.run["deadline_at"] == line.now + timedelta(seconds=WALL_S)
    assert line.happened()[-1] == "step.undeferred"
    line.says(TO_BILLING)
    assert agrees({line.bundle.hash: line.bundle}, line.whole)


def test_a_run_that_ends_meanwhile_waits_for_nothing() -> None:
    line = Line().deferred()
    wish: Mapping[str, Any] = {"reason": "enough", "at": START}
    line.run = cast("RunDoc", {**line.run, "cancel": wish})
    planned = plan(line.run, advance.cancel(line.run, line.at_ms), now=line.now)
    assert "joins" not in planned.after
    assert "joins" in planned.drops


def test_a_run_that_somebody_has_cancelled_is_not_made_live() -> None:
    line = Line().deferred()
    line.run = cast("RunDoc", {**line.run, "cancel": {"reason": "enough", "at": START}})
    line.decide(advance.released(line.run, line.at_ms, "job_failed", paid=True))
    assert (line.run["status"], line.run["steps"], line.run["waste"]) == (
        "cancelled",
        {},
        {"lost_calls": 1, "lost_llm_calls": 1},
    )
    assert line.happened()[-2:] == ["step.undeferred", "run.cancelled"]


ACTS = st.lists(
    st.tuples(st.sampled_from(["joined", "failed", "released", "live", "deferred"]), st.integers(0, 4_000)), max_size=30
)


def answer(line: Line) -> str:
    return {"route": TO_BILLING, "turn": "Order 17 is on its way.", "critique": ACCEPT}[line.kind]


def come_back(line: Line, what: str) -> None:
    """The call waits; perhaps no more."""
    if what == "joined":
        line.joined(answer(line))
    elif what == "failed":
        line.joined(outcome=Failed("busy", "No.", True, None, line.at_ms))
    elif what == "released":
        line.decide(joining.release(line.run, line.at_ms, "not_answered"))


def go_on(line: Line, what: str) -> None:
    """The call does not wait; perhaps it does so now."""
    if "not_before" in line.run["steps"][line.step]:
        line.decide(advance.wake(line.run, line.step, line.at_ms))
    if what == "deferred" and deferral(line.call(), line.run, line.step, line.now) is not None:
        line.deferred()
    elif what == "live":
        line.says(answer(line))


@given(ACTS)
def test_however_calls_are_made_the_journal_gives_the_state(life: list[tuple[str, int]]) -> None:
    """Deferred, joined, failed in a job, made live: the deadline is as far away as the run stood still."""
    line, stood_still = Line(with_endpoint(turnaround_s=60)), 0.0
    for what, seconds in life:
        if line.run["ended_at"] is not None:
            break
        if "joins" in line.run:
            line.pass_time(seconds)
            stood_still += seconds
            come_back(line, what)
        else:
            go_on(line, what)
        if "joins" not in line.run:
            moved = START + timedelta(seconds=WALL_S + stood_still)
            assert line.run["deadline_at"] == min(moved, START + DAY), "and never out of the window"
    assert agrees({line.bundle.hash: line.bundle}, line.whole)


def calls(count: int, since: datetime = START, until: datetime = START + DAY) -> list[WaitingCall]:
    return [WaitingCall(f"r{number}", since, until) for number in range(count)]


def test_a_job_is_made_when_it_is_full_or_its_first_call_has_waited_long_enough() -> None:
    endpoint = BatchEndpoint(most=10, gather_s=30)
    assert gather(calls(9), endpoint, None, START) == ([], [])
    assert len(gather(calls(12), endpoint, None, START).job) == 10
    assert len(gather(calls(9), endpoint, None, START + timedelta(seconds=30)).job) == 9
    assert gather([], endpoint, None, START) == ([], [])


def test_calls_for_which_an_endpoint_has_become_too_slow_are_made_live() -> None:
    """What the latest jobs took counts more than what the operator wrote."""
    endpoint, at = BatchEndpoint(turnaround_s=60, gather_s=0), START + DAY / 2
    assert len(gather(calls(3), endpoint, 3_600, at).job) == 3
    assert len(gather(calls(3), endpoint, 50_000, at).live) == 3


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_the_last_quarter_of_a_window_is_kept_for_live_calls(after_s: int, window_s: int) -> None:
    accepted = START + timedelta(seconds=after_s)
    found = window(accepted, accepted + timedelta(seconds=window_s))
    assert accepted < found.until < found.live_at < accepted + timedelta(seconds=window_s)
    assert abs((found.until - accepted).total_seconds() - 0.75 * window_s) < 0.001


def test_a_joined_call_costs_its_part_of_the_price() -> None:
    live = Play(with_endpoint(price=0.5)).call()
    assert joining.discounted(live).model.cost_nano_usd(1_000, 1_000) * 2 == live.model.cost_nano_usd(1_000, 1_000)
