"""What crosses the border between agentq and other back ends: requests, hints, the run document's birth, audit events.

Imports nothing of agentq but its errors, so the client can be shipped alone. Everything here is pure: no I/O, no
environment; time and randomness come in as arguments, except in ``new_run_id``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple, NotRequired, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from agentq.errors import InvalidRequest

Pool = Literal["router", "specialist", "critic", "tools"]
POOLS: tuple[Pool, ...] = ("router", "specialist", "critic", "tools")
INTAKE_QUEUE = "agentq"  # where foreign applications send SUBMIT_TASK and ASK_TASK
SUBMIT_TASK = "agentq.submit"
ASK_TASK = "agentq.ask"

Priority = Literal["interactive", "standard", "batch"]
RunStatus = Literal["queued", "running", "waiting", "paused", "succeeded", "failed", "cancelled", "rejected"]
TERMINAL: frozenset[str] = frozenset({"succeeded", "failed", "cancelled", "rejected"})

MAX_INPUT_BYTES = 256 * 1024
MAX_METADATA_BYTES = 16 * 1024
MAX_DEPTH = 32
RUN_FORMAT = 1  # version of the run document; raised when old code could not read a new document
HINT_GRACE = timedelta(seconds=30)  # how long a published hint may stay unclaimed before the scheduler looks

_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.:@/-]{0,127}$"
# Control characters but tab, line feed and carriage return; lone surrogates cannot be stored as UTF-8.
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


class Hint(NamedTuple):
    """All that a broker message says: this run has this step to do. Losing or repeating one changes only latency."""

    run_id: str
    step_id: str
    attempt: int


def task_name(pool: Pool) -> str:
    """The Celery task that carries hints for ``pool``; its queue has the pool's name."""
    return f"agentq.{pool}"


def hint_message(hints: Sequence[Hint], at: datetime) -> dict[str, Any]:
    """The keyword arguments of the task that carries hints; ``at``: MongoDB's time at publication, which tells how
    long the queue is."""
    return {"hints": hints, "at": int(at.timestamp() * 1000)}


class Request(BaseModel):
    """What a caller asks for. Unknown fields and wrong types are refused; nothing is coerced."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    input: str = Field(description="the text of the request, 1 byte to 256 KiB of UTF-8")
    workflow: str = Field("default", pattern=_NAME)
    tenant: str = Field("default", pattern=_NAME)
    user: str | None = Field(None, pattern=_NAME)
    conversation: str | None = Field(None, pattern=_NAME, description="runs that share messages; unique per tenant")
    priority: Priority = "standard"
    budget_usd: float | None = Field(None, gt=0, le=1_000_000, description="default: the workflow's limit")
    deadline_s: float | None = Field(None, gt=0, le=30 * 86_400, description="seconds from acceptance to the end")
    idempotency_key: str | None = Field(None, min_length=1, max_length=255)
    metadata: dict[str, Any] = Field(default_factory=dict, description="the caller's own notes, JSON, 16 KiB at most")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the body without its idempotency key: two requests are the same if and only if this is."""
        return sha256(canonical_json(self.model_dump(mode="json", exclude={"idempotency_key"})))


def parse_request(body: Any) -> Request:
    """Validate an untrusted request.

    Raises ``InvalidRequest`` with one of the codes ``wrong_type, missing_field, unknown_field, empty_input,
    input_too_large, metadata_too_large, too_deep, control_characters, invalid_value``; never anything else.
    """
    if not isinstance(body, dict):
        raise InvalidRequest(
            f"A request is an object, got {type(body).__name__}.",
            code="wrong_type",
            hint='Send {"input": "...", "workflow": "...", ...}.',
        )
    _refuse_depth(body)
    try:
        request = Request.model_validate(body)
    except ValidationError as error:
        raise _translate(error) from None
    if not request.input.strip():
        raise InvalidRequest("The input is empty.", code="empty_input", hint="Send the text of the request in 'input'.")
    _refuse_unstorable(request.metadata, "metadata")
    _refuse_controls(request.model_dump(exclude_none=True))
    size = len(request.input.encode())
    if size > MAX_INPUT_BYTES:
        raise InvalidRequest(
            f"The input has {size} bytes, {MAX_INPUT_BYTES} are allowed.",
            code="input_too_large",
            hint="Shorten it, or store the document and send a reference.",
        )
    if len(canonical_json(request.metadata).encode()) > MAX_METADATA_BYTES:
        raise InvalidRequest(
            f"The metadata is larger than {MAX_METADATA_BYTES} bytes of JSON.",
            code="metadata_too_large",
            hint="Keep ids in metadata and the data elsewhere.",
        )
    return request


def _refuse_depth(body: Any) -> None:
    level: list[Any] = [body]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise InvalidRequest(f"The request is nested deeper than {MAX_DEPTH} levels.", code="too_deep", hint="Flatten it.")


