"""The run document: one document, one run. The hot path handles it as the plain dict MongoDB gives; these types (which
Pydantic can validate: ``RUN`` below) say what is in it. ``agentq.protocol.new_run`` gives birth to it."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal, NotRequired

from pydantic import ConfigDict, TypeAdapter, with_config
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from agentq.protocol import AuditHead, Event, Pool, Reply
from schemas.chat import Message, ToolCall

StepKind = Literal["enter", "route", "turn", "tool", "critique"]
Recovery = Literal["retry", "keyed", "unsafe"]
Acceptance = Literal["critic", "revisions_exhausted", "unreviewed", "budget"]


@with_config(ConfigDict(extra="forbid"))
class Step(TypedDict):
    """An open step: something that is still to do. Closed steps live on in the audit events and in ``receipts``.

    ``recovery`` says what a lost lease means: ``retry`` (no lasting effect, or a model call within the attempt
    budget), ``keyed`` (the callee honours our key), ``unsafe`` (wait for a person). ``hints`` counts how often the
    step was published (0: not yet), ``hinted_at`` when last. A step with ``not_before`` waits for the scheduler; one
    with ``held`` waits for a person.
    """

    kind: StepKind
    pool: Pool
    node: NotRequired[str]
    attempt: int
    recovery: Recovery
    payload: dict[str, Any]
    hints: int
    hinted_at: datetime
    not_before: NotRequired[datetime]
    held: NotRequired[str]


@with_config(ConfigDict(extra="forbid"))
class Lease(TypedDict):
    """Who works on a step: valid for ``ms`` after ``at`` (MongoDB's clock). ``token`` fences every write."""

    token: str
    worker: str
    ms: int
    at: datetime


@with_config(ConfigDict(extra="forbid"))
class AgentVisit(TypedDict):
    """An agent node's memory: what was said and done since the run entered it, and what that took."""

    agent: str
    transcript: list[Message]
    calls: dict[str, str]  # open tool steps: step id -> tool call id
    results: dict[str, str]  # tool call id -> observation, until all calls of the turn are answered
    turns: int
    tool_calls: int
    tokens: int
    cost_nano_usd: int
    since_ms: int


@with_config(ConfigDict(extra="forbid"))
class State(TypedDict):
    """The engine's memory of a run."""

    node: str
    next_step: int
    history: list[Message]
    route: str | None
    unusable: str | None  # a model's answer that the node could not use; the next step is the one re-ask
    visits: dict[str, AgentVisit]
    lookups: list[dict[str, Any]]  # results of tool nodes: {id, name, arguments, content}
    revisions: int
    problems: list[str]
    draft: str | None
    acceptance: Acceptance  # how the draft was accepted so far
    agent: str | None
    tools: list[str]  # names of the tools called, in order of completion


class Usage(TypedDict, total=False):
    """What the run took so far; money in nano-dollars (1e-9 USD)."""

    steps: int
    llm_calls: int
    tool_calls: int
    input_tokens: int
    output_tokens: int
    cost_nano_usd: int


class Waste(TypedDict, total=False):
    """What was spent without being used: calls in flight in a dead process, work of a worker that lost its lease."""

    lost_calls: int
    llm_calls: int
    cost_nano_usd: int


@with_config(ConfigDict(extra="forbid"))
class Result(TypedDict):
    """The answer and how it came about."""

    answer: str
    agent: str | None
    acceptance: Acceptance
    reason: NotRequired[str]  # which budget ended the run
    citations: list[str]
    tools: list[str]
    revisions: int
    problems: list[str]


@with_config(ConfigDict(extra="forbid"))
class RunDoc(TypedDict):
    """The whole truth about a run."""

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
    state: State | None
    steps: dict[str, Step]
    leases: dict[str, Lease]
    receipts: dict[str, str]
    quarantine: NotRequired[dict[str, Any]]
    events: list[Event]
    audit: AuditHead
    usage: Usage
    waste: Waste
    next_due: datetime | None
    created_at: datetime
    ended_at: datetime | None
    result: Result | None
    error: dict[str, Any] | None
    cancel: dict[str, Any] | None  # {reason, at}: somebody asked for an end; the next commit or look makes it so
    reply: Reply | None


RUN: TypeAdapter[RunDoc] = TypeAdapter(RunDoc)

__all__ = [
    "RUN", "Acceptance", "AgentVisit", "Lease", "Message", "Recovery", "Result", "RunDoc", "State", "Step",
    "StepKind", "ToolCall", "Usage", "Waste",
]  # fmt: skip
