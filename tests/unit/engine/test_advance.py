"""What failures, losses, cancellation and deadlines mean for a run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentq.engine import advance
from agentq.engine.commit import plan
from agentq.engine.decision import Decision, Observed
from tests.unit.engine.play import TO_BILLING, Play, wish


def applied(play: Play, decision: Decision) -> Play:
    play.run = plan(play.run, decision, now=play.now).after
    return play


def leased(play: Play, worker: str = "w1") -> Play:
    play.run = {
        **play.run, "leases": {play.step: {"token": "t", "worker": worker, "ms": 30_000, "at": play.now}}
    }  # fmt: skip
    return play


def test_the_same_outcome_on_the_same_run_is_the_same_decision_and_changes_nothing_it_was_given() -> None:
    """A commit that lost a race is decided again on the fresh run; so deciding must be pure."""
    play = Play().says(TO_BILLING).says("", [wish("look_up")])
    before = repr(play.run)
    seen = Observed(True, "ok", "x", False, 1, play.at_ms)
    first = advance.advance(play.bundle, play.run, play.step, seen, 5)
    assert advance.advance(play.bundle, play.run, play.step, seen, 5) == first
    assert repr(play.run) == before


def test_a_retryable_failure_opens_the_same_step_at_the_next_attempt_and_not_before_its_back_off() -> None:
    play = Play().fails()
    step = play.run["steps"]["s1"]
    assert (step["attempt"], step["kind"], step["recovery"]) == (2, "route", "retry")
    assert step["not_before"] > play.now
    assert play.run["usage"] == {}
    assert play.happened() == ["run.accepted", "step.failed"]


def test_the_providers_wish_is_honoured_where_it_is_longer_than_our_back_off() -> None:
    play = Play().fails(after_s=40)
    assert (play.run["steps"]["s1"]["not_before"] - play.now).total_seconds() == pytest.approx(40)


@given(st.text(min_size=1), st.integers(1, 60))
def test_the_back_off_grows_is_bounded_and_differs_between_runs_only_a_little(run_id: str, attempt: int) -> None:
    delay = advance.backoff_s(run_id, "s1", attempt)
    assert delay == advance.backoff_s(run_id, "s1", attempt)
    middle = min(60.0, 0.5 * 2 ** (attempt - 1))
    assert 0.75 * middle <= delay <= 1.25 * middle


@pytest.mark.parametrize("retryable", [True, False])
def test_a_step_that_cannot_be_done_ends_the_run_visibly_and_is_kept(retryable: bool) -> None:
    """Attempts used up, or more would not help: quarantined with its cause, so that it can be redriven."""
    play = Play()
    for _ in range(5 if retryable else 1):
        play.fails("model_gone", retryable=retryable)
    assert play.run["status"] == "failed"
    assert play.run["error"] is not None
    assert play.run["error"]["code"] == "model_gone"
    assert play.run["quarantine"]["step"]["kind"] == "route"
    assert play.happened()[-2:] == ["step.quarantined", "run.failed"]
    assert play.run["steps"] == {}


@pytest.mark.parametrize("tool", ["look_up", "refund"])
def test_a_lost_call_that_may_be_repeated_is_opened_at_the_next_attempt_and_counted_as_waste(tool: str) -> None:
    play = leased(Play().says(TO_BILLING).says("", [wish(tool)]), "w9")
    step = play.step
    applied(play, advance.lost(play.run, step, 5, play.at_ms))
    assert play.run["steps"][step]["attempt"] == 2
    assert (play.run["leases"], play.run["waste"]) == ({}, {"lost_calls": 1})
    assert play.run["events"][-1]["data"] == {"attempt": 1, "worker": "w9"}


def test_a_lost_call_of_an_unsafe_tool_is_held_for_a_person_and_never_repeated() -> None:
    play = leased(Play().says(TO_BILLING).says("", [wish("post")]))
    step = play.step
    applied(play, advance.lost(play.run, step, 5, play.at_ms))
    assert play.run["steps"][step]["held"] == "outcome_unknown"
    assert play.run["steps"][step]["attempt"] == 1
    assert play.run["status"] == "waiting"
    assert play.happened()[-2:] == ["step.lost", "step.held"]


def test_a_step_that_is_lost_too_often_is_quarantined() -> None:
    play = leased(Play())
    applied(play, advance.lost(play.run, "s1", 1, play.at_ms))
    assert play.run["error"] is not None
    assert (play.run["status"], play.run["error"]["code"]) == ("failed", "attempts_exhausted")
    assert play.run["waste"] == {"lost_calls": 1, "lost_llm_calls": 1}, "it may have been paid, and nobody knows"


def test_a_step_that_ends_after_a_cancellation_ends_the_run_with_its_cost_and_its_trace() -> None:
    """The refund happened: the audit trail says so, although the run was cancelled meanwhile."""
    play = Play().says(TO_BILLING).says("", [wish("refund", {"order": "17"})])
    play.run["cancel"] = {"reason": "changed my mind", "at": play.now}
    play.sees("refunded")
    assert play.run["status"] == "cancelled"
    assert play.run["usage"]["tool_calls"] == 1
    assert play.happened()[-2:] == ["tool.called", "run.cancelled"]
    assert play.run["events"][-2]["data"]["tool"] == "refund"


def test_a_model_call_that_ends_after_a_cancellation_is_paid_by_the_run() -> None:
    play = Play()
    play.run["cancel"] = {"reason": "", "at": play.now}
    play.says(TO_BILLING, cost=70)
    assert (play.run["status"], play.run["usage"]["cost_nano_usd"]) == ("cancelled", 70)
    assert play.run["error"] == {"code": "cancelled", "message": "Cancelled.", "hint": ""}


def test_a_failed_call_after_a_cancellation_ends_the_run_instead_of_another_attempt() -> None:
    play = Play()
    play.run["cancel"] = {"reason": "", "at": play.now}
    play.fails()
    assert play.run["status"] == "cancelled"


def test_a_run_past_its_deadline_gives_its_draft_or_fails() -> None:
    play = Play().says(TO_BILLING).says("Seems shipped.", [wish("look_up")])
    applied(play, advance.expire(play.run, play.at_ms))
    assert (play.result["answer"], play.result["acceptance"], play.result["reason"]) == (
        "Seems shipped.", "budget", "max_wall_s"
    )  # fmt: skip
    play = Play()
    play.run["state"] = None
    applied(play, advance.expire(play.run, play.at_ms))
    assert play.run["status"] == "failed"


def test_money_and_tokens_add_up_over_the_steps() -> None:
    play = Play().says(TO_BILLING, tokens=(10, 1), cost=11).says("a", tokens=(20, 2), cost=22)
    assert play.run["usage"] == {
        "steps": 2, "llm_calls": 2, "input_tokens": 30, "output_tokens": 3, "cost_nano_usd": 33
    }  # fmt: skip
