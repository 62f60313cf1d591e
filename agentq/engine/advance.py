"""The heart: ``(run, step, outcome) -> decision``, and the decisions that no step makes (cancel, expire, quarantine).

Everything here is pure. The same run and outcome give the same decision in any process at any time, so a commit that
lost a race is simply decided again on the fresh run, without repeating the effect.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from agentq.canonical import sha256
from agentq.engine import budget, joining, parse
from agentq.engine.decision import (
    Decision,
    Deferred,
    Failed,
    Observed,
    Opening,
    Outcome,
    Replied,
    entry_of,
    event,
    fresh_state,
    tries,
)
from agentq.engine.nodes import ON_REPLY, Progress, enter, number, on_tool
from agentq.event import NewEvent
from schemas.catalog import END, Bundle
from schemas.chat import Message
from schemas.run import Quarantine, Result, RunDoc, State, Step, Usage

MAX_BACKOFF_S = 60.0
MAX_APART_S = 16.0


def enter_run(bundle: Bundle, run: RunDoc, step_id: str, history: list[Message], at_ms: int) -> RunDoc:
    """What the first step ``enter`` really is: the first step of the workflow's start node. Changes nothing stored."""
    state, opening = enter(bundle, run, fresh_state(history), bundle.workflow.start, at_ms)
    entered: Step = {
        **run["steps"][step_id],
        "kind": opening.kind,
        "node": opening.node,
        "payload": opening.payload,
    }
    return {**run, "state": state, "steps": {**run["steps"], step_id: entered}}


def advance(bundle: Bundle, run: RunDoc, step_id: str, outcome: Outcome, max_attempts: int) -> Decision:
    """What the outcome of an open step means for its run."""
    step = run["steps"][step_id]
    if isinstance(outcome, Failed):
        if run["cancel"] is not None:
            return cancel(run, outcome.at_ms)
        return _failed(run, step_id, step, outcome, max_attempts)
    if isinstance(outcome, Deferred):
        return joining.defer(run, step_id, outcome) if run["cancel"] is None else cancel(run, outcome.at_ms)
    usage = _account(run["usage"], outcome)
    if isinstance(outcome, Observed):
        progress = on_tool(bundle, run, step_id, step, outcome)
    else:
        progress = ON_REPLY[step["kind"]](bundle, run, step_id, step, outcome)
    if run["cancel"] is not None:  # what was done is told and charged all the same
        return cancel(run, outcome.at_ms, usage, progress.events)
    return replace(
        _conclude(bundle, run, step_id, progress, usage, outcome.at_ms), entry=entry_of(run, step_id, outcome)
    )


def joined(bundle: Bundle, run: RunDoc, outcome: Replied | Failed, job: str, max_attempts: int) -> Decision:
    """What the answer of a provider's job means for the run that waits for it."""
    came, step_id = joining.back(run, outcome.at_ms), run["joins"]["step"]
    told = event("step.joined", outcome.at_ms, step_id, job=job, waited_ms=came.waited_ms)
    return joining.settle(came, advance(bundle, came.run, step_id, outcome, max_attempts), told)


def released(run: RunDoc, at_ms: int, code: str, *, paid: bool = False) -> Decision:
    """The provider's job has no answer for the run: its call is made live, unless somebody asked for the run's end."""
    live = joining.release(run, at_ms, code, paid=paid)
    if run["cancel"] is None:
        return live
    ended = cancel(run, at_ms)
    return replace(ended, events=[*live.events, *ended.events], waste=live.waste)


def _account(usage: Usage, outcome: Replied | Observed) -> Usage:
    total: Usage = {**usage, "steps": usage.get("steps", 0) + 1}
    if isinstance(outcome, Observed):
        return {**total, "tool_calls": usage.get("tool_calls", 0) + 1}
    reply = outcome.reply
    return {
        **total,
        "llm_calls": usage.get("llm_calls", 0) + 1,
        "input_tokens": usage.get("input_tokens", 0) + reply.usage["input_tokens"],
        "output_tokens": usage.get("output_tokens", 0) + reply.usage["output_tokens"],
        "cost_nano_usd": usage.get("cost_nano_usd", 0) + reply.cost_nano_usd,
    }


