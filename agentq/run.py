"""The birth of a run: the document that an accepted or a refused request becomes, before any worker has seen it.

Pure, but for ``new_run_id``: time comes in as an argument. ``schemas.run`` is the same document later in life.
"""

from __future__ import annotations

import math
import os
import time
from datetime import datetime, timedelta
from typing import Any, NotRequired

from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from agentq.errors import AgentqError, InvalidRequest
from agentq.event import AuditHead, Event, NewEvent, chain, genesis
from agentq.protocol import Notify, Pool, Request

RUN_FORMAT = 1  # version of the run document; raised when old code could not read a new document
START_STEP = "s1"
HINT_GRACE = timedelta(seconds=10)  # how long a published hint may stay unclaimed before the scheduler looks
BACKLOG_LIFE = timedelta(days=30)  # how long a run may wait for its admission where its request says nothing else
DEBOUNCE_S = 5.0
UNKNOWN_COST = 1_000_000  # nano-dollars: what a run is taken to cost before one of its workflow has ended
LEAST_COST = 10_000  # nano-dollars: what a run counts for at least where costs are shared: free models count too


class Registered(TypedDict):
    """The version of a workflow that new runs are pinned to."""

    name: str
    hash: str
    start_pool: Pool
    start_recovery: str
    max_wall_s: float


class Reply(TypedDict):
    """Where a foreign Celery application waits for the answer: its task id in the result backend; ``reply_to`` is its
    queue where that backend is ``rpc://``."""

    task_id: str
    reply_to: NotRequired[str]


def new_run_id() -> str:
    """``r`` + 12 hex digits of epoch milliseconds + 16 random hex digits: unique, and sorts by time of birth."""
    return f"r{int(time.time() * 1000):012x}{os.urandom(8).hex()}"


Backlog = TypedDict(
    "Backlog",
    {
        "class": NotRequired[str],
        "hold": NotRequired[str],
        "front": NotRequired[bool],
        "rank": int,
        "cost": int,
        "at": datetime,
        "wall_s": float,
        "debounce": NotRequired[str],
    },
)
"""Present while a run waits for its admission. ``class``: it may be admitted; instead, ``hold`` says what it waits for:
``time`` (until ``at``) or ``turn`` (of its conversation; ``front``: before others). ``rank``: 0 is the most urgent.
``cost``: estimated, nano-dollars. ``wall_s``: how long it may take once it is admitted."""


class NewRun(TypedDict):
    """The run document as it is inserted. ``schemas.run.RunDoc`` is the same document later in life."""

    _id: str
    v: int
    tenant: str
    user: str | None
    conversation: str | None
    turn: int | None
    workflow: dict[str, str]
    priority: str
    input: str
    metadata: dict[str, Any]
    budget_nano_usd: int | None
    deadline_at: datetime
    idempotency_key: NotRequired[str]
    fingerprint: str
    status: str
    rev: int
    state: dict[str, Any] | None
    steps: dict[str, Any]
    leases: dict[str, Any]
    receipts: dict[str, str]
    events: list[Event]
    audit: AuditHead
    usage: dict[str, int]
    waste: dict[str, int]
    next_due: datetime | None
    created_at: datetime
    ended_at: datetime | None
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    cancel: dict[str, Any] | None
    reply: Reply | None
    flow: str
    pool: Pool
    cost: int
    in_flight: bool
    backlog: NotRequired[Backlog]
    singleton: NotRequired[str]
    notify: NotRequired[Notify]


def new_run(
    request: Request,
    workflow: Registered,
    *,
    run_id: str,
    now: datetime,
    turn: int | None = None,
    hinted: bool = True,
    reply: Reply | None = None,
    waits: bool = False,
    hold: str | None = None,
    cost: int = UNKNOWN_COST,
) -> NewRun:
    """The document of an accepted request: one open step, one audit event, due for the scheduler.

    ``now`` is MongoDB's time. ``turn`` is the request's place in its conversation. ``hinted`` says that a hint will
    be published right after the insert; without one the scheduler dispatches the run at its next look. ``waits``: it
    goes to the backlog and is admitted later (so no hint is published); so does one with a ``hold``, and one that
    lies in the future or is debounced. ``cost``: estimated, nano-dollars.
    """
    fingerprint = request.fingerprint
    accepted: NewEvent = {
        "type": "run.accepted",
        "at_ms": int(now.timestamp() * 1000),
        "step": None,
        "data": {
            "workflow": workflow["name"],
            "workflow_hash": workflow["hash"],
            "tenant": request.tenant,
            "user": request.user,
            "conversation": request.conversation,
            "fingerprint": fingerprint,
        },
    }
    events, head = chain(run_id, genesis(run_id), [accepted])
    doc: NewRun = {
        "_id": run_id,
        "v": RUN_FORMAT,
        "tenant": request.tenant,
        "user": request.user,
        "conversation": request.conversation,
        "turn": turn,
        "workflow": {"name": workflow["name"], "hash": workflow["hash"]},
        "priority": request.priority,
        "input": request.input,
        "metadata": request.metadata,
        "budget_nano_usd": None if request.budget_usd is None else round(request.budget_usd * 1e9),
        "deadline_at": now + timedelta(seconds=min(request.deadline_s or math.inf, workflow["max_wall_s"])),
        "fingerprint": fingerprint,
        "status": "queued",
        "rev": 0,
        "state": None,
        "steps": {START_STEP: open_step("enter", workflow, now, hints=1 if hinted else 0)},
        "leases": {},
        "receipts": {},
        "events": events,
        "audit": head,
        "usage": {},
        "waste": {},
        "next_due": now + HINT_GRACE if hinted else now,
        "created_at": now,
        "ended_at": None,
        "result": None,
        "error": None,
        "cancel": None,
        "reply": reply,
        "flow": request.flow,
        "pool": workflow["start_pool"],
        "cost": max(1, cost),
        "in_flight": True,
    }
    if request.idempotency_key is not None:
        doc["idempotency_key"] = request.idempotency_key
    if request.singleton_key is not None:
        doc["singleton"] = request.singleton_key
    if request.notify:
        doc["notify"] = request.notify
    start = starts_at(request, now)
    if waits or hold is not None or start > now:
        doc["deadline_at"] = ends_at(request, start, start + BACKLOG_LIFE)
        _put_in_backlog(doc, request, start, hold if start <= now else "time", workflow["max_wall_s"])
    else:
        doc["deadline_at"] = min(doc["deadline_at"], ends_at(request, start, doc["deadline_at"]))
    return doc


