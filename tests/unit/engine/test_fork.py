"""A new run from the middle of another, and why a run is stuck."""

from __future__ import annotations

import copy
from datetime import timedelta
from typing import Any

import pytest

from agentq.engine import advance, audit, repair
from agentq.engine.edits import Edits
from agentq.engine.fork import fork
from agentq.engine.replay import agrees
from agentq.engine.stuck import stuck
from agentq.errors import Conflict, InvalidRequest, NotFound
from schemas.run import RUN
from tests.unit.engine.play import ACCEPT, TO_BILLING, Play, bundle, wish


def ended() -> Play:
    play = Play(conversation="c").says(TO_BILLING).says("", [wish("look_up"), wish("refund")])
    return play.sees("refunded", "s4").sees("found", "s3").says("Shipped.").says(ACCEPT)


def forked(play: Play, step: str, edits: Edits | None = None) -> Any:
    known = {play.bundle.hash: play.bundle}
    return fork(known, play.whole, step, edits or Edits(), run_id="r2", by="eve", now=play.now + timedelta(hours=1))


def test_a_fork_begins_before_its_step_with_its_own_books_and_leaves_the_original_alone() -> None:
    play = ended()
    before = copy.deepcopy(play.whole)
    made = forked(play, "s3")
    run = RUN.validate_python(made.run)
    assert play.whole == before
    assert sorted(run["steps"]) == ["s3"], "its parallel sibling s4 had ended before"
    assert (run["usage"], run["rev"], run["status"], run["conversation"]) == ({}, 0, "running", None)
    assert run["forked_from"] == {"run": "r1", "step": "s3"}
    assert "idempotency_key" not in run
    assert [event["type"] for event in run["events"]] == ["run.forked"]
    assert audit.check("r2", run["audit"], run["events"]) == []
    assert made.tools == ["look_up"]
    assert run["next_due"] == run["created_at"], "dispatched at once"


def test_a_fork_runs_to_its_own_end_and_can_be_replayed_and_forked_itself() -> None:
    play = ended()
    other = Play(play.bundle)
    other.run, other.journal = forked(play, "s4").run, forked(play, "s4").run["journal"]
    assert sorted(other.run["steps"]) == ["s3", "s4"]
    other.sees("found", "s3").sees("refunded", "s4").says("Other words.").says(ACCEPT)
    assert (other.run["status"], other.run["usage"]["llm_calls"]) == ("succeeded", 2)
    assert agrees({play.bundle.hash: play.bundle}, other.whole)
    third = forked(other, "s6").run
    assert third["forked_from"] == {"run": "r2", "step": "s6"}
    assert third["state"] is not None
    assert third["state"]["draft"] == "Other words."


def test_a_fork_from_the_first_step_knows_the_conversation_that_the_original_knew() -> None:
    play = ended()
    history: Any = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    play.run["state"] = {**play.run["state"], "history": history}  # type: ignore[typeddict-item]
    run = forked(play, "s1").run
    assert run["state"] is not None
    assert (run["state"]["history"], run["steps"]["s1"]["kind"]) == (history, "route")


def test_another_agent_model_prompt_and_limits() -> None:
    play = ended()
    made = forked(play, "s5", Edits(agent="orders", prompt="Be brief.", limits={"max_turns": 9, "budget_usd": "0.1"}))
    other = Play(made.bundle)
    other.run = made.run
    assert "Be brief." in other.call().messages[0]["content"]
    assert made.bundle.agents["orders"].limits.max_turns == 9
    assert made.bundle.agents["billing"] == play.bundle.agents["billing"]
    assert made.run["budget_nano_usd"] == 100_000_000
    assert made.run["events"][0]["data"]["edited"]["agent"] == "orders"
    with pytest.raises(InvalidRequest, match="no agent 'nobody'"):
        forked(play, "s5", Edits(agent="nobody"))
    with pytest.raises(InvalidRequest, match="no agent's turn"):
        forked(play, "s6", Edits(agent="orders"))


def test_what_cannot_be_forked_is_refused() -> None:
    play = Play()
    play.run["state"] = None
    with pytest.raises(Conflict, match="not begun"):
        forked(play, "s1")
    with pytest.raises(NotFound, match="'s7'"):
        forked(Play().says(TO_BILLING), "s7")


def test_a_live_run_can_be_forked_at_an_open_step() -> None:
    assert forked(Play().says(TO_BILLING), "s2").run["steps"]["s2"]["kind"] == "turn"


def test_an_agents_time_goes_on_in_a_fork_as_if_no_time_had_passed_between() -> None:
    play = Play(bundle(max_wall_s=60)).says(TO_BILLING)
    play.pass_time(10)
    play.says("", [wish("look_up")]).sees()
    run = forked(play, "s4").run
    assert run["state"] is not None
    assert run["state"]["visits"]["agent"]["since_ms"] == play.at_ms + 3_600_000 - 10_000


def test_why_a_run_is_stuck() -> None:
    play = Play().says(TO_BILLING).says("", [wish("post")])
    assert stuck(play.run, play.now) is None
    late = stuck(play.run, play.now + timedelta(minutes=5))
    assert late is not None
    assert (late.why, "doctor" in late.todo) == ("overdue for 290 s: no scheduler looks", True)
    tried = {**play.run, "steps": {"s3": {**play.run["steps"]["s3"], "attempt": 3}}}
    assert "attempt 3" in str(stuck(tried, play.now))  # type: ignore[arg-type]
    forgiven = {**play.run, "steps": {"s3": {**play.run["steps"]["s3"], "attempt": 3, "forgiven": 2}}}
    assert stuck(forgiven, play.now) is None  # type: ignore[arg-type]
    unheard = {**play.run, "steps": {"s3": {**play.run["steps"]["s3"], "hints": 4}}}
    assert "nobody took it" in str(stuck(unheard, play.now))  # type: ignore[arg-type]
    play.decide(repair.pause(play.run, "maintenance", "eve", play.now))
    assert "agentq resume r1" in str(stuck(play.run, play.now))
    play.run["leases"] = {"s3": {"token": "t", "worker": "w", "ms": 1, "at": play.now}}
    play.decide(advance.lost(play.run, "s3", 5, play.at_ms))
    person = stuck(play.run, play.now)
    assert person is not None
    assert "s3 (post) waits for a person" in person.why
    assert "agentq dlq resolve r1 --step s3" in person.todo
