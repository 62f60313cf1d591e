"""Why a live run does not get on, and what a person can do about it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from agentq.engine.decision import paused
from agentq.protocol import TERMINAL
from schemas.run import RunDoc, Step

OVERDUE = timedelta(seconds=60)  # the scheduler looks every second
MANY_TRIES = 3
MANY_HINTS = 4


@dataclass(frozen=True, slots=True)
class Stuck:
    """``why`` in a few words, ``todo`` the command or the thing to look at."""

    why: str
    todo: str


def stuck(run: RunDoc, now: datetime) -> Stuck | None:
    """The first reason that applies, the one for which a person is needed first; None for a run that is well."""
    if run["status"] in TERMINAL:
        return None
    run_id = run["_id"]
    for key, step in sorted(run["steps"].items()):
        if "held" in step:
            return _held(run_id, key, step)
    if paused(run):
        why = f"paused since {run['pause']['at']:%Y-%m-%d %H:%M} UTC: {run['pause']['reason'] or 'no reason given'}"
        return Stuck(why, f"agentq resume {run_id}")
    if run["next_due"] is not None and run["next_due"] + OVERDUE < now:
        late = int((now - run["next_due"]).total_seconds())
        return Stuck(f"overdue for {late} s: no scheduler looks", "start the scheduler; see agentq doctor")
    return _trying(run)


def _held(run_id: str, key: str, step: Step) -> Stuck:
    if step["held"] == "outcome_unknown":
        name = step["payload"].get("name", step["kind"])
        todo = (
            f"did it happen? agentq dlq resolve {run_id} --step {key} --result TEXT; if not: agentq dlq retry {run_id}"
        )
        return Stuck(f"step {key} ({name}) waits for a person: {step['held']}", todo)
    return Stuck(f"step {key} waits for a person: {step['held']}", f"agentq show {run_id}")


def _trying(run: RunDoc) -> Stuck | None:
    for key, step in sorted(run["steps"].items()):
        if step["attempt"] - step.get("forgiven", 0) >= MANY_TRIES:
            return Stuck(
                f"step {key} ({step['kind']}) is at attempt {step['attempt']}", f"what failed: agentq show {run['_id']}"
            )
        if step["hints"] >= MANY_HINTS and key not in run["leases"]:
            return Stuck(
                f"step {key} was announced {step['hints']} times and nobody took it",
                f"does a worker serve the pool {step['pool']}? see agentq doctor",
            )
    return None
