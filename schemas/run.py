"""The run document: one document, one run. The hot path handles it as the plain dict MongoDB gives; these types (which
Pydantic can validate: ``RUN`` below) say what is in it. ``agentq.run.new_run`` gives birth to it."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal, NotRequired

from pydantic import ConfigDict, TypeAdapter, with_config
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from agentq.event import AuditHead, Event
from agentq.protocol import Notify, Pool
from agentq.run import Backlog, Reply
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
    with ``held`` waits for a person. ``forgiven``: attempts before an operator's act, which count no more.
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
    forgiven: NotRequired[int]


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


@with_config(ConfigDict(extra="forbid"))
class Start(TypedDict):
    """From here a run goes on with this state and these open steps under the bundle ``hash``; before, it was ``was``
    (None: the run begins here, as a fork does)."""

    hash: str
    was: str | None
    state: State | None
    steps: dict[str, Step]


@with_config(ConfigDict(extra="forbid"))
class Entry(TypedDict):
    """One line of a run's journal: all from which ``agentq.engine.replay`` makes its state again.

    An outcome (``reply`` or ``observed``) of a step, with the step's attempt and, in a run's first, when the run was
    entered; or a ``start``; or neither. ``stood_still_ms``: before that, for so long the run was paused or waited for
    a provider's job, and nobody's time ran.
    """

    at_ms: int
    step: NotRequired[str]
    attempt: NotRequired[int]
    forgiven: NotRequired[int]
    entered_ms: NotRequired[int]
    reply: NotRequired[dict[str, Any]]
    observed: NotRequired[dict[str, Any]]
    start: NotRequired[Start]
    stood_still_ms: NotRequired[int]


@with_config(ConfigDict(extra="forbid"))
class Quarantine(TypedDict):
    """What a failed run leaves behind, so that it can be redriven: the step that could not be done (None where a limit
    stopped the run after a step) with its cause, the ``others`` that were open, and which of those were ``leased``:
    they may have taken effect. ``after``: the step whose outcome met the limit. ``dropped``: a person has decided that
    nothing more is to be done."""

    step_id: str | None
    step: Step | None
    code: str
    message: str
    others: dict[str, Step]
    leased: list[str]
    after: NotRequired[str]
    dropped: NotRequired[datetime]


@with_config(ConfigDict(extra="forbid"))
class Pause(TypedDict):
    """Somebody stopped the run: no step of it starts, and its deadline does not come nearer."""

    reason: str
    at: datetime


@with_config(ConfigDict(extra="forbid"))
class Joins(TypedDict):
    """An open step whose model call is not made live: it waits, since ``since``, for a job of the provider's batch
    endpoint. ``endpoint``: which calls may share a job, see ``agentq.engine.joining``; ``job``: the one it is in, if
    any; ``until``: when the job is given up. The step's ``not_before`` is when it is done live whatever happens."""

    step: str
    endpoint: str
    since: datetime
    until: datetime
    job: NotRequired[str]


@with_config(ConfigDict(extra="forbid"))
class Refused(TypedDict):
    """What is kept of a refused request: its size and hash, and its ``body`` (JSON text) where it was JSON of at most
    256 KiB. ``run``: the run that was made of it later; ``dropped``: nothing more is to be done."""

    code: str
    bytes: int
    sha256: str
    body: NotRequired[str]
    run: NotRequired[str]
    dropped: NotRequired[datetime]


class Usage(TypedDict, total=False):
    """What the run took so far; money in nano-dollars (1e-9 USD)."""

    steps: int
    llm_calls: int
    tool_calls: int
    input_tokens: int
    output_tokens: int
    cost_nano_usd: int


class Waste(TypedDict, total=False):
    """What was spent without being used: calls in flight in a dead process (``lost_llm_calls``: the model calls among
    them, of which nobody knows whether they were paid: they are in no cost), calls cut short because nobody wanted
    their answers any more (their cost is an estimate: the input), work of a worker that lost its lease, answers of a
    provider's job that came when the step had gone on without (``late_calls``)."""

    lost_calls: int
    lost_llm_calls: int
    late_calls: int
    cut_calls: int
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
class BatchLine(TypedDict):
    """Which line of which batch a run is."""

    id: str
    line: int
    custom_id: str
    complete_by: NotRequired[datetime]  # its window: the batch's, or the line's own deadline if that comes before


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
    journal: NotRequired[list[Entry]]  # appended to, never rewritten; stores leave it out where it is not asked for
    quarantine: NotRequired[Quarantine]
    pause: NotRequired[Pause]
    joins: NotRequired[Joins]
    forked_from: NotRequired[dict[str, str]]  # {run, step}
    refused: NotRequired[Refused]
    events: list[Event]
    audit: AuditHead
    usage: Usage
    waste: Waste
    late: NotRequired[list[str]]  # leases and jobs of which what was spent in vain has been counted in ``waste``
    next_due: datetime | None
    created_at: datetime
    ended_at: datetime | None
    result: Result | None
    error: dict[str, Any] | None
    cancel: dict[str, Any] | None  # {reason, at}: somebody asked for an end; the next commit or look makes it so
    reply: Reply | None
    batch: NotRequired[BatchLine]
    told_at: NotRequired[datetime]  # the ``ended_at`` of the end that was told to those who are to be told
    tally: NotRequired[bool]  # the bookkeeper has something to count
    booked: NotRequired[dict[str, Any]]  # what it has counted, see agentq.engine.tally
    flow: NotRequired[str]  # in whose line it waits: tenant, or tenant|key
    pool: NotRequired[Pool]  # where it enters
    cost: NotRequired[int]  # nano-dollars, estimated at birth
    in_flight: NotRequired[bool]  # from its admission (or birth, if it need not wait) to its end
    backlog: NotRequired[Backlog]
    admitted_at: NotRequired[datetime]  # when it left the backlog; absent where it never was in it
    singleton: NotRequired[str]  # while it lives, no other run of the tenant has this key
    merged: NotRequired[list[dict[str, str]]]  # requests that joined this turn: {fingerprint, idempotency_key}
    notify: NotRequired[Notify]  # who is told of its end


RUN: TypeAdapter[RunDoc] = TypeAdapter(RunDoc)

__all__ = [
    "RUN", "Acceptance", "AgentVisit", "Entry", "Lease", "Message", "Pause", "Quarantine", "Recovery", "Refused",
    "Result", "RunDoc", "Start", "State", "Step", "StepKind", "ToolCall", "Usage", "Waste",
]  # fmt: skip