def _conclude(bundle: Bundle, run: RunDoc, step_id: str, progress: Progress, usage: Usage, at_ms: int) -> Decision:
    """From a node's progress to the run's decision: end, stop by budget, go to the next node, or open steps."""
    state, opened = progress.state, progress.opened
    if progress.stop:
        return stop(run, state, usage, progress.stop, at_ms, progress.events, step_id)
    if progress.go == END:
        return _succeed(run, state, usage, at_ms, progress.events)
    if progress.go is not None:
        state, opening = enter(bundle, run, state, progress.go, at_ms)
        state, opened = number(state, [opening])
    if opened and (reason := budget.run_exhausted(bundle, run, usage, at_ms)):
        return stop(run, state, usage, reason, at_ms, progress.events, step_id)
    closed = () if step_id in opened else (step_id,)
    return Decision(progress.events, state=state, usage=usage, closed=closed, opened=opened, status="running")


def _result(state: State, answer: str) -> Result:
    seen = "\n".join(
        message["content"]
        for visit in state["visits"].values()
        for message in visit["transcript"]
        if message["role"] == "tool"
    )
    return {
        "answer": answer,
        "agent": state["agent"],
        "acceptance": state["acceptance"],
        "citations": parse.citations(answer, seen),
        "tools": state["tools"],
        "revisions": state["revisions"],
        "problems": state["problems"],
    }


def _succeed(run: RunDoc, state: State, usage: Usage, at_ms: int, events: list[NewEvent]) -> Decision:
    found = state["lookups"][-1]["content"] if state["lookups"] else ""
    result = _result(state, found if state["draft"] is None else state["draft"])
    ended = event(
        "run.succeeded", at_ms, None, agent=result["agent"], acceptance=result["acceptance"],
        answer_sha256=sha256(result["answer"]), **_total(usage),
    )  # fmt: skip
    return Decision(
        [*events, ended], state=state, usage=usage, closed=tuple(run["steps"]), status="succeeded", result=result
    )


def _total(usage: Usage) -> dict[str, int]:
    return {"cost_nano_usd": usage.get("cost_nano_usd", 0), "llm_calls": usage.get("llm_calls", 0)}


def stop(
    run: RunDoc,
    state: State,
    usage: Usage,
    reason: str,
    at_ms: int,
    events: list[NewEvent],
    done: str | None = None,
) -> Decision:
    """A limit is reached: the best draft so far is the answer, and the result says so; no draft is a failed run that
    keeps its open steps, but for the one that is ``done``."""
    if (draft := state["draft"]) is not None:
        state = {**state, "acceptance": "budget"}
        result: Result = {**_result(state, draft), "reason": reason}
        ended = event(
            "run.succeeded", at_ms, None, agent=result["agent"], acceptance="budget", reason=reason,
            answer_sha256=sha256(result["answer"]), **_total(usage),
        )  # fmt: skip
        return Decision(
            [*events, ended], state=state, usage=usage, closed=tuple(run["steps"]), status="succeeded", result=result
        )
    error = {
        "code": "budget_exhausted",
        "message": f"The run reached its limit {reason} before there was a draft.",
        "hint": f"Raise it for this run with 'agentq dlq edit {run['_id']} --limit NAME=VALUE'.",
    }
    ended = event("run.failed", at_ms, None, code=error["code"], reason=reason, **_total(usage))
    kept, unclaimed = _kept(run, done, error["code"], error["message"])
    if done is not None:
        kept["after"] = done
    return Decision(
        [*events, ended], state=state, usage=usage, closed=tuple(run["steps"]), status="failed", error=error,
        quarantine=kept, unclaimed=unclaimed,
    )  # fmt: skip


