"""What a store promises. Two implementations: MongoDB and, for unit tests and simulation, memory.

Every method may raise ``agentq.errors.Unavailable``; then the outcome is unknown and the call may be repeated as it
is: each is idempotent by its conditions.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from datetime import datetime, timedelta
from enum import Enum
from typing import Any, Literal, NamedTuple, Protocol

from agentq.engine.commit import Commit, Grant
from agentq.event import Event
from agentq.protocol import Hint, Pool
from schemas.catalog import Bundle
from schemas.chat import Message
from schemas.run import RunDoc


class Verdict(Enum):
    """What became of a commit."""

    APPLIED = "applied"
    MOVED = "moved"  # somebody else committed to the run first; the lease still holds: decide again on the fresh run
    FENCED = "fenced"  # the lease is lost (or the run ended): nothing of this attempt may be written


class Held(NamedTuple):
    """A lease as its holder knows it."""

    run_id: str
    step_id: str
    token: str


class Queue(NamedTuple):
    """What is known of a pool's queue: up to which time of publication everything in it has been heard, how long the
    newest message that was heard had waited, and when that was: when the queue was last seen to move."""

    heard: datetime
    wait_ms: int
    moved: datetime


class Letters(NamedTuple):
    """Which dead letters are meant; None means any. ``since``: ended then or later."""

    tenant: str | None = None
    workflow: str | None = None
    code: str | None = None
    since: datetime | None = None


Dead = Literal["quarantined", "rejected"]


class Store(Protocol):
    def now(self) -> datetime:
        """MongoDB's time, by this process's last measurement. For due times; leases use the server's own clock."""

    async def sync_clock(self) -> None:
        """Measure MongoDB's time again."""

    async def claim(self, hint: Hint, grant: Grant) -> RunDoc | None:
        """Take the lease of an open step: the run as it then is; None if there is nothing to do (duplicate, stale
        attempt, leased, waiting, held, cancelled, ended)."""

    async def commit(self, commit: Commit) -> Verdict:
        """One conditional, majority-journaled write; see ``Commit`` and ``Verdict``."""

    async def renew(self, leases: Sequence[Held], ms: int) -> set[Held]:
        """Prolong leases by MongoDB's clock; gives those that are lost."""

    async def load(self, run_id: str, *, journal: bool = False) -> RunDoc | None:
        """The run as it is, None if there is none. Like every other read, without its journal unless asked for."""

    async def record(self, run: RunDoc) -> None:
        """Insert a run that no client handed in (a refused request, a fork); one that is there stays as it is."""

    async def due(self, limit: int) -> list[RunDoc]:
        """Runs the scheduler must look at now, longest due first."""

    async def set_due(self, run: RunDoc, due: datetime | None) -> None:
        """Nothing was due: look again at ``due``. No effect if the run has moved on or a step has been claimed."""

    async def copy_audit(self, events: Sequence[Event]) -> None:
        """Append events to the audit collection; those already there are left as they are."""

    def audit_events(self, run_id: str) -> AsyncIterator[Event]:
        """The run's copied audit events, in order."""

    async def settle(self, run: RunDoc) -> None:
        """A run that has ended, its events copied and its reply stored, needs no more looking after. No
        effect if something has happened to it since."""

    async def pass_turn(self, run: RunDoc) -> None:
        """The run of a conversation has ended: the next turn that waits for it may be admitted. Safe to repeat."""

    async def notify(self, run: RunDoc) -> None:
        """A run has ended: make the deliveries to those it names, each once, durable. Safe to repeat."""

    async def book_waste(self, run_id: str, token: str, waste: dict[str, int]) -> None:
        """Count what was spent in vain under the lease with this ``token`` (or by the provider's job of this id): once,
        so it is safe to repeat."""

    async def history(self, run: RunDoc, tokens: int) -> list[Message]:
        """Earlier turns of the run's conversation, oldest first, the newest that fit into the window."""

    async def bundle(self, bundle_hash: str) -> Bundle | None:
        """A registered version of a workflow."""

    async def register(self, bundles: Sequence[Bundle]) -> None:
        """Make versions known and current for new runs."""

    async def keep_bundle(self, bundle: Bundle) -> None:
        """Make a version known to which single runs are pinned; new runs do not get it."""

    def live(self) -> AsyncIterator[RunDoc]:
        """All admitted runs that have not ended: what must be published again when the broker lost its data."""

    def unended(self) -> AsyncIterator[RunDoc]:
        """All runs that have not ended, those that wait for their admission too, longest due first."""

    async def dead_letters(self, kind: Dead, which: Letters, limit: int) -> list[RunDoc]:
        """Failed runs with a quarantine, or refused requests, that nobody has taken care of yet; newest first."""

    async def current(self) -> list[Bundle]:
        """The versions of the workflows that new runs get."""

    async def alive(self, within: timedelta) -> list[str]:
        """The schedulers and workers that have shown a sign of life so recently."""

    async def queues(self) -> dict[Pool, Queue]:
        """What the living workers report of each pool's queue in their signs of life (``beat``)."""

    async def stopped(self, run_ids: Collection[str]) -> set[str]:
        """Which of these runs somebody asked to cancel, or have ended."""

    async def beat(self, name: str, facts: dict[str, Any]) -> None:
        """A sign of life of a scheduler or a worker, with what it has to tell; see ``Runtime.report`` for workers."""
