"""What operators decide about a run: redrive, retry, resolve, drop, pause, resume, after a restore."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from agentq.engine import advance, audit, repair
from agentq.engine.commit import PAUSED_LOOK, Grant, due, hints, plan
from agentq.engine.decision import Failed
from agentq.engine.edits import Edits
from agentq.engine.recovery import look
from agentq.engine.replay import agrees
from agentq.errors import Conflict, InvalidRequest, NotFound
from tests.unit.engine.play import ACCEPT, TO_BILLING, Play, bundle, wish

NO_EDITS = Edits()


def known(play: Play, *more: Any) -> dict[str, Any]:
    return {one.hash: one for one in (play.bundle, *more)}


def leased(play: Play, *steps: str) -> Play:
    play.run["leases"] = {step: {"token": f"t-{step}", "worker": "w", "ms": 30_000, "at": play.now} for step in steps}
    return play


def parallel() -> Play:
    """s3 reads, s4 is keyed, s5 must not be done twice."""
    return Play().says(TO_BILLING).says("", [wish("look_up"), wish("refund"), wish("post")])


def poisoned(play: Play, step: str) -> Play:
    """The step fails for good."""
    return play.end(Failed("model_gone", "There is no such model.", False, None, play.at_ms), step)


def redriven(play: Play, edits: Edits = NO_EDITS) -> Play:
    acted = repair.redrive(known(play), play.whole, edits, "eve", play.now)
    old = play.bundle
    play.bundle = acted.bundle
    play.decide(acted.decision)
    assert audit.check("r1", play.run["audit"], play.run["events"]) == []
    if old.hash != acted.bundle.hash:
        assert play.run["workflow"]["hash"] == acted.bundle.hash
    return play


# -- quarantine keeps everything, redrive opens it ------------------------------------------------------------------


def test_a_redriven_run_goes_on_where_it_failed_and_repeats_nothing() -> None:
    play = poisoned(Play().says(TO_BILLING).says("", [wish("look_up")]).sees(), "s4")
    play.pass_time(5000)
    redriven(play)
    assert play.run["status"] == "running"
    assert (play.run["error"], play.run["ended_at"], play.run.get("quarantine")) == (None, None, None)
    step = play.run["steps"]["s4"]
    assert (step["attempt"], step.get("forgiven"), step["hints"]) == (2, 1, 0)
    assert play.run["deadline_at"] == play.now + timedelta(seconds=900)
    assert play.run["next_due"] == play.now, "the scheduler dispatches it at once"
    play.says("It is shipped.").says(ACCEPT)
    assert (play.run["status"], play.run["usage"]["llm_calls"]) == ("succeeded", 4)
    assert agrees(known(play), play.whole)
    assert play.happened().count("tool.called") == 1


def test_attempts_are_counted_anew_and_never_numbered_anew() -> None:
    """A stale hint or claim of an earlier attempt matches nothing; the step has all its tries again."""
    play = Play()
    for _ in range(5):
        play.fails()
    assert play.run["status"] == "failed"
    redriven(play)
    for attempt in range(6, 10):
        assert play.run["steps"]["s1"]["attempt"] == attempt
        play.fails()
    assert play.run["status"] == "running"
    play.fails()
    assert (play.run["status"], play.run["quarantine"]["step"]["attempt"]) == ("failed", 10)


def test_the_other_open_steps_come_back_and_one_that_may_have_acted_waits_for_a_person() -> None:
    play = leased(parallel(), "s3", "s5")
    poisoned(play, "s3")
    kept = play.run["quarantine"]
    assert (kept["step_id"], sorted(kept["others"]), kept["leased"]) == ("s3", ["s4", "s5"], ["s5"])
    redriven(play)
    steps = play.run["steps"]
    assert [steps[key]["attempt"] for key in ("s3", "s4", "s5")] == [2, 2, 1]
    assert [key for key in steps if "held" in steps[key]] == ["s5"]
    assert play.run["leases"] == {}


def test_an_unsafe_step_that_nobody_had_claimed_is_simply_open_again() -> None:
    """The quarantine was committed on the condition that nobody had; a claim in between would have been seen."""
    play = leased(parallel(), "s3")
    poisoned(play, "s3")
    assert play.last is not None
    assert play.last.unclaimed == ("s5",)
    redriven(play)
    assert "held" not in play.run["steps"]["s5"]


def test_the_arguments_of_a_tool_call_can_be_corrected_and_only_their_hash_is_audited() -> None:
    play = poisoned(Play().says(TO_BILLING).says("", [wish("look_up", {"order": "SECRET"})]), "s3")
    redriven(play, Edits(payload={"order": "PRIVATE"}))
    assert play.tool().arguments == {"order": "PRIVATE"}
    told = play.run["events"][-1]
    assert (told["type"], told["data"]["by"], list(told["data"]["edited"])) == (
        "run.redriven", "eve", ["payload_sha256"]
    )  # fmt: skip
    assert "PRIVATE" not in repr(told)
    play.sees("found")
    assert agrees(known(play), play.whole)


def test_another_model_and_other_instructions_make_a_bundle_that_only_this_run_has() -> None:
    play = poisoned(Play().says(TO_BILLING), "s2")
    before = play.bundle
    other = before.models["m"].model_copy(update={"model": "m-2"})
    redriven(play, Edits(prompt="Be brief.", model="spare", models={"spare": other}))
    call = play.call()
    assert call.model.model == "m-2"
    assert "Be brief." in call.messages[0]["content"]
    assert "Help." in before.agents["billing"].instructions
    assert play.bundle.agents["orders"] == before.agents["orders"]
    play.says("ok").says(ACCEPT)
    assert agrees(known(play, before), play.whole)


def test_a_node_without_an_agent_is_edited_itself() -> None:
    play = poisoned(Play().says(TO_BILLING).says("ok"), "s3")
    redriven(play, Edits(prompt="Be kind."))
    assert "Be kind." in play.call().messages[0]["content"]


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        (Edits(model="nope"), "no model 'nope'"),
        (Edits(limits={"max_turn": "3"}), "no limit 'max_turn'"),
        (Edits(limits={"max_turns": "-1"}), "max_turns"),
        (Edits(limits={"max_turns": "many"}), "max_turns"),
        (Edits(limits={"budget_usd": "much"}), "budget_usd"),
        (Edits(prompt=""), "instructions"),
        (Edits(payload={"a": 1}), "no arguments"),
    ],
)
def test_an_edit_that_makes_no_sense_is_refused_in_words(edits: Edits, said: str) -> None:
    play = poisoned(Play().says(TO_BILLING), "s2")
    with pytest.raises(InvalidRequest, match=said) as caught:
        redriven(play, edits)
    assert caught.value.hint


def test_a_run_that_a_limit_stopped_goes_on_under_a_higher_one() -> None:
    """The last outcome is decided again: the tool call that was refused for want of turns is made."""
    play = Play(bundle(max_turns=1)).says(TO_BILLING).says("", [wish("look_up")])
    assert (play.run["status"], play.run["quarantine"]["code"]) == ("failed", "budget_exhausted")
    with pytest.raises(Conflict, match="would stop again"):
        redriven(play)
    redriven(play, Edits(limits={"max_turns": "4"}))
    assert play.kind == "tool"
    before = play.run["usage"]
    play.sees().says("Shipped.").says(ACCEPT)
    assert (play.run["status"], play.run["usage"]["llm_calls"]) == ("succeeded", before["llm_calls"] + 2)
    assert agrees(known(play, bundle(max_turns=1)), play.whole)


@pytest.mark.parametrize("limits", [{"max_steps": "9"}, {"run.max_steps": 9}])
def test_a_limit_of_the_whole_run_can_be_raised(limits: dict[str, Any]) -> None:
    play = Play(bundle(run={"max_steps": 2})).says(TO_BILLING).says("", [wish("look_up"), wish("refund")])
    with pytest.raises(Conflict, match="max_steps"):
        redriven(play)
    redriven(play, Edits(limits=limits))
    assert sorted(play.run["steps"]) == ["s3", "s4"]
    play.sees("a", "s4").sees("b", "s3").says("ok").says(ACCEPT)
    assert play.run["status"] == "succeeded"


def test_the_requests_own_budget_can_be_raised() -> None:
    play = Play(budget_usd=5e-9).says(TO_BILLING)
    assert play.run["status"] == "failed"
    redriven(play, Edits(limits={"budget_usd": "0.5"}))
    play.says("ok").says(ACCEPT)
    assert (play.run["status"], play.run["budget_nano_usd"]) == ("succeeded", 500_000_000)


def test_a_run_that_waited_past_its_deadline_is_redriven_with_what_was_open() -> None:
    play = parallel().sees("found", "s3")
    play.decide(advance.lost(leased(play, "s5").run, "s5", 5, play.at_ms))
    play.pass_time(1000)
    play.decide(advance.expire(play.run, play.at_ms))
    redriven(play)
    assert {key: step.get("held") for key, step in play.run["steps"].items()} == {"s4": None, "s5": "outcome_unknown"}
    never = Play()
    never.run["state"] = None
    never.decide(advance.expire(never.run, never.at_ms))
    redriven(never)
    assert sorted(never.run["steps"]) == ["s1"]
    assert never.run["state"] is None


def test_an_agents_time_stands_still_while_its_run_has_failed() -> None:
    play = poisoned(Play(bundle(max_wall_s=60)).says(TO_BILLING), "s2")
    play.pass_time(3600)
    redriven(play).says("", [wish("look_up")])
    assert play.run["status"] == "running"


@pytest.mark.parametrize("status", ["succeeded", "running"])
def test_only_a_failed_run_can_be_redriven(status: str) -> None:
    play = Play().says(TO_BILLING)
    if status == "succeeded":
        play.says("ok").says(ACCEPT)
    with pytest.raises(Conflict, match=f"has {status}"):
        redriven(play)


# -- held steps -----------------------------------------------------------------------------------------------------


def held() -> Play:
    play = Play().says(TO_BILLING).says("", [wish("post")])
    play.decide(advance.lost(leased(play, "s3").run, "s3", 5, play.at_ms))
    assert play.run["status"] == "waiting"
    return play


def test_a_held_step_is_done_again_when_a_person_says_that_it_did_not_happen() -> None:
    play = held()
    play.decide(repair.retry_held(play.run, "eve", play.now))
    step = play.run["steps"]["s3"]
    assert (play.run["status"], step["attempt"], "held" in step) == ("running", 2, False)
    told = play.run["events"][-1]
    assert (told["type"], told["data"]) == ("step.released", {"by": "eve", "decision": "retry"})


def test_a_held_step_is_done_when_a_person_says_what_came_of_it() -> None:
    play = held()
    play.decide(repair.resolve_held(play.bundle, play.run, None, "posted on Monday", "eve", play.now))
    assert play.call().messages[-1]["content"] == "posted on Monday"
    assert play.happened()[-2:] == ["step.released", "tool.called"]
    assert play.run["steps"]["s4"]["hints"] == 0
    play.says("It was posted on Monday.").says(ACCEPT)
    assert agrees(known(play), play.whole)


def test_what_is_not_held_cannot_be_released() -> None:
    play = held()
    with pytest.raises(NotFound, match="'s9'"):
        repair.retry_held(play.run, "eve", play.now, "s9")
    with pytest.raises(Conflict, match="no held step"):
        repair.resolve_held(play.bundle, Play().run, None, "x", "eve", play.now)
    with pytest.raises(InvalidRequest, match="too long"):
        repair.resolve_held(play.bundle, play.run, "s3", "x" * 70_000, "eve", play.now)


def test_drop_cancels_a_live_run_and_takes_a_failed_one_off_the_list() -> None:
    play = held()
    play.decide(repair.drop(play.run, "eve", "sent by hand", play.now))
    assert (play.run["status"], play.happened()[-2:]) == ("cancelled", ["run.dropped", "run.cancelled"])
    failed = poisoned(Play(), "s1")
    failed.decide(repair.drop(failed.run, "eve", "", failed.now))
    assert failed.run["status"] == "failed"
    assert "dropped" in failed.run["quarantine"]
    assert failed.run["next_due"] is not None, "its new audit event is to be copied out"
    with pytest.raises(Conflict, match="nothing to drop"):
        repair.drop(failed.run, "eve", "", failed.now)


# -- pause and resume -----------------------------------------------------------------------------------------------


def test_a_paused_run_keeps_what_is_done_and_starts_nothing() -> None:
    play = parallel()
    play.decide(repair.pause(play.run, "the shop is down", "eve", play.now))
    play.sees("found", "s3").sees("refunded", "s4").sees("posted", "s5")
    assert play.run["status"] == "paused"
    assert play.last is not None
    assert hints(play.last) == []
    assert play.run["steps"]["s6"]["hints"] == 0
    assert due(play.run, play.now) == play.now + PAUSED_LOOK
    play.pass_time(10_000)
    assert look(play.run, play.now, 5, {}) is None, "neither a deadline nor an unheard hint"


def test_a_lease_that_runs_out_in_a_pause_is_handled_and_a_failure_waits_for_the_end_of_the_pause() -> None:
    play = parallel()
    play.decide(repair.pause(play.run, "", "eve", play.now))
    leased(play, "s3")
    assert due(play.run, play.now) == play.now + timedelta(seconds=30)
    play.pass_time(31)
    act = look(play.run, play.now, 5, {})
    assert act is not None
    play.decide(act.decision)
    assert (play.run["status"], play.run["steps"]["s3"]["attempt"]) == ("paused", 2)
    play.end(Failed("busy", "no", True, None, play.at_ms), "s4")
    play.pass_time(100)
    assert look(play.run, play.now, 5, {}) is None


def test_a_resumed_run_is_dispatched_at_once_and_has_as_much_time_as_before() -> None:
    play = Play(bundle(max_wall_s=100)).says(TO_BILLING)
    deadline = play.run["deadline_at"]
    play.pass_time(50)
    play.decide(repair.pause(play.run, "", "eve", play.now))
    play.pass_time(7200)
    play.decide(repair.resume(play.run, "eve", play.now))
    assert (play.run["status"], "pause" in play.run) == ("running", False)
    assert play.run["deadline_at"] == deadline + timedelta(seconds=7200)
    assert (play.run["next_due"], play.run["steps"]["s2"]["hints"]) == (play.now, 0)
    play.pass_time(40)
    play.says("", [wish("look_up")])
    assert play.run["status"] == "running", "90 of 100 seconds"
    play.pass_time(20)
    play.sees().says("", [wish("look_up")])
    assert play.run["error"] is not None, "110 of 100 seconds"
    assert agrees(known(play), play.whole)


def test_the_deadline_stands_still_for_a_step_that_ends_in_a_pause() -> None:
    play = Play().says(TO_BILLING)
    play.decide(repair.pause(play.run, "", "eve", play.now))
    play.pass_time(5000)
    play.says("a draft")
    assert (play.run["status"], play.kind) == ("paused", "critique")


def test_a_paused_run_can_be_cancelled_and_can_end() -> None:
    play = Play().says(TO_BILLING)
    play.decide(repair.pause(play.run, "", "eve", play.now))
    ended = Play().says(TO_BILLING).says("a draft")
    ended.decide(repair.pause(ended.run, "", "eve", ended.now))
    assert ended.says(ACCEPT).run["status"] == "succeeded"
    play.run["cancel"] = {"reason": "", "at": play.now}
    act = look(play.run, play.now, 5, {})
    assert act is not None
    assert act.decision.status == "cancelled"


def test_pausing_twice_resuming_what_runs_and_pausing_what_has_ended_are_refused() -> None:
    play = Play().says(TO_BILLING)
    with pytest.raises(Conflict, match="not paused"):
        repair.resume(play.run, "eve", play.now)
    play.decide(repair.pause(play.run, "", "eve", play.now))
    with pytest.raises(Conflict, match="paused already"):
        repair.pause(play.run, "", "eve", play.now)
    failed = poisoned(Play(), "s1")
    with pytest.raises(Conflict, match="has failed"):
        repair.pause(failed.run, "", "eve", failed.now)


# -- after a restore ------------------------------------------------------------------------------------------------


def test_after_a_restore_unsafe_steps_wait_for_a_person_and_others_get_a_new_attempt() -> None:
    play = leased(parallel(), "s3", "s5")
    decision = repair.after_restore(play.bundle, play.run, "eve", play.now, release=True)
    assert decision is not None
    play.decide(decision)
    steps = play.run["steps"]
    assert [(steps[key]["attempt"], steps[key].get("held")) for key in ("s3", "s4", "s5")] == [
        (2, None), (2, None), (1, "outcome_unknown")
    ]  # fmt: skip
    assert (play.run["leases"], play.run["status"]) == ({}, "running")
    assert play.happened()[-2:] == ["run.restored", "step.held"]


def test_after_a_restore_a_run_that_can_still_reach_an_unsafe_tool_is_paused() -> None:
    play = Play().says(TO_BILLING)
    decision = repair.after_restore(play.bundle, play.run, "eve", play.now, release=False)
    assert decision is not None
    play.decide(decision)
    assert (play.run["status"], play.run["pause"]["reason"]) == ("paused", "restored")
    assert repair.after_restore(play.bundle, play.run, "eve", play.now, release=False) is not None
    safe = Play(bundle({"critic": {"type": "critic", "model": "m", "revise": "work", "next": "end"},
                        "work": {"type": "agent", "agent": "orders", "next": "critic"}}, "work"))  # fmt: skip
    harmless = safe.bundle.agents["orders"].model_copy(update={"tools": ["look_up", "refund"]})
    calm = safe.bundle.model_copy(update={"agents": {**safe.bundle.agents, "orders": harmless}})
    assert repair.may_act(safe.bundle, safe.run)
    assert not repair.may_act(calm, safe.run)


def test_a_grant_is_no_way_around_a_pause() -> None:
    """Even where a worker asked for a lease in its commit, no hint is published for a paused run."""
    play = Play()
    play.decide(repair.pause(play.run, "", "eve", play.now))
    decision = advance.wake(play.run, "s1", 0)
    assert hints(plan(play.run, decision, now=play.now, grants={"s1": Grant("t", "w", 1)})) == []
