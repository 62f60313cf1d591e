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
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, cast
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
    with_config,
)
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from agentq.errors import AgentqError, InvalidRequest

Pool = Literal["router", "specialist", "critic", "tools"]
POOLS: tuple[Pool, ...] = ("router", "specialist", "critic", "tools")
INTAKE_QUEUE = "agentq"  # where foreign applications send SUBMIT_TASK and ASK_TASK
SUBMIT_TASK = "agentq.submit"
ASK_TASK = "agentq.ask"

Priority = Literal["interactive", "standard", "batch"]
ConversationPolicy = Literal["enqueue", "reject", "interrupt", "merge"]
RunStatus = Literal["queued", "running", "waiting", "paused", "succeeded", "failed", "cancelled", "rejected"]
TERMINAL: frozenset[str] = frozenset({"succeeded", "failed", "cancelled", "rejected"})

MAX_INPUT_BYTES = 256 * 1024
MAX_METADATA_BYTES = 16 * 1024
MAX_DEPTH = 32
RUN_FORMAT = 1  # version of the run document; raised when old code could not read a new document
HINT_GRACE = timedelta(seconds=30)  # how long a published hint may stay unclaimed before the scheduler looks
BACKLOG_LIFE = timedelta(days=30)  # how long a run may wait for its admission where its request says nothing else
UNKNOWN_COST = 1_000_000  # nano-dollars: what a run is taken to cost before one of its workflow has ended
LEAST_COST = 10_000  # nano-dollars: what a run counts for at least where costs are shared: free models count too

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


def _moment(value: Any) -> Any:
    """A time as ISO 8601 text becomes one; it must say its offset from UTC."""
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError("a time needs its offset from UTC, as in 2026-12-01T09:00:00+01:00")
        value = value.astimezone(UTC)
        return value.replace(microsecond=value.microsecond // 1000 * 1000)
    return value


Moment = Annotated[datetime, BeforeValidator(_moment)]

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_KEPT_QUEUES = ("agentq.", "celeryev", "unacked")  # ours and, on Redis, the transport's own keys begin like this


def _webhook_url(url: str) -> str:
    """An address that may be called. What its host's name leads to is judged when it is called."""
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("a URL has printable ASCII characters only")
    parts = urlsplit(url)  # raises ValueError itself for brackets and ports that are none
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOOPBACK):
        raise ValueError("it should begin with https:// (http:// for this machine only)")
    if not parts.hostname or parts.port == 0:
        raise ValueError("it names no host and port")
    if "@" in parts.netloc or parts.fragment:
        raise ValueError("no user, password or fragment in it, please")
    return url


def _callers_queue(name: str) -> str:
    if name in (*POOLS, INTAKE_QUEUE) or name.startswith(_KEPT_QUEUES) or "pidbox" in name:
        raise ValueError("that queue is not the caller's own")
    return name


@with_config(ConfigDict(extra="forbid", strict=True))
class Webhook(TypedDict):
    """Who is told by HTTP when the run has ended. ``secret_id``: which of the tenant's secrets signs it; default
    ``default``. ``url``: https; http for this machine, where its operator allows that."""

    url: Annotated[str, Field(max_length=2048), AfterValidator(_webhook_url)]
    secret_id: NotRequired[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]]


@with_config(ConfigDict(extra="forbid", strict=True))
class FollowUp(TypedDict):
    """The Celery task, by name, that is sent to the caller's own ``queue`` when the run has ended."""

    task: Annotated[str, Field(pattern=_NAME)]
    queue: Annotated[str, Field(pattern=_NAME), AfterValidator(_callers_queue)]


