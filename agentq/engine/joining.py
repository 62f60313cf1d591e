"""Model calls that can wait: joined into jobs of a provider's batch endpoint, at a part of the price. Pure.

Such an endpoint takes many calls as one file and promises an answer within a day, which usually comes sooner. A line of
a batch with a window (``complete_by``) can wait for it as long as enough of the window is left:

    accepted ------------------------------ until ---------- live ---------- complete_by
              a call may wait for a job       | jobs are given up | calls still waiting are made live

The last quarter of a window is kept for live calls; halfway through it the scheduler makes a waiting call live even if
nobody has taken it out of its job. A call that came back without an answer is made live as well. A run that waits for a
job stands still: neither its deadline nor its agents' clocks come nearer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from agentq.engine.decision import Decision, Deferred, Opening, event, shifted, state_of
from agentq.engine.effects import ToolCallEffect
from agentq.event import NewEvent
from schemas.catalog import BatchEndpoint, ModelSpec
from schemas.llm import LlmCall
from schemas.run import Entry, Joins, RunDoc, Step

RESERVE = 4  # one part in so many of a window is kept for live calls


class Window(NamedTuple):
    """``until``: how long a call may wait for a job; ``live_at``: when it is made live whatever happens."""

    until: datetime
    live_at: datetime


def window(accepted: datetime, complete_by: datetime) -> Window:
    """What a batch's window leaves to its lines' calls."""
    reserve = max(complete_by - accepted, timedelta(0)) / RESERVE
    return Window(complete_by - reserve, complete_by - reserve / 2)


def endpoint_of(model: ModelSpec) -> str:
    """Calls of the same value may share a job: the same model at the same address."""
    return f"{model.provider}/{model.model}" + (f" at {model.base_url}" if model.base_url else "")


def discounted(call: LlmCall) -> LlmCall:
    """The call at the endpoint's prices."""
    return replace(call, model=priced(call.model))


def priced(model: ModelSpec) -> ModelSpec:
    """The model at its endpoint's prices."""
    price = 1.0 if model.batch_endpoint is None else model.batch_endpoint.price
    prices = {
        "input_usd_per_mtok": model.input_usd_per_mtok * price,
        "output_usd_per_mtok": model.output_usd_per_mtok * price,
    }
    return model.model_copy(update=prices)


def part_of_price(models: Iterable[ModelSpec], left: timedelta) -> float | None:
    """The part of the live price that a run costs if every call that may be joined is. ``left`` of its window.
    None: no call of it may be. Where models differ, the dearest counts."""
    until = left - left / RESERVE
    parts = [
        model.batch_endpoint.price
        if model.batch_endpoint is not None and timedelta(seconds=model.batch_endpoint.turnaround_s) <= until
        else 1.0
        for model in models
    ]
    dearest = max(parts, default=1.0)
    return dearest if min(parts, default=1.0) < 1.0 else None


class WaitingCall(NamedTuple):
    """A call that waits for a job: of which run, since when, until when it may."""

    run_id: str
    since: datetime
    until: datetime


class Gathered(NamedTuple):
    """What to do with calls that wait: ``live``: there is no time for a job any more; ``job``: these make one now."""

    live: list[WaitingCall]
    job: list[WaitingCall]


def gather(
    waiting: Sequence[WaitingCall], endpoint: BatchEndpoint, turnaround_s: float | None, now: datetime
) -> Gathered:
    """``waiting``: the longest first. A job is made when it is full or when the first call has waited long enough.

    ``turnaround_s``: what the endpoint's latest jobs took at most, infinite if it would have none; None if that is not
    known.
    """
    needed_s = endpoint.turnaround_s if turnaround_s is None else turnaround_s
    live = [call for call in waiting if (call.until - now).total_seconds() < needed_s]
    rest = [call for call in waiting if (call.until - now).total_seconds() >= needed_s][: endpoint.most]
    full = len(rest) >= endpoint.most
    ready = rest and (full or now - rest[0].since >= timedelta(seconds=endpoint.gather_s))
    return Gathered(live, rest if ready else [])


