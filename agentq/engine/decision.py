"""What comes into the engine (the outcome of a step) and what goes out (a decision about its run)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from agentq.protocol import TERMINAL, NewEvent, Pool
from schemas.chat import Message
from schemas.llm import LlmReply
from schemas.run import Recovery, Result, RunDoc, State, StepKind, Usage


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


Outcome = Replied | Observed | Failed


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


@dataclass(frozen=True, slots=True)
class Decision:
    """The whole effect of one outcome (or of an operator's or the scheduler's act) on a run.

    ``closed`` steps are gone after it, with their leases; ``opened`` are there. ``status`` stays if None.
    """

    events: list[NewEvent]
    state: State | None = None
    usage: Usage | None = None
    closed: tuple[str, ...] = ()
    opened: dict[str, Opening] = field(default_factory=dict)
    status: str | None = None
    result: Result | None = None
    error: dict[str, Any] | None = None
    quarantine: dict[str, Any] | None = None
    waste: dict[str, int] = field(default_factory=dict)

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
