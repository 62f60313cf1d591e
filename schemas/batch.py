"""What is stored about a batch: its document, its bad lines, its ledger; and the ids that tie its runs to it.

A batch is a set of requests submitted together, one a line. Every line that can be read becomes a run whose id follows
from batch and line; every other becomes a bad line. Both are counted once, by the bookkeeper, in the batch's ledger.
"""

from __future__ import annotations

import os
from datetime import datetime
from typing import Any, Literal, NotRequired

from pydantic import ConfigDict, TypeAdapter, with_config
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from agentq.protocol import Notify, Priority
from agentq.run import Registered

BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
ENDED: frozenset[str] = frozenset({"failed", "completed", "expired", "cancelled"})
LineFormat = Literal["agentq", "openai"]
LineEnd = Literal["succeeded", "failed", "cancelled", "expired", "bad"]
LINE_ENDS: tuple[LineEnd, ...] = ("succeeded", "failed", "cancelled", "expired", "bad")
BATCH_FORMAT = 1  # version of the batch document; raised when old code could not read a new document

# Why a line of a batch was cancelled, as its error code says it.
EXPIRED = "batch_expired"
CANCELLED = "batch_cancelled"


@with_config(ConfigDict(extra="forbid"))
class Source(TypedDict):
    """Where the lines came from: a file (``sha256`` of its bytes), or the failed lines of another batch."""

    name: str
    bytes: int
    sha256: str


@with_config(ConfigDict(extra="forbid"))
class Submitted(TypedDict):
    """How far the submission got: the last line that is on disk, and how many were good and bad up to it."""

    line: int
    good: int
    bad: int


@with_config(ConfigDict(extra="forbid"))
class Pause(TypedDict):
    """Why no line is admitted for now: a person asked for it, or the budget has no room for another line."""

    by: Literal["person", "budget"]
    at: datetime


@with_config(ConfigDict(extra="forbid"))
class Estimate(TypedDict):
    """What a line was expected to cost when the batch was submitted, in nano-dollars, from so many earlier runs."""

    runs: int
    p50_nano_usd: int
    p90_nano_usd: int


@with_config(ConfigDict(extra="forbid"))
class BatchDoc(TypedDict):
    """The whole truth about a batch but for its lines.

    ``at`` has the time of every status the batch has had. ``total`` is known once every line is on disk. ``counts``,
    ``usage`` and the money (nano-dollars) are kept by the bookkeeper; ``entries`` is how many lines have ended.
    ``max_line_nano_usd``: the most that a line has cost so far. ``ending``: why the batch is being brought to its
    end, ``swept``: up to which run that has been done.
    """

    _id: str
    v: int
    key: str
    tenant: str
    workflow: str
    priority: Priority
    format: LineFormat
    source: Source
    retry_of: str | None
    workflows: list[Registered]
    status: BatchStatus
    live: bool
    at: dict[BatchStatus, datetime]
    created_at: datetime
    complete_by: datetime | None
    budget_nano_usd: int | None
    estimate: Estimate | None
    paused: Pause | None
    submitted: Submitted
    total: int | None
    entries: int
    counts: dict[LineEnd, int]
    usage: dict[str, int]
    cost_nano_usd: int
    waste_nano_usd: int
    max_line_nano_usd: int
    ending: Literal["expired", "cancelled"] | None
    swept: str
    error: dict[str, Any] | None
    live_only: NotRequired[bool]  # no call of it waits for a provider's batch endpoint
    notify: NotRequired[Notify]  # who is told of its end
    told: NotRequired[bool]  # False until the deliveries to them are durable


@with_config(ConfigDict(extra="forbid"))
class BadLine(TypedDict):
    """A line that could not become a run: ``_id`` is batch and line; ``error`` has code, message and hint."""

    _id: str
    batch: str
    line: int
    custom_id: str | None
    error: dict[str, Any]
    tally: NotRequired[bool]


@with_config(ConfigDict(extra="forbid"))
class LedgerPage(TypedDict):
    """Lines that were counted together: entries ``first`` to ``first + len(lines)`` of the batch, in this order.

    ``_id`` is batch and ``first``, so the pages of a batch are one range. A line is in the ledger once.
    """

    _id: str
    batch: str
    first: int
    lines: list[int]
    at: datetime


BATCH: TypeAdapter[BatchDoc] = TypeAdapter(BatchDoc)


def new_batch_id(epoch_ms: int) -> str:
    """``batch_`` + 12 hex digits of epoch milliseconds + 8 random hex digits."""
    return f"batch_{epoch_ms:012x}{os.urandom(4).hex()}"


def run_id(batch_id: str, line: int) -> str:
    """The id of a line's run: as long as any, sorts by line, and shares the batch's prefix."""
    return f"r{batch_id.removeprefix('batch_')}{line:08x}"


def run_range(batch_id: str) -> tuple[str, str]:
    """The runs of a batch have ids from the first to before the second."""
    prefix = f"r{batch_id.removeprefix('batch_')}"
    return prefix, f"{prefix}g"


def flow(tenant: str, batch_id: str) -> str:
    """The line in which a batch's runs wait for their admission: one of its own, so closing it costs nothing."""
    return f"{tenant}|{batch_id}"


def bad_line_id(batch_id: str, line: int) -> str:
    """Sorts by line."""
    return f"{batch_id}:{line:010d}"


def page_id(batch_id: str, first: int) -> str:
    """Sorts by the place in the ledger."""
    return f"{batch_id}:{first:010d}"