def deferral(wanted: LlmCall | ToolCallEffect, run: RunDoc, step_id: str, now: datetime) -> Deferred | None:
    """Is it a model call that has time to wait for its endpoint? None: it is to be made now. Only a step's first
    attempt waits."""
    line = run.get("batch")
    if line is None or "complete_by" not in line or "joins" in run or isinstance(wanted, ToolCallEffect):
        return None
    endpoint = wanted.model.batch_endpoint
    if endpoint is None:
        return None
    until = window(run["created_at"], line["complete_by"]).until
    if run["steps"][step_id]["attempt"] > 1 or now + timedelta(seconds=endpoint.turnaround_s) > until:
        return None
    return Deferred(endpoint_of(wanted.model), until, _ms(now))


def defer(run: RunDoc, step_id: str, deferred: Deferred) -> Decision:
    """The step waits for a job. The deadline moves as far away as it may wait; what is left is given back later."""
    since = _time(deferred.at_ms)
    live_at = max(window(run["created_at"], run["batch"]["complete_by"]).live_at, since)
    joins: Joins = {"step": step_id, "endpoint": deferred.endpoint, "since": since, "until": deferred.until}
    told = event("step.deferred", deferred.at_ms, step_id, endpoint=deferred.endpoint, until_ms=_ms(deferred.until))
    opening = replace(_opening(run["steps"][step_id]), delay_s=(live_at - since).total_seconds())
    return Decision(
        [told], state=run["state"], opened={step_id: opening}, status="running",
        fields={"joins": joins, "deadline_at": run["deadline_at"] + (live_at - since)},
    )  # fmt: skip


class Back(NamedTuple):
    """A run at the end of its waiting: ``run`` as if it had not stood still, for ``waited_ms``."""

    run: RunDoc
    waited_ms: int


def back(run: RunDoc, at_ms: int) -> Back:
    """The run with its clocks put right, no longer waiting. Standing still moves no deadline out of the window, which
    is the line's own deadline where that comes first."""
    joins = run["joins"]
    step = run["steps"][joins["step"]]
    waited_ms = max(at_ms - _ms(joins["since"]), 0)
    loose: dict[str, Any] = {name: value for name, value in run.items() if name != "joins"}
    loose["state"] = shifted(state_of(run), waited_ms)
    deadline = run["deadline_at"] - (step["not_before"] - step["hinted_at"])
    moved = deadline + (_time(at_ms) - step["hinted_at"])
    loose["deadline_at"] = min(moved, max(deadline, run["batch"]["complete_by"]))
    return Back(loose, waited_ms)  # type: ignore[arg-type]


def settle(came: Back, decision: Decision, told: NewEvent) -> Decision:
    """What was decided about the run as it came back, as a decision about the run that waits."""
    entry: Entry = {**(decision.entry or {"at_ms": told["at_ms"]}), "stood_still_ms": came.waited_ms}
    if "entered_ms" in entry:  # a replay enters the run first and lets it stand still then
        entry["entered_ms"] -= came.waited_ms
    return replace(
        decision,
        events=[told, *decision.events],
        state=decision.state if decision.state is not None else came.run["state"],
        entry=entry,
        fields={"deadline_at": came.run["deadline_at"], **decision.fields},
        drops=("joins", *decision.drops),
    )


def release(run: RunDoc, at_ms: int, code: str, *, paid: bool = False) -> Decision:
    """It waits for a job no more: the call is made live. That is another attempt, which counts against no limit.

    ``paid``: its answer is lost and may have been paid; it is counted as a lost call.
    """
    came, step_id = back(run, at_ms), run["joins"]["step"]
    step = run["steps"][step_id]
    told = event("step.undeferred", at_ms, step_id, code=code, waited_ms=came.waited_ms)
    again = replace(_opening(step), attempt=step["attempt"] + 1, forgiven=step.get("forgiven", 0) + 1)
    waste = {"lost_calls": 1, "lost_llm_calls": 1} if paid else {}
    return settle(came, Decision([], opened={step_id: again}, status="running", waste=waste), told)


def waits(run: RunDoc, step_id: str) -> bool:
    """Does this open step wait for a job?"""
    return "joins" in run and run["joins"]["step"] == step_id


def _opening(step: Step) -> Opening:
    return Opening(
        step["kind"], step["pool"], step.get("node", ""), step["recovery"], step["payload"], step["attempt"],
        forgiven=step.get("forgiven", 0),
    )  # fmt: skip


def _ms(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)


def _time(epoch_ms: int) -> datetime:
    return datetime.fromtimestamp(epoch_ms / 1000, UTC)