def _kept(run: RunDoc, gone: str | None, code: str, message: str) -> tuple[Quarantine, tuple[str, ...]]:
    """What a failed run leaves behind, but for the step ``gone``; and the steps of which it must be certain that nobody
    has claimed them since the run was read, because their effect must not happen twice."""
    others = {key: step for key, step in run["steps"].items() if key != gone}
    doubtful = [
        key
        for key, step in others.items()
        if step["recovery"] == "unsafe" and key not in run["leases"] and "held" not in step and "not_before" not in step
    ]
    kept: Quarantine = {
        "step_id": None,
        "step": None,
        "code": code,
        "message": message,
        "others": others,
        "leased": sorted(key for key in others if key in run["leases"]),
    }
    return kept, tuple(doubtful)


def _failed(run: RunDoc, step_id: str, step: Step, outcome: Failed, max_attempts: int) -> Decision:
    """Another attempt later, or quarantine when attempts are used up or more would not help."""
    attempt, tried = step["attempt"], tries(step)
    if step["recovery"] == "unsafe":  # it may have taken effect before it failed: a person must look
        failed = event("step.failed", outcome.at_ms, step_id, code=outcome.code, attempt=attempt)
        return _hold(run, step_id, [failed], outcome.at_ms)
    if not outcome.retryable or tried >= max_attempts:
        return quarantine(run, step_id, outcome.code, outcome.message, outcome.at_ms)
    delay_s = max(outcome.retry_after_s or 0.0, backoff_s(run["_id"], step_id, tried))
    failed = event(
        "step.failed", outcome.at_ms, step_id, code=outcome.code, attempt=attempt, retry_in_ms=int(delay_s * 1000)
    )
    # The state goes along because the first step may have been entered in memory only.
    return Decision(
        [failed], state=run["state"], opened={step_id: _again(step, attempt + 1, delay_s)}, status="running"
    )


def _hold(run: RunDoc, step_id: str, events: list[NewEvent], at_ms: int) -> Decision:
    """Nobody knows whether an effect that must not happen twice has happened: the step waits for a person."""
    step = run["steps"][step_id]
    held = event("step.held", at_ms, step_id, reason="outcome_unknown")
    again = _again(step, step["attempt"], held="outcome_unknown")
    return Decision([*events, held], state=run["state"], opened={step_id: again}, status="running")


def _again(step: Step, attempt: int, delay_s: float = 0.0, held: str | None = None) -> Opening:
    return Opening(
        step["kind"], step["pool"], step.get("node", ""), step["recovery"], step["payload"], attempt, delay_s, held,
        forgiven=step.get("forgiven", 0),
    )  # fmt: skip


def backoff_s(run_id: str, step_id: str, attempt: int) -> float:
    """Exponential, from half a second, with a spread of a quarter that is fixed by run, step and attempt."""
    spread = hashlib.sha256(f"{run_id}:{step_id}:{attempt}".encode()).digest()[0] / 255
    return min(MAX_BACKOFF_S, 0.5 * 2.0 ** (attempt - 1)) * (0.75 + spread / 2)


def apart_s(run_id: str, step_id: str, tried: int) -> float:
    """How long a step waits before its next attempt when its lease was lost for the ``tried``-th time.

    The first time not at all. A step that is lost again may be what kills its workers, or only have been beside what
    does; started at the same time in the same process they would die together until both are used up. So they part:
    each waits somewhere between nothing and 4 s, then 8, from then on 16, fixed by run, step and try.
    """
    if tried < 2:
        return 0.0
    spread = hashlib.sha256(f"{run_id}:{step_id}:apart:{tried}".encode()).digest()[0] / 255
    return min(MAX_APART_S, 2.0**tried) * spread


