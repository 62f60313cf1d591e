"""What the scheduler does about a run that is due: pure, from the run and the time to the next act."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from agentq.engine.advance import cancel, expire, hint_again, lost, wake
from agentq.engine.commit import due, step_due
from agentq.engine.decision import Decision, paused
from agentq.protocol import Pool
from schemas.run import RunDoc, Step

HEARD_MARGIN = timedelta(seconds=2)  # a step is stored a moment before its hint is published
PATIENCE = (timedelta(seconds=5), timedelta(seconds=60))  # at least and at most until a waiting hint is looked at again


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


def unheard(run: RunDoc, now: datetime) -> set[Pool]:
    """The pools in whose queues hints of the run should have been heard by now."""
    return {
        step["pool"]
        for step_id, step in run["steps"].items()
        if step_id not in run["leases"] and step["hints"] > 0 and "not_before" not in step and not paused(run)
        if (moment := step_due(step, None)) is not None and moment <= now
    }


def look_again(run: RunDoc, now: datetime) -> datetime:
    """When to look next at a run about which nothing is to be done now. The longer a hint has waited, the longer it
    may still wait: looking costs little in all, however long the queue."""
    wanted = due(run, now)
    if wanted > now or not (waiting := unheard(run, now)):
        return wanted
    least, most = PATIENCE
    age = now - min(step["hinted_at"] for step in run["steps"].values() if step["pool"] in waiting)
    return now + min(max(age / 2, least), most)


def _worked_on(run: RunDoc, now: datetime) -> bool:
    return any(lease["at"] + timedelta(milliseconds=lease["ms"]) > now for lease in run["leases"].values())
