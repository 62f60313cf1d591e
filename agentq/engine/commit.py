"""From a decision to a commit: the run as it will be, with its place in the audit chain and its due time. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, cast

from agentq.engine import joining
from agentq.engine.decision import Decision, Opening, paused
from agentq.event import Event, chain
from agentq.protocol import TERMINAL, Hint, Pool
from agentq.run import HINT_GRACE
from schemas.run import Entry, Lease, RunDoc, Step, Waste

PAUSED_LOOK = timedelta(hours=1)  # how often the scheduler looks at a paused run on which nobody works


@dataclass(frozen=True, slots=True)
class Grant:
    """A lease to be taken in the commit itself: the committing process goes on with the step in place."""

    token: str
    worker: str
    ms: int


@dataclass(frozen=True, slots=True)
class Commit:
    """One conditional write. It applies if and only if the run's ``rev`` is still ``rev`` and, where given, the lease
    of ``step_id`` still carries ``token`` (``lapsed``: and has run out by MongoDB's clock), and the steps in
    ``unclaimed`` have no lease.

    ``after`` is the run as the write leaves it, except for lease times, which MongoDB's clock sets, and without its
    journal, to which ``entry`` is appended.
    """

    run_id: str
    rev: int
    after: RunDoc
    events: list[Event]
    closed: tuple[str, ...]
    opened: dict[str, Step]
    grants: dict[str, Grant]
    step_id: str | None = None
    token: str | None = None
    lapsed: bool = False
    unclaimed: tuple[str, ...] = ()
    state_changes: dict[str, Any] | None = None  # fields of the state that differ; None: the state is written whole
    waste: Mapping[str, int] = field(default_factory=dict)  # added up by the server: others may count at the same time
    trimmed: bool = False  # ``after["events"]`` replaces the stored ones: the others are in the audit collection
    entry: Entry | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)  # what an operator's act sets besides, and drops
    drops: tuple[str, ...] = ()


def plan(
    run: RunDoc,
    decision: Decision,
    *,
    now: datetime,
    step_id: str | None = None,
    token: str | None = None,
    lapsed: bool = False,
    unclaimed: tuple[str, ...] = (),
    grants: Mapping[str, Grant] | None = None,
    copied: int = 0,
) -> Commit:
    """Apply ``decision`` to ``run``. ``now``: MongoDB's time; ``copied``: the last audit event that is copied out."""
    events, head = chain(run["_id"], run["audit"], decision.events)
    opened = {key: open_step(opening, now) for key, opening in decision.opened.items()}
    if paused(run) and "pause" not in decision.drops:  # nobody is told before the run is resumed
        opened = {key: {**step, "hints": 0} for key, step in opened.items()}
    grants = dict(grants or {})
    gone = {*decision.closed, *opened}
    steps = {key: step for key, step in run["steps"].items() if key not in gone} | opened
    leases = {key: lease for key, lease in run["leases"].items() if key not in gone}
    for key, grant in grants.items():
        leases[key] = {"token": grant.token, "worker": grant.worker, "ms": grant.ms, "at": now}
    kept = [event for event in run["events"] if event["seq"] > copied]
    after: RunDoc = {
        **run,
        "rev": run["rev"] + 1,
        "events": [*kept, *events],
        "audit": head,
        "steps": steps,
        "leases": leases,
    }
    if decision.state is not None:
        after["state"] = decision.state
    if decision.usage is not None:
        after["usage"] = decision.usage
    _apply_fields(after, decision.fields, (*decision.drops, "journal"))
    after["status"] = _status(decision.status or run["status"], after)
    if decision.waste:
        after["waste"] = cast(Waste, add(cast(dict[str, int], run["waste"]), decision.waste))
    if decision.quarantine is not None:
        after["quarantine"] = decision.quarantine
    if token is not None and step_id is not None and not lapsed:
        after["receipts"] = {**run["receipts"], step_id: token}
    if decision.ends:
        after["result"], after["error"], after["ended_at"] = decision.result, decision.error, now
        if "batch" in run:
            after["tally"] = True  # the bookkeeper has a line to count
    flight, left = _flight(run, decision)
    _apply_fields(after, flight, left)
    after["next_due"] = _next_due(run["next_due"], after, now)
    return Commit(
        run["_id"],
        run["rev"],
        after,
        events,
        decision.closed,
        opened,
        grants,
        step_id,
        token,
        lapsed,
        (*unclaimed, *decision.unclaimed),
        state_changes=_state_changes(run, after),
        waste=decision.waste,
        trimmed=len(kept) < len(run["events"]),
        entry=decision.entry,
        fields={**decision.fields, **flight},
        drops=(*decision.drops, *left),
    )


def _apply_fields(after: RunDoc, fields: Mapping[str, Any], drops: Iterable[str]) -> None:
    loose = cast("dict[str, Any]", after)
    loose |= fields
    for name in drops:
        loose.pop(name, None)


def _flight(run: RunDoc, decision: Decision) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What the admission must see in the same commit, as fields set and dropped: a run that ends is in flight no more
    and waits for nothing; one that is taken up again after its end is in flight again."""
    if decision.ends:
        return {"in_flight": False}, tuple(name for name in ("backlog", "joins", "singleton") if name in run)
    if run["status"] in TERMINAL and decision.status is not None and "in_flight" in run:
        return {"in_flight": True}, ()
    return {}, ()


def _state_changes(run: RunDoc, after: RunDoc) -> dict[str, Any] | None:
    """What a commit must write of the state. Until the first commit of a step, what we know of it is nowhere stored."""
    before: Mapping[str, Any] | None = cast("Mapping[str, Any] | None", run["state"])
    now: Mapping[str, Any] | None = cast("Mapping[str, Any] | None", after["state"])
    if before is None or now is None or not run["receipts"]:
        return None
    return {name: value for name, value in now.items() if name not in before or before[name] is not value}


def _status(status: str, after: RunDoc) -> str:
    """A live run that was paused stays so until somebody resumes it; one whose every open step is held, or is deferred
    to a provider's job, waits: it keeps nobody from a place."""
    if status in ("queued", "running", "waiting", "paused") and paused(after):
        return "paused"
    if status in ("running", "waiting"):
        rests = [("held" in step or joining.waits(after, key)) for key, step in after["steps"].items()]
        return "waiting" if rests and all(rests) else "running"
    return status


def open_step(opening: Opening, now: datetime) -> Step:
    """The step that an opening makes."""
    step: Step = {
        "kind": opening.kind,
        "pool": opening.pool,
        "attempt": opening.attempt,
        "recovery": opening.recovery,
        "payload": opening.payload,
        "hints": opening.hints,
        "hinted_at": now,
    }
    if opening.held is not None:
        step["held"] = opening.held
    elif opening.delay_s > 0:
        step["not_before"] = now + timedelta(seconds=opening.delay_s)
    if opening.node:
        step["node"] = opening.node
    if opening.forgiven:
        step["forgiven"] = opening.forgiven
    return step


def add(total: dict[str, int], more: Mapping[str, int]) -> dict[str, int]:
    """Sum of two counters."""
    return {key: total.get(key, 0) + more.get(key, 0) for key in {*total, *more}}


def step_due(step: Step, lease: Lease | None) -> datetime | None:
    """When the scheduler must look at an open step: its lease is out, its time has come, its hint went unheard."""
    if "held" in step:
        return None
    if lease is not None:
        return lease["at"] + timedelta(milliseconds=lease["ms"])
    if "not_before" in step:
        return step["not_before"]
    if step["hints"] == 0:  # nobody has been told yet
        return step["hinted_at"]
    return step["hinted_at"] + HINT_GRACE * 2.0 ** min(max(step["hints"] - 2, 0), 7)


def due(run: RunDoc, now: datetime) -> datetime:
    """When the scheduler must look at a run next; never later than something is due. A run that has ended is due
    once more, until its audit events are copied out and its reply is stored."""
    if not run["steps"]:
        return now + HINT_GRACE
    if paused(run):
        ends = [step_due(step, run["leases"][key]) for key, step in run["steps"].items() if key in run["leases"]]
        return min([now + PAUSED_LOOK, *(moment for moment in ends if moment is not None)])
    if "backlog" in run:  # nobody is told before it is admitted
        return run["deadline_at"]
    dues = [step_due(step, run["leases"].get(key)) for key, step in run["steps"].items()]
    return min([run["deadline_at"], *(moment for moment in dues if moment is not None)])


def _next_due(before: datetime | None, run: RunDoc, now: datetime) -> datetime:
    """Keeps the stored value while it is a valid lower bound: an unchanged index entry costs nothing.

    A step we know as unclaimed may have been claimed since we read the run, so its back-off does not count here.
    """
    wanted = due(run, now)
    if any(
        key not in run["leases"] and "not_before" not in step and "held" not in step
        for key, step in run["steps"].items()
    ):
        wanted = min(wanted, now + HINT_GRACE)
    if before is not None and now < before <= wanted:
        return before
    return wanted


def hints(commit: Commit) -> list[tuple[Pool, Hint]]:
    """What to publish after the commit: opened steps that may be claimed at once and that nobody holds."""
    if paused(commit.after) or "backlog" in commit.after:
        return []
    return [
        (step["pool"], Hint(commit.run_id, key, step["attempt"]))
        for key, step in commit.opened.items()
        if key not in commit.grants and "not_before" not in step and "held" not in step
    ]