def quarantine(run: RunDoc, step_id: str, code: str, message: str, at_ms: int) -> Decision:
    """A step that cannot be done ends its run visibly; the step is kept with its cause so that it can be redriven."""
    error = {
        "code": code,
        "message": message,
        "hint": f"Step {step_id} is quarantined; 'agentq show {run['_id']}' tells what was tried.",
    }
    others, unclaimed = _kept(run, step_id, code, message)
    kept: Quarantine = {**others, "step_id": step_id, "step": run["steps"][step_id]}
    events = [
        event("step.quarantined", at_ms, step_id, code=code, attempt=run["steps"][step_id]["attempt"]),
        event("run.failed", at_ms, None, code=code, **_total(run["usage"])),
    ]
    return Decision(
        events, closed=tuple(run["steps"]), status="failed", error=error, quarantine=kept, unclaimed=unclaimed
    )


def lost(run: RunDoc, step_id: str, max_attempts: int, at_ms: int) -> Decision:
    """The step's worker is gone or its lease ran out: again, with the same key, or wait for a person.

    The call that was in flight is counted as waste. A model call may have been paid, which nobody can know, so it is
    counted apart and is in no cost.
    """
    step, worker = run["steps"][step_id], run["leases"][step_id]["worker"]
    gone = event("step.lost", at_ms, step_id, attempt=step["attempt"], worker=worker)
    waste = {"lost_calls": 1} | ({"lost_llm_calls": 1} if step["kind"] != "tool" else {})
    if step["recovery"] == "unsafe":
        return replace(_hold(run, step_id, [gone], at_ms), waste=waste)
    if tries(step) >= max_attempts:
        message = f"The workers of step {step_id} died or lost it {max_attempts} times."
        ended = quarantine(run, step_id, "attempts_exhausted", message, at_ms)
        return replace(ended, events=[gone, *ended.events], waste=waste)
    again = _again(step, step["attempt"] + 1, apart_s(run["_id"], step_id, tries(step)))
    return Decision([gone], opened={step_id: again}, waste=waste)


def wake(run: RunDoc, step_id: str, at_ms: int) -> Decision:
    """A waiting step's time has come: it may be claimed now."""
    if joining.waits(run, step_id):
        return joining.release(run, at_ms, "no_job_in_time")
    return Decision([], opened={step_id: _again(run["steps"][step_id], run["steps"][step_id]["attempt"])})


def hint_again(run: RunDoc, step_id: str) -> Decision:
    """A step's hint went unheard: publish it again, from the third time on ever more rarely."""
    step = run["steps"][step_id]
    return Decision([], opened={step_id: replace(_again(step, step["attempt"]), hints=step["hints"] + 1)})


def cancel(run: RunDoc, at_ms: int, usage: Usage | None = None, events: Sequence[NewEvent] = ()) -> Decision:
    """Ends a run that somebody asked to cancel (``run["cancel"]``).

    ``usage`` and ``events`` are of the step that noticed it; workers of other steps in flight find themselves fenced
    and book theirs as waste.
    """
    reason = (run["cancel"] or {}).get("reason", "")
    spent = run["usage"] if usage is None else usage
    ended = event("run.cancelled", at_ms, None, reason=reason, open_steps=sorted(run["steps"]), **_total(spent))
    error = {"code": "cancelled", "message": f"Cancelled: {reason}." if reason else "Cancelled.", "hint": ""}
    return Decision([*events, ended], usage=spent, closed=tuple(run["steps"]), status="cancelled", error=error)


def expire(run: RunDoc, at_ms: int) -> Decision:
    """The run's deadline has passed while it waited: the best draft so far, or a failed run."""
    if "backlog" in run:
        error = {"code": "expired", "message": "The request waited for its admission until it expired.",
                 "hint": "Submit it again with a later deadline, or see 'agentq limits show'."}  # fmt: skip
        ended = event("run.failed", at_ms, None, code=error["code"], **_total(run["usage"]))
        return Decision([ended], closed=tuple(run["steps"]), status="failed", error=error)
    if run["state"] is None:  # it never began, and may still do so in another life
        return replace(stop(run, fresh_state([]), run["usage"], "max_wall_s", at_ms, []), state=None)
    return stop(run, run["state"], run["usage"], "max_wall_s", at_ms, [])