def _refuse_controls(value: Any, path: str = "") -> None:
    if isinstance(value, str):
        found = _FORBIDDEN.search(value)
        if found:
            raise InvalidRequest(
                f"{path or 'The request'} holds the character U+{ord(found.group()):04X} at position {found.start()}.",
                code="control_characters",
                hint="Remove control characters; tab and line breaks are allowed.",
                field=path,
            )
    elif isinstance(value, dict):
        for key, child in value.items():
            _refuse_controls(str(key), f"{path}.{key!r}" if path else "a key")
            _refuse_controls(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            _refuse_controls(child, f"{path}[{index}]")


def _refuse_unstorable(value: Any, path: str) -> None:
    """Metadata is JSON that MongoDB can hold: objects with text keys, lists, text, booleans, 64-bit integers, finite
    numbers, null."""
    good = value is None or isinstance(value, bool | str)
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        for key, child in value.items():
            _refuse_unstorable(child, f"{path}.{key}")
        good = True
    elif isinstance(value, list):
        for index, child in enumerate(value):
            _refuse_unstorable(child, f"{path}[{index}]")
        good = True
    elif isinstance(value, int):
        good = -(2**63) <= value < 2**63
    elif isinstance(value, float):
        good = math.isfinite(value)
    if not good:
        raise InvalidRequest(
            f"{path} is not JSON that can be stored.",
            code="wrong_type",
            hint="Use objects, lists, strings, 64-bit integers, finite numbers, booleans, null.",
            field=path,
        )


_PYDANTIC_CODES = {"missing": "missing_field", "extra_forbidden": "unknown_field"}


def _translate(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"])[:80]
    kind = first["type"]
    code = _PYDANTIC_CODES.get(kind) or ("wrong_type" if kind.endswith("_type") else "invalid_value")
    if kind == "string_unicode":
        code = "control_characters"
    hints = {
        "missing_field": f"Add '{field}'.",
        "unknown_field": f"Remove '{field}'; known fields are {', '.join(Request.model_fields)}.",
        "wrong_type": f"Send '{field}' with the type the message names.",
        "invalid_value": f"Change '{field}' as the message says.",
        "control_characters": f"Send '{field}' as valid UTF-8.",
    }
    return InvalidRequest(f"{field}: {first['msg']}.", code=code, hint=hints[code], field=field)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces, ASCII only; raises ValueError on NaN and infinities."""
    return _CANONICAL.encode(value)


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)  # made once: half the cost


def sha256(text: str) -> str:
    """Hex SHA-256 of UTF-8 text."""
    return hashlib.sha256(text.encode()).hexdigest()


# -- audit ----------------------------------------------------------------------------------------------------------


class Event(TypedDict):
    """One audit record. ``hash`` covers every other field, ``prev`` is the hash of the record before it."""

    run: str
    seq: int
    type: str
    at_ms: int
    step: str | None
    data: dict[str, Any]
    prev: str
    hash: str


class NewEvent(TypedDict):
    """An event before it has its place in the chain. ``at_ms`` is the time of the thing, in epoch milliseconds."""

    type: str
    at_ms: int
    step: str | None
    data: dict[str, Any]


class AuditHead(TypedDict):
    """The end of a run's chain: the last event's ``seq`` and ``hash``."""

    seq: int
    hash: str


def genesis(run_id: str) -> AuditHead:
    """The head of an empty chain: bound to the run, so no chain can be moved to another."""
    return {"seq": 0, "hash": sha256(f"agentq-audit-v1:{run_id}")}


def event_hash(event: Event) -> str:
    """The hash an untouched event carries."""
    return sha256(canonical_json({key: value for key, value in event.items() if key != "hash"}))


def chain(run_id: str, head: AuditHead, news: list[NewEvent]) -> tuple[list[Event], AuditHead]:
    """Append ``news`` to the chain that ends in ``head``; gives the finished events and the new head."""
    events: list[Event] = []
    seq, prev = head["seq"], head["hash"]
    for new in news:
        seq += 1
        event = {"run": run_id, "seq": seq, **new, "prev": prev}
        prev = event["hash"] = sha256(canonical_json(event))
        events.append(cast("Event", event))
    return events, {"seq": seq, "hash": prev}


# -- the run document -----------------------------------------------------------------------------------------------


class Registered(TypedDict):
    """The version of a workflow that new runs are pinned to."""

    name: str
    hash: str
    start_pool: Pool
    start_recovery: str
    max_wall_s: float


class Reply(TypedDict):
    """Where a foreign Celery application waits for the answer: its task id in the result backend."""

    task_id: str


START_STEP = "s1"


def new_run_id() -> str:
    """``r`` + 12 hex digits of epoch milliseconds + 16 random hex digits: unique, and sorts by time of birth."""
    return f"r{int(time.time() * 1000):012x}{os.urandom(8).hex()}"


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


def new_run(
    request: Request,
    workflow: Registered,
    *,
    run_id: str,
    now: datetime,
    turn: int | None = None,
    hinted: bool = True,
    reply: Reply | None = None,
) -> NewRun:
    """The document of an accepted request: one open step, one audit event, due for the scheduler.

    ``now`` is MongoDB's time. ``turn`` is the request's place in its conversation. ``hinted`` says that a hint will
    be published right after the insert; without one the scheduler dispatches the run at its next look.
    """
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
            "fingerprint": request.fingerprint,
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
        "fingerprint": request.fingerprint,
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
    }
    if request.idempotency_key is not None:
        doc["idempotency_key"] = request.idempotency_key
    return doc


def rejected_run(error: InvalidRequest, *, run_id: str, now: datetime, facts: dict[str, Any]) -> dict[str, Any]:
    """The visible record of a request that came by task name and was refused: a run that never started.

    ``facts`` say where it came from (task id, size, hash); the refused body itself is not kept.
    """
    refusal: NewEvent = {
        "type": "run.rejected",
        "at_ms": int(now.timestamp() * 1000),
        "step": None,
        "data": {"code": error.code, **facts},
    }
    events, head = chain(run_id, genesis(run_id), [refusal])
    return {
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


def utc(epoch_s: float) -> datetime:
    """Aware UTC time, cut to the milliseconds MongoDB keeps."""
    return datetime.fromtimestamp(int(epoch_s * 1000) / 1000, tz=UTC)
