"""What the scheduler does about a run that is due: pure, from the run and the time to the next act."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from agentq.engine.advance import cancel, expire, hint_again, lost, wake
from agentq.engine.commit import due, step_due
from agentq.engine.decision import Decision, paused
from agentq.protocol import Pool
from schemas.run import RunDoc, Step

HEARD_MARGIN = timedelta(seconds=2)  # a step is stored a moment before its hint is published


@dataclass(frozen=True, slots=True)
class Act:
    """A decision with the conditions under which it may be committed."""

    decision: Decision
    step_id: str | None = None
    token: str | None = None  # with ``lapsed``: of the lease that has run out
    lapsed: bool = False
    unclaimed: tuple[str, ...] = ()


def look(run: RunDoc, now: datetime, max_attempts: int, heard: Mapping[Pool, datetime]) -> Act | None:
    """The next act for a live run, None if nothing is to be done. Call again on the run as the act leaves it.

    A run is cancelled at once, whoever works on it; past its deadline, a step that is being worked on may finish.
    ``heard``: up to which time of publication each pool's queue has been heard. A hint that is older and led to no
    claim is lost; a younger one still waits in its queue, and publishing it again would only make that longer.
    """
    at_ms = int(now.timestamp() * 1000)
    if run["cancel"] is not None:
        return Act(cancel(run, at_ms))
    if now >= run["deadline_at"] and not _worked_on(run, now) and not paused(run):
        return Act(expire(run, at_ms))
    if "backlog" in run:
        return None
    for step_id, step in run["steps"].items():
        lease = run["leases"].get(step_id)
        moment = step_due(step, lease)
        if moment is None or moment > now or (lease is None and paused(run)):
            continue
        if lease is not None:
            return Act(lost(run, step_id, max_attempts, at_ms), step_id, lease["token"], lapsed=True)
        if _waits_in_its_queue(step, heard):
            continue
        decision = wake(run, step_id, at_ms) if "not_before" in step else hint_again(run, step_id)
        return Act(decision, unclaimed=(step_id,))
    return None


def _waits_in_its_queue(step: Step, heard: Mapping[Pool, datetime]) -> bool:
    told = "not_before" not in step and step["hints"] > 0
    return told and (step["pool"] not in heard or heard[step["pool"]] < step["hinted_at"] + HEARD_MARGIN)


def unheard(run: RunDoc, now: datetime, heard: Mapping[Pool, datetime]) -> set[Pool]:
    """The pools in whose queues hints of the run still wait, as far as is known, though they should not by now."""
    return {step["pool"] for step_id, step in run["steps"].items() if _overdue(run, step_id, now, heard)}


def look_again(
    run: RunDoc, now: datetime, heard: Mapping[Pool, datetime], expected: Callable[[Pool, datetime], datetime]
) -> datetime:
    """When to look next at a run about which nothing is to be done now. ``expected``: when a hint may have been heard,
    from its pool and its time."""
    wanted = due(run, now)
    if wanted > now:
        return wanted
    moments = [run["deadline_at"]]
    for step_id, step in run["steps"].items():
        if _overdue(run, step_id, now, heard):
            moments.append(expected(step["pool"], step["hinted_at"]))
        elif (moment := step_due(step, run["leases"].get(step_id))) is not None:
            moments.append(moment)
    return min(moments)


def _overdue(run: RunDoc, step_id: str, now: datetime, heard: Mapping[Pool, datetime]) -> bool:
    """Should somebody have claimed the step by now, whose hint still waits?"""
    step = run["steps"][step_id]
    if step_id in run["leases"] or paused(run) or not _waits_in_its_queue(step, heard):
        return False
    moment = step_due(step, None)
    return moment is not None and moment <= now


def _worked_on(run: RunDoc, now: datetime) -> bool:
    return any(lease["at"] + timedelta(milliseconds=lease["ms"]) > now for lease in run["leases"].values())