class Notify(TypedDict):
    """Who is to be told of a run's end."""

    webhook: NotRequired[Webhook]
    follow_up: NotRequired[FollowUp]


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
    key: str | None = Field(None, pattern=_NAME, description="which of the tenant's keys asks; it may have caps")
    urgency: int = Field(5, ge=0, le=9, description="within the priority class and the tenant, 9 goes first")
    conversation_policy: ConversationPolicy = Field(
        "enqueue", description="if a run of the conversation is under way: wait for it, refuse, cancel it, or join the "
        "next turn that still waits",
    )  # fmt: skip
    at: Moment | None = Field(None, description="not before this time (ISO 8601 with its offset)")
    delay_s: float | None = Field(None, ge=0, le=366 * 86_400, description="not before so many seconds from now")
    expires_at: Moment | None = Field(None, description="the run must have ended by then (ISO 8601 with its offset)")
    debounce_key: str | None = Field(None, pattern=_NAME, description="a later request with it replaces a waiting one")
    debounce_s: float | None = Field(None, gt=0, le=86_400, description="how long no other one must come; default 5")
    singleton_key: str | None = Field(None, pattern=_NAME, description="one run at a time; another gets that one")
    webhook: Webhook | None = Field(None, description="told by HTTP when the run has ended")
    follow_up: FollowUp | None = Field(None, description="a Celery task, sent when the run has ended")

    @model_validator(mode="after")
    def _fits_together(self) -> Request:
        if self.at is not None and self.delay_s is not None:
            raise ValueError("at and delay_s exclude each other")
        if self.debounce_s is not None and self.debounce_key is None:
            raise ValueError("debounce_s needs a debounce_key")
        if self.debounce_key is not None and (self.conversation or self.at or self.delay_s or self.singleton_key):
            raise ValueError("debounce_key goes with none of conversation, at, delay_s, singleton_key")
        if self.singleton_key is not None and self.conversation is not None:
            raise ValueError("singleton_key and conversation exclude each other")
        if self.notify and self.conversation_policy == "merge":
            raise ValueError("webhook and follow_up do not go with conversation_policy merge: that run is another's")
        return self

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the body without its idempotency key: two requests are the same if and only if this is.

        Younger fields count only where they say something, so that a request is the same over versions of agentq.
        """
        body = self.model_dump(mode="json", exclude={"idempotency_key"})
        told = {name: value for name, value in body.items() if name not in _YOUNGER or value != _YOUNGER[name]}
        return sha256(canonical_json(told))

    @property
    def notify(self) -> Notify:
        """Who is to be told of the end; empty if nobody is."""
        told: Notify = {}
        if self.webhook is not None:
            told["webhook"] = self.webhook
        if self.follow_up is not None:
            told["follow_up"] = self.follow_up
        return told

    @property
    def merges(self) -> bool:
        """Does it join the next turn of its conversation that still waits?"""
        return self.conversation is not None and self.conversation_policy == "merge"

    @property
    def flow(self) -> str:
        """In whose line the run waits: the tenant's, or that of one key of it."""
        return self.tenant if self.key is None else f"{self.tenant}|{self.key}"


_YOUNGER = {
    name: Request.model_fields[name].default
    for name in (
        "key", "urgency", "conversation_policy", "at", "delay_s", "expires_at", "debounce_key", "debounce_s",
        "singleton_key", "webhook", "follow_up",
    )
}  # fmt: skip


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
    field = ".".join(str(part) for part in first["loc"])[:80] or "request"
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
    said = first["msg"].removeprefix("Value error, ")
    return InvalidRequest(f"{field}: {said}.", code=code, hint=hints[code], field=field)


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
    """Where a foreign Celery application waits for the answer: its task id in the result backend; ``reply_to`` is its
    queue where that backend is ``rpc://``."""

    task_id: str
    reply_to: NotRequired[str]


START_STEP = "s1"


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


DEBOUNCE_S = 5.0


def starts_at(request: Request, now: datetime) -> datetime:
    """Before when the run must not start."""
    if request.debounce_key is not None:
        return now + timedelta(seconds=request.debounce_s or DEBOUNCE_S)
    if request.delay_s is not None:
        return now + timedelta(seconds=request.delay_s)
    return max(now, request.at or now)


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


def utc(epoch_s: float) -> datetime:
    """Aware UTC time, cut to the milliseconds MongoDB keeps."""
    return datetime.fromtimestamp(int(epoch_s * 1000) / 1000, tz=UTC)
