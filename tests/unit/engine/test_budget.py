"""Every limit ends the run, names itself, and gives the best draft so far."""

from __future__ import annotations

from typing import Any

import pytest

from agentq.engine import budget
from schemas.catalog import AgentLimits
from tests.unit.engine.play import TO_BILLING, Play, bundle, wish


def after_a_draft(of: Any, **fields: Any) -> Play:
    """A run with a draft beside a tool call, before the tool's result is in."""
    play = Play(of, **fields).says(TO_BILLING, cost=500_000_000, tokens=(30, 20))
    return play.says("It seems shipped.", [wish("look_up")], cost=500_000_000, tokens=(30, 20))


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ({"max_steps": 3}, "max_steps"),
        ({"max_tokens": 100}, "max_tokens"),
        ({"max_cost_usd": 1.0}, "max_cost_usd"),
    ],
)
def test_each_limit_of_a_run_ends_it_with_the_draft(limit: dict[str, Any], reason: str) -> None:
    loose: dict[str, Any] = {"max_steps": 99, "max_tokens": 10_000, "max_cost_usd": 99}
    play = after_a_draft(bundle(run={**loose, **limit}, max_cost_usd=99))
    if play.run["ended_at"] is None:
        play.sees("shipped")
    assert play.run["status"] == "succeeded"
    assert (play.result["answer"], play.result["acceptance"], play.result["reason"]) == (
        "It seems shipped.", "budget", reason
    )  # fmt: skip
    assert play.run["steps"] == {}


def test_the_callers_budget_holds_where_it_is_smaller_than_the_workflows() -> None:
    play = after_a_draft(bundle(run={"max_cost_usd": 99}, max_cost_usd=99), budget_usd=0.9)
    assert play.result["reason"] == "max_cost_usd"
    play = after_a_draft(bundle(run={"max_cost_usd": 99}, max_cost_usd=99), budget_usd=1.1)
    assert play.run["status"] == "running"


def test_the_deadline_ends_the_run_when_a_step_ends_after_it() -> None:
    play = after_a_draft(bundle(), deadline_s=60)
    play.pass_time(60)
    play.sees("shipped")
    assert play.result["reason"] == "max_wall_s"


def test_a_run_below_every_limit_goes_on() -> None:
    play = after_a_draft(bundle(run={"max_steps": 4, "max_tokens": 101, "max_cost_usd": 1.01}, max_cost_usd=99))
    play.sees("shipped")
    assert play.kind == "turn"


def test_a_draft_that_is_done_is_an_answer_and_no_budget_case() -> None:
    """The limit is reached with the very last step: nothing more was needed."""
    nodes = {"agent": {"type": "agent", "agent": "billing", "next": "end"}}
    play = Play(bundle(nodes, "agent", run={"max_steps": 1})).says("Done.")
    assert (play.run["status"], play.result["acceptance"]) == ("succeeded", "unreviewed")


def test_without_a_draft_a_limit_is_a_failed_run_that_says_which() -> None:
    play = Play(bundle(run={"max_steps": 1})).says(TO_BILLING)
    assert play.run["status"] == "failed"
    assert play.run["error"] is not None
    assert play.run["error"]["code"] == "budget_exhausted"
    assert "max_steps" in play.run["error"]["message"]


def test_what_was_wasted_counts_against_the_money_of_the_run() -> None:
    """A worker that lost its lease had paid all the same."""
    play = Play(bundle(run={"max_cost_usd": 1.0}))
    play.run["waste"] = {"cost_nano_usd": 999_999_990, "llm_calls": 1}
    play.says(TO_BILLING, cost=10)
    assert play.run["status"] == "failed"
    assert play.run["events"][-1]["data"]["reason"] == "max_cost_usd"


@pytest.mark.parametrize(
    ("limit", "spent", "reason"),
    [
        ({"max_turns": 2}, {"turns": 2}, "agent max_turns"),
        ({"max_tokens": 10}, {"tokens": 10}, "agent max_tokens"),
        ({"max_cost_usd": 0.5}, {"cost_nano_usd": 500_000_000}, "agent max_cost_usd"),
        ({"max_wall_s": 3}, {"since_ms": 7_000}, "agent max_wall_s"),
    ],
)
def test_each_limit_of_an_agents_visit_names_itself(limit: Any, spent: Any, reason: str) -> None:
    fresh: Any = {"turns": 0, "tokens": 0, "cost_nano_usd": 0, "since_ms": 10_000}
    assert budget.visit_exhausted(AgentLimits(**limit), {**fresh, **spent}, 10_000) == reason
    assert budget.visit_exhausted(AgentLimits(**limit), fresh, 10_000) is None
