"""What the scheduler does about a run that is due: pure, from the run and the time to the next act."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from agentq.engine.advance import cancel, expire, hint_again, lost, wake
from agentq.engine.commit import step_due
from agentq.engine.decision import Decision
from schemas.run import RunDoc


@dataclass(frozen=True, slots=True)
class Act:
    """A decision with the conditions under which it may be committed."""

    decision: Decision
    step_id: str | None = None
    token: str | None = None  # with ``lapsed``: of the lease that has run out
    lapsed: bool = False
    unclaimed: tuple[str, ...] = ()


def look(run: RunDoc, now: datetime, max_attempts: int) -> Act | None:
    """The next act for a live run, None if nothing is due. Call again on the run as the act leaves it.

    A run is cancelled at once, whoever works on it; past its deadline, a step that is being worked on may finish.
    """
    at_ms = int(now.timestamp() * 1000)
    if run["cancel"] is not None:
        return Act(cancel(run, at_ms))
    if now >= run["deadline_at"] and not _worked_on(run, now):
        return Act(expire(run, at_ms))
    for step_id, step in run["steps"].items():
        lease = run["leases"].get(step_id)
        due = step_due(step, lease)
        if due is None or due > now:
            continue
        if lease is not None:
            return Act(lost(run, step_id, max_attempts, at_ms), step_id, lease["token"], lapsed=True)
        act = wake if "not_before" in step else hint_again
        return Act(act(run, step_id), unclaimed=(step_id,))
    return None


def _worked_on(run: RunDoc, now: datetime) -> bool:
    return any(lease["at"] + timedelta(milliseconds=lease["ms"]) > now for lease in run["leases"].values())
