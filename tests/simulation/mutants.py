"""Deliberate bugs, put into the real code by patching: the simulation must catch every one of them.

A mutant that survives means that an invariant or a fault is missing, so this is the test of the simulation itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

from agentq.engine import advance, budget, commit, recovery
from agentq.engine.commit import Commit, Grant
from agentq.engine.decision import Decision, Outcome
from agentq.event import Event
from agentq.protocol import Hint
from agentq.runtime import perform, runtime, scheduler
from agentq.runtime.leases import LeaseKeeper
from agentq.runtime.runtime import Runtime
from agentq.runtime.scheduler import Scheduler
from agentq.store import documents
from agentq.store.api import Held, Store, Verdict
from agentq.store.memory import MemoryStore
from agentq.tools import ToolContext
from schemas.catalog import Bundle
from schemas.chat import Message
from schemas.run import RunDoc

Patch = AbstractContextManager[Any]

_claim, _commit, _applies = MemoryStore.claim, MemoryStore.commit, MemoryStore._applies
_copy_audit = MemoryStore.copy_audit


def _applying(change: Callable[[RunDoc, Commit], Commit]) -> Patch:
    """A store that checks the conditions of another commit than the one it was given."""
    return mock.patch.object(
        MemoryStore, "_applies", lambda self, run, planned: _applies(self, run, change(run, planned))
    )


def claim_without_condition() -> Patch:
    """A claim does not mind that somebody holds the step."""

    async def claim(self: MemoryStore, hint: Hint, grant: Grant) -> RunDoc | None:
        if (run := self.runs.get(hint.run_id)) is not None:
            run["leases"].pop(hint.step_id, None)
        return await _claim(self, hint, grant)

    return mock.patch.object(MemoryStore, "claim", claim)


def claim_of_a_stale_attempt() -> Patch:
    """A claim does not mind which attempt the hint speaks of."""

    async def claim(self: MemoryStore, hint: Hint, grant: Grant) -> RunDoc | None:
        run = self.runs.get(hint.run_id)
        if run is not None and hint.step_id in run["steps"]:
            hint = hint._replace(attempt=run["steps"][hint.step_id]["attempt"])
        return await _claim(self, hint, grant)

    return mock.patch.object(MemoryStore, "claim", claim)


def commit_without_fence() -> Patch:
    """A worker's commit does not need its lease: a zombie decides again on the fresh run and goes on."""

    async def unfenced(self: MemoryStore, planned: Commit) -> Verdict:
        return await _commit(self, planned if planned.lapsed else replace(planned, token=None, step_id=None))

    return mock.patch.object(MemoryStore, "commit", unfenced)


def commit_without_rev() -> Patch:
    """A commit does not mind that the run has moved on."""
    return _applying(lambda run, planned: replace(planned, rev=run["rev"]))


def lease_ends_by_the_schedulers_clock() -> Patch:
    """A lease is lost when the scheduler's own clock says so."""
    return _applying(lambda _, planned: replace(planned, lapsed=False))


def hinting_again_takes_the_lease() -> Patch:
    """The scheduler's commit does not mind that the step was claimed meanwhile."""
    return _applying(lambda _, planned: replace(planned, unclaimed=()))


def publish_before_commit() -> Patch:
    """Hints go out before what they announce is written."""
    persist = Runtime._persist

    async def early(self: Runtime, planned: Commit) -> Verdict:
        await self._publish(commit.hints(planned))
        return await persist(self, planned)

    return mock.patch.object(Runtime, "_persist", early)


def unsafe_is_retried() -> Patch:
    """A lost call of a tool that must not be repeated is repeated."""

    def lost(run: RunDoc, step_id: str, max_attempts: int, at_ms: int) -> Decision:
        step: Any = {**run["steps"][step_id], "recovery": "retry"}
        return advance.lost({**run, "steps": {**run["steps"], step_id: step}}, step_id, max_attempts, at_ms)

    return mock.patch.object(recovery, "lost", lost)


def no_scheduler() -> Patch:
    """Nobody looks after what is overdue."""

    async def tick(self: Scheduler) -> int:
        return 0

    return mock.patch.object(Scheduler, "tick", tick)


def hints_are_not_repeated() -> Patch:
    """The scheduler looks after leases and timers, but takes every hint for heard."""
    look = recovery.look

    def deaf(run: RunDoc, now: Any, max_attempts: int, heard: Any) -> Any:
        act = look(run, now, max_attempts, heard)
        return None if act is not None and act.unclaimed and not act.decision.closed else act

    return mock.patch.object(scheduler, "look", deaf)


def settle_before_audit() -> Patch:
    """An ended run is settled first and its audit events are copied then."""

    async def finish(store: Store, reply: Any, run: RunDoc) -> None:
        await store.settle(run)
        await store.copy_audit(run["events"])

    both = mock.patch.multiple(scheduler, finish=finish)
    return _together(both, mock.patch.multiple(runtime, finish=finish))


