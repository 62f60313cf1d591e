"""What comes into the engine (the outcome of a step) and what goes out (a decision about its run)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from agentq.event import NewEvent
from agentq.protocol import TERMINAL, Pool
from schemas.chat import Message
from schemas.llm import LlmReply
from schemas.run import AgentVisit, Entry, Quarantine, Recovery, Result, RunDoc, State, Step, StepKind, Usage


@dataclass(frozen=True, slots=True)
class Replied:
    """A model answered. ``at_ms``: epoch milliseconds, on the worker's clock, as in every outcome."""

    reply: LlmReply
    at_ms: int


@dataclass(frozen=True, slots=True)
class Observed:
    """A tool call ended, well or not: ``content`` is what the model will see.

    ``unknown``: the call may or may not have taken effect (time-out or crash of a tool that changes something).
    """

    ok: bool
    code: str
    content: str
    unknown: bool
    latency_ms: int
    at_ms: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The effect failed for a reason outside the run: a provider's error. ``retry_after_s``: the provider's wish."""

    code: str
    message: str
    retryable: bool
    retry_after_s: float | None
    at_ms: int


@dataclass(frozen=True, slots=True)
class Deferred:
    """The call is not made now: it may be joined, ``until`` then, into a job of the provider's batch ``endpoint``."""

    endpoint: str
    until: datetime
    at_ms: int


Outcome = Replied | Observed | Failed | Deferred


@dataclass(frozen=True, slots=True)
class Opening:
    """A step to open, or to open again. ``delay_s`` > 0: not before so many seconds from now."""

    kind: StepKind
    pool: Pool
    node: str
    recovery: Recovery
    payload: dict[str, Any] = field(default_factory=dict)
    attempt: int = 1
    delay_s: float = 0.0
    held: str | None = None
    hints: int = 1
    forgiven: int = 0


@dataclass(frozen=True, slots=True)
class Decision:
    """The whole effect of one outcome (or of an operator's or the scheduler's act) on a run.

    ``closed`` steps are gone after it, with their leases; ``opened`` are there. ``status`` stays if None. ``entry`` is
    appended to the run's journal. An operator's act sets other ``fields`` of the run and ``drops`` optional ones. The
    decision holds only while the steps in ``unclaimed`` have no lease.
    """

    events: list[NewEvent]
    state: State | None = None
    usage: Usage | None = None
    closed: tuple[str, ...] = ()
    opened: dict[str, Opening] = field(default_factory=dict)
    status: str | None = None
    result: Result | None = None
    error: dict[str, Any] | None = None
    quarantine: Quarantine | None = None
    waste: dict[str, int] = field(default_factory=dict)
    entry: Entry | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    drops: tuple[str, ...] = ()
    unclaimed: tuple[str, ...] = ()

    @property
    def ends(self) -> bool:
        return self.status in TERMINAL


def event(kind: str, at_ms: int, step: str | None = None, **data: Any) -> NewEvent:
    """An audit event; its place in the chain is given at commit."""
    return {"type": kind, "at_ms": at_ms, "step": step, "data": data}


def fresh_state(history: list[Message]) -> State:
    """The memory of a run that has done nothing yet."""
    return {
        "node": "",
        "next_step": 2,
        "history": history,
        "route": None,
        "unusable": None,
        "visits": {},
        "lookups": [],
        "revisions": 0,
        "problems": [],
        "draft": None,
        "acceptance": "unreviewed",
        "agent": None,
        "tools": [],
    }


def state_of(run: RunDoc) -> State:
    """The state of a run that has been entered."""
    state = run["state"]
    assert state is not None, "the run has not been entered"
    return state


def shifted(state: State, ms: int) -> State:
    """``state`` with the agents' clocks set ``ms`` later: time in which the run stood still is not theirs."""
    visits: dict[str, AgentVisit] = {
        name: {**visit, "since_ms": visit["since_ms"] + ms} for name, visit in state["visits"].items()
    }
    return {**state, "visits": visits}


def paused(run: RunDoc) -> bool:
    """Has somebody stopped the run? Then no step of it may start; what is being worked on is finished."""
    return "pause" in run


def tries(step: Step) -> int:
    """The number of the try at a step that counts against its limit: an operator's act forgives those before it."""
    return step["attempt"] - step.get("forgiven", 0)


def entry_of(run: RunDoc, step_id: str, outcome: Replied | Observed) -> Entry:
    """What the journal keeps of an outcome; ``outcome_of`` gives it back."""
    step = run["steps"][step_id]
    entry: Entry = {"at_ms": outcome.at_ms, "step": step_id, "attempt": step["attempt"]}
    if "forgiven" in step:
        entry["forgiven"] = step["forgiven"]
    if not run["usage"]:  # the run's first: what it was entered with is nowhere else
        visit = state_of(run)["visits"].get(step.get("node", ""))
        entry["entered_ms"] = visit["since_ms"] if visit else outcome.at_ms
    if isinstance(outcome, Observed):
        entry["observed"] = {
            "ok": outcome.ok, "code": outcome.code, "content": outcome.content, "unknown": outcome.unknown,
            "latency_ms": outcome.latency_ms,
        }  # fmt: skip
        return entry
    reply = outcome.reply
    entry["reply"] = {
        "text": reply.text, "tool_calls": reply.tool_calls, "finish": reply.finish, "usage": reply.usage,
        "cost_nano_usd": reply.cost_nano_usd, "model": reply.model, "latency_ms": reply.latency_ms,
        "provider_id": reply.provider_id,
    }  # fmt: skip
    return entry


def outcome_of(entry: Entry) -> Replied | Observed:
    """The outcome that an entry of the journal was made of."""
    if "observed" in entry:
        return Observed(**entry["observed"], at_ms=entry["at_ms"])
    return Replied(LlmReply(**entry["reply"]), entry["at_ms"])
