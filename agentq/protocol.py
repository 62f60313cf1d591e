"""What crosses the border between agentq and other back ends: requests, and the names of pools, queues and tasks.

Pure: no I/O, no environment, no clock.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Annotated, Any, Literal, NamedTuple, NotRequired
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

from agentq.canonical import canonical_json, sha256
from agentq.errors import InvalidRequest

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


_A_TIME = "2026-12-01T09:00:00+01:00"


def _moment(value: Any) -> Any:
    """A time as ISO 8601 text becomes one; it must say its offset from UTC."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise ValueError(f"that is no time, write one as {_A_TIME}") from None
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError(f"a time needs its offset from UTC, as in {_A_TIME}")
        try:
            value = value.astimezone(UTC)
        except OverflowError:
            raise ValueError(f"UTC has no such year, write a time as {_A_TIME}") from None
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
    if _is_link_local(parts.hostname):
        raise ValueError("that address is link-local, such are never called")
    if "@" in parts.netloc or parts.fragment:
        raise ValueError("no user, password or fragment in it, please")
    return url


def _is_link_local(host: str) -> bool:
    """Is it an address of this kind (that of metadata services)? Of others only the operator's settings can tell."""
    try:
        return ip_address(host).is_link_local
    except ValueError:
        return False


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
            raise ValueError("'at' and 'delay_s' exclude each other")
        if self.debounce_s is not None and self.debounce_key is None:
            raise ValueError("'debounce_s' needs a 'debounce_key'")
        if self.debounce_key is not None and (self.conversation or self.at or self.delay_s or self.singleton_key):
            raise ValueError("'debounce_key' goes with none of 'conversation', 'at', 'delay_s', 'singleton_key'")
        if self.singleton_key is not None and self.conversation is not None:
            raise ValueError("'singleton_key' and 'conversation' exclude each other")
        if self.notify and self.conversation_policy == "merge":
            raise ValueError(
                "'webhook' and 'follow_up' do not go with 'conversation_policy' merge: that run is another's"
            )
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
    if not first["loc"]:  # fields that do not fit together
        return InvalidRequest(f"{said}.", code=code, hint="Change the request as the message says.", field=field)
    return InvalidRequest(f"{field}: {said}.", code=code, hint=hints[code], field=field)