def audit_copy_is_cut_short() -> Patch:
    """The last event of a copy is left out, and nobody notices."""

    async def copy_audit(self: MemoryStore, events: Sequence[Event]) -> None:
        await _copy_audit(self, events[:-1] or events)

    return mock.patch.object(MemoryStore, "copy_audit", copy_audit)


def receipts_are_ignored() -> Patch:
    """A commit whose answer was lost is taken for one that was refused."""

    def verdict(doc: Any, planned: Commit) -> Verdict:
        held = planned.token is None or documents.holds(doc, planned.step_id or "", planned.token)
        return Verdict.MOVED if held else Verdict.FENCED

    return mock.patch.object(documents, "verdict", verdict)


def conflict_gives_up() -> Patch:
    """A worker that lost the race for the run drops its outcome instead of deciding again."""

    async def impatient(self: MemoryStore, planned: Commit) -> Verdict:
        verdict = await _commit(self, planned)
        return Verdict.FENCED if verdict is Verdict.MOVED else verdict

    return mock.patch.object(MemoryStore, "commit", impatient)


def waste_is_booked_twice() -> Patch:
    book = Runtime._book_waste

    async def twice(self: Runtime, held: Held, outcome: Outcome) -> None:
        await book(self, held, outcome)
        await book(self, held._replace(token=f"{held.token}x"), outcome)

    return mock.patch.object(Runtime, "_book_waste", twice)


def waste_is_not_booked() -> Patch:
    async def never(self: Runtime, held: Held, outcome: Outcome) -> None:
        """What the zombie spent shows nowhere."""

    return mock.patch.object(Runtime, "_book_waste", never)


def zombie_begins_its_effect() -> Patch:
    """A worker does not look whether its lease still holds before it acts."""
    return mock.patch.object(LeaseKeeper, "expired", return_value=False)


def leases_are_not_renewed() -> Patch:
    async def idle(self: LeaseKeeper, store: Store) -> None:
        """Long calls outlive their leases."""

    return mock.patch.object(LeaseKeeper, "renew_due", idle)


def key_changes_with_the_attempt() -> Patch:
    """A keyed tool gets another key at every attempt."""

    def context(**given: Any) -> ToolContext:
        return ToolContext(**{**given, "idempotency_key": f"{given['idempotency_key']}:{given['attempt']}"})

    return mock.patch.object(perform, "ToolContext", context)


def slots_are_not_given_back() -> Patch:
    """What a step took of a worker's room stays taken."""

    def end(self: Runtime, held: Held) -> None:
        self._keeper.drop(held)

    return mock.patch.object(Runtime, "_end", end)


def cancel_is_overheard() -> Patch:
    """A step that commits after a cancellation goes on as if nothing had been asked."""
    real = advance.advance

    def go_on(bundle: Bundle, run: RunDoc, step_id: str, outcome: Outcome, max_attempts: int) -> Decision:
        return real(bundle, {**run, "cancel": None}, step_id, outcome, max_attempts)

    return mock.patch.object(advance, "advance", go_on)


def budget_is_ignored() -> Patch:
    return mock.patch.object(budget, "run_exhausted", return_value=None)


def conversation_backwards() -> Patch:
    """Earlier turns come newest first."""
    window = documents.window

    def backwards(newest_first: Any, tokens: int) -> list[Message]:
        return window(list(newest_first)[::-1], tokens)

    return mock.patch.object(documents, "window", backwards)


def an_attempt_is_not_journaled() -> Patch:
    """The journal takes every outcome for that of a first attempt."""
    real = advance.entry_of

    def forgetful(run: RunDoc, step_id: str, outcome: Any) -> Any:
        return {**real(run, step_id, outcome), "attempt": 1}

    return mock.patch.object(advance, "entry_of", forgetful)


def a_journal_entry_is_lost() -> Patch:
    """The fourth commit of a run leaves its outcome out of the journal."""

    async def lossy(self: MemoryStore, planned: Commit) -> Verdict:
        return await _commit(self, replace(planned, entry=None) if planned.rev == 3 else planned)

    return mock.patch.object(MemoryStore, "commit", lossy)


@contextmanager
def _together(*patches: Patch) -> Iterator[None]:
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


MUTANTS: tuple[Callable[[], Patch], ...] = (
    claim_without_condition,
    claim_of_a_stale_attempt,
    commit_without_fence,
    commit_without_rev,
    lease_ends_by_the_schedulers_clock,
    hinting_again_takes_the_lease,
    publish_before_commit,
    unsafe_is_retried,
    no_scheduler,
    hints_are_not_repeated,
    settle_before_audit,
    audit_copy_is_cut_short,
    receipts_are_ignored,
    conflict_gives_up,
    waste_is_booked_twice,
    waste_is_not_booked,
    zombie_begins_its_effect,
    leases_are_not_renewed,
    key_changes_with_the_attempt,
    slots_are_not_given_back,
    cancel_is_overheard,
    budget_is_ignored,
    conversation_backwards,
    an_attempt_is_not_journaled,
    a_journal_entry_is_lost,
)