def starts_at(request: Request, now: datetime) -> datetime:
    """Before when the run must not start."""
    if request.debounce_key is not None:
        return now + timedelta(seconds=request.debounce_s or DEBOUNCE_S)
    if request.delay_s is not None:
        return now + timedelta(seconds=request.delay_s)
    return max(now, request.at or now)


def check_times(request: Request, now: datetime) -> None:
    """Refuse a request that would expire before it may start. Raises ``InvalidRequest`` (``expires_before_start``)."""
    start = starts_at(request, now)
    if request.expires_at is not None and request.expires_at <= start:
        raise InvalidRequest(
            f"The request expires at {request.expires_at:%Y-%m-%d %H:%M:%S} UTC, before it may start "
            f"({start:%Y-%m-%d %H:%M:%S} UTC).",
            code="expires_before_start",
            hint="Give a later 'expires_at', or leave it out.",
            field="expires_at",
        )


def ends_at(request: Request, start: datetime, default: datetime) -> datetime:
    """By when a run that may start at ``start`` must have ended, as far as the request says so."""
    after = None if request.deadline_s is None else start + timedelta(seconds=request.deadline_s)
    return min((moment for moment in (request.expires_at, after) if moment is not None), default=default)


def _put_in_backlog(doc: NewRun, request: Request, start: datetime, hold: str | None, wall_s: float) -> None:
    """It waits: nobody has been told, and nothing is due before its deadline."""
    doc["in_flight"] = False
    doc["steps"][START_STEP]["hints"] = 0
    doc["next_due"] = doc["deadline_at"]
    backlog: Backlog = {"rank": 9 - request.urgency, "cost": doc["cost"], "at": start, "wall_s": wall_s}
    if hold is None:
        backlog["class"] = request.priority
    else:
        backlog["hold"] = hold
    if request.debounce_key is not None:
        backlog["debounce"] = request.debounce_key
    if request.conversation_policy == "interrupt":
        backlog["front"] = True
    doc["backlog"] = backlog


def rejected_run(
    error: AgentqError,
    *,
    run_id: str,
    now: datetime,
    facts: dict[str, Any],
    refused: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The visible record of a request that came by task name and was refused: a run that never started.

    ``facts`` say where it came from and go into the audit trail as well; ``refused`` is what is kept of the request, as
    ``schemas.run.Refused`` has it: its body stays in this document and goes nowhere else.
    """
    refusal: NewEvent = {
        "type": "run.rejected",
        "at_ms": int(now.timestamp() * 1000),
        "step": None,
        "data": {"code": error.code, **facts},
    }
    events, head = chain(run_id, genesis(run_id), [refusal])
    doc: dict[str, Any] = {
        "_id": run_id,
        "v": RUN_FORMAT,
        "tenant": "default",
        "user": None,
        "conversation": None,
        "turn": None,
        "workflow": {},
        "priority": "standard",
        "input": "",
        "metadata": facts,
        "budget_nano_usd": None,
        "deadline_at": now,
        "fingerprint": "",
        "status": "rejected",
        "rev": 0,
        "state": None,
        "steps": {},
        "leases": {},
        "receipts": {},
        "events": events,
        "audit": head,
        "usage": {},
        "waste": {},
        "next_due": now,
        "created_at": now,
        "ended_at": now,
        "result": None,
        "error": error.as_dict(),
        "cancel": None,
        "reply": None,
    }
    if refused is not None:
        doc["refused"] = refused
    return doc


def open_step(kind: str, workflow: Registered, now: datetime, *, hints: int) -> dict[str, Any]:
    """The step that a run is born with: ``enter``; what it really is follows from the workflow when it is claimed.

    ``hints``: how often it was published, or is about to be (0: the scheduler has to tell the first worker).
    """
    return {
        "kind": kind,
        "pool": workflow["start_pool"],
        "attempt": 1,
        "recovery": workflow["start_recovery"],
        "payload": {},
        "hints": hints,
        "hinted_at": now,
    }
