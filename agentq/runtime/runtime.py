"""A worker's engine room: takes hints, works off their steps by the durability protocol, goes on in place if it can."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from agentq.engine import advance, commit
from agentq.engine.commit import Commit, Grant
from agentq.engine.decision import Decision, Deferred, Failed, Outcome, Replied, paused
from agentq.engine.effects import ToolCallEffect, effect
from agentq.engine.joining import deferral
from agentq.errors import AgentqError, Unavailable
from agentq.llm.types import Llm, LlmCall
from agentq.llm.wire import estimate_input
from agentq.place import place
from agentq.protocol import Hint, Pool
from agentq.runtime.bundles import Bundles
from agentq.runtime.hearing import Hearing
from agentq.runtime.leases import LeaseKeeper
from agentq.runtime.perform import perform
from agentq.store.api import Held, Store, Verdict
from agentq.tools import Toolbox
from schemas.catalog import Bundle
from schemas.chat import Message
from schemas.run import RunDoc

log = logging.getLogger(__name__)

Publish = Callable[[Sequence[tuple[Pool, Hint]]], Awaitable[None]]
Reply = Callable[[RunDoc], Awaitable[None]]
CrashPoint = Callable[[str], None]

MAX_EVENTS_IN_RUN = 50  # more are copied out before the run ends, so that the document stays small
OUTAGE_PAUSE_S = 0.5

# The named crash points, in the order a step passes them; tests kill the process at each.
CRASH_POINTS = ("before_claim", "before_effect", "after_effect", "after_commit", "after_publish", "before_settle")


async def no_reply(run: RunDoc) -> None:
    """Nobody waits for an answer through Celery."""


def no_crash(point: str) -> None:
    """Production: crash points do nothing."""


@dataclass(frozen=True, slots=True)
class Limits:
    """``steps_in_flight``: in this process, over its pools; ``lease_ms``: how long a silent worker keeps a step."""

    lease_ms: int = 30_000
    max_attempts: int = 5
    steps_in_flight: int = 256
    inline: bool = True


@dataclass(slots=True)
class Carried:
    """A run as this process knows it. Parallel steps of one run share it, and commit one after the other."""

    run: RunDoc
    bundle: Bundle
    history: list[Message]
    lock: asyncio.Lock
    copied: int = 0


class Runtime:
    """Works on steps of the pools it serves. One event loop; ``handle`` may be called concurrently.

    ``publish`` sends hints and may fail silently (the scheduler repeats them); ``reply`` stores the answer of a run
    for a waiting Celery caller and may be repeated.
    """

    def __init__(
        self,
        store: Store,
        llm: Llm,
        toolbox: Toolbox,
        publish: Publish,
        *,
        pools: Collection[Pool],
        worker: str,
        keeper: LeaseKeeper,
        limits: Limits | None = None,
        reply: Reply = no_reply,
        crash: CrashPoint = no_crash,
    ) -> None:
        self.store = store
        self._llm = llm
        self._toolbox = toolbox
        self._publish = publish
        self._reply = reply
        self._crash = crash
        self._worker = worker
        self._keeper = keeper
        self._limits = limits or Limits()
        self._pools = frozenset(pools)
        self._room = asyncio.Semaphore(self._limits.steps_in_flight)
        self._working: set[Held] = set()
        self._bundles = Bundles(store)
        self._prefix = os.urandom(6).hex()
        self._count = itertools.count()
        self._draining = False
        self._waiting = 0  # hints without a slot
        self._calls: dict[Held, asyncio.Task[Any]] = {}  # model calls under way, each in a task of its own
        self._cuts: dict[Held, Failed | None] = {}
        self._hearing = Hearing()
        self._told: Counter[str] = Counter()

    def drain(self) -> None:
        """Stop going on in place, and hand hints that have no slot yet to other workers at once. Steps under way are
        finished; what follows them is published."""
        self._draining = True
        for _ in range(self._waiting):
            self._room.release()

    def cut(self, run_id: str | None = None) -> None:
        """Close the connections of model calls under way: of a run that was cancelled or has ended, whose answers
        nobody wants, or (None) of all, because this process has no more time; then other workers repeat them."""
        for held, task in self._calls.items():
            if run_id in (None, held.run_id) and held not in self._cuts:
                stopped = Failed("worker_stopped", "The worker was stopped in mid-call.", True, None, self._now_ms())
                self._cuts[held] = stopped if run_id is None else None
                task.cancel()

    def report(self) -> dict[str, Any]:
        """What a worker's sign of life tells (``Store.beat``): its pools, steps in flight, hints without a slot, what
        it heard of the queues, and counts since its start."""
        return {
            "kind": "worker", "pools": sorted(self._pools), "in_flight": len(self._working), "waiting": self._waiting,
            "queues": self._hearing.report(), "counts": dict(self._told),
        }  # fmt: skip

    def count(self, what: str, times: int = 1) -> None:
        """Count something that a person may want to know of; shown by ``report``."""
        self._told[what] += times

    async def handle(self, pool: Pool, hints: Sequence[Hint], at: datetime | None = None) -> None:
        """Work off the hints of one message; returns when their steps (and what was done in place) are committed.

        ``at``: when the message was published, if it says so.
        """
        if pool not in self._pools:
            log.warning("hints for the pool %s came to a worker that does not serve it", pool)
        self._told["hints"] += len(hints)
        number = self._hearing.received(pool, at) if at is not None and hints else None
        last = len(hints) - 1  # slots are given in order: the last hint's claim is the message's last
        try:
            await asyncio.gather(
                *(self._from_hint(pool, hint, number if index == last else None) for index, hint in enumerate(hints))
            )
        finally:
            self._hearing.forget(number)

    async def _from_hint(self, pool: Pool, hint: Hint, message: int | None) -> None:
        """One hint. A failure of the outside leaves the step to its lease and the scheduler; nothing is raised.

        ``message``: the number of the message whose last hint this is.
        """
        self._waiting += 1
        await self._room.acquire()
        self._waiting -= 1
        if self._draining:
            self._room.release()
            await self._publish([(pool, hint)])
            return
        held = Held(hint.run_id, hint.step_id, self._token())
        self._begin(held)
        try:
            self._crash("before_claim")
            run = await self.store.claim(hint, self._grant(held.token))
            if message is not None:
                self._hearing.begun(message, self.store.now())
            if run is None:
                self._told["hints_without_a_step"] += 1
            else:
                await self._go_on(await self._carry(run, hint.step_id), [held])
        except AgentqError as error:
            log.warning("step %s of run %s is left to the scheduler: %s", hint.step_id, hint.run_id, error.code)
        except Exception as error:  # noqa: BLE001 - reported by class and place; its words may quote a person
            log.error("step %s of run %s is left to the scheduler: %s", hint.step_id, hint.run_id, place(error))
        finally:
            self._end(held)

    def _begin(self, held: Held, since: float | None = None) -> None:
        """From here on the step takes a slot (which the caller has acquired), and its lease is kept."""
        self._working.add(held)
        self._keeper.add(held, since)

    def _end(self, held: Held) -> None:
        """Give back what ``_begin`` took. Safe to repeat, so every path may do it."""
        if held in self._working:
            self._working.remove(held)
            self._room.release()
            self._keeper.drop(held)

    def _hand_on(self, held: Held, following: Held, since: float) -> None:
        """The step is done; its slot goes to the one that follows it, so a run under way never waits for a new one."""
        self._working.remove(held)
        self._keeper.drop(held)
        self._begin(following, since)

    async def _carry(self, run: RunDoc, step_id: str) -> Carried:
        bundle = await self._bundles.of(run)
        carried = Carried(run, bundle, [], asyncio.Lock())
        if run["steps"][step_id]["kind"] == "enter":
            if (run["turn"] or 0) > 1:
                carried.history = await self.store.history(run, bundle.workflow.limits.history_tokens)
            self._enter(carried, step_id)
        return carried

    def _enter(self, carried: Carried, step_id: str) -> None:
        carried.run = advance.enter_run(carried.bundle, carried.run, step_id, carried.history, self._now_ms())

    def _now_ms(self) -> int:
        return int(self.store.now().timestamp() * 1000)

    async def _go_on(self, carried: Carried, holding: list[Held]) -> None:
        """Do the steps we hold; each may give us more. A line of single steps is a loop, parallel ones fan out."""
        while len(holding) == 1:
            holding = await self._step(carried, holding[0])
        if holding:
            ends = await asyncio.gather(*(self._go_on(carried, [held]) for held in holding), return_exceptions=True)
            for end in ends:  # all are over before one is told: nothing of a message outlives its task
                if isinstance(end, BaseException):
                    raise end

    async def _step(self, carried: Carried, held: Held) -> list[Held]:
        """One leased step, from its effect to its commit; gives the steps to go on with in place."""
        try:
            self._crash("before_effect")
            if self._keeper.expired(held):
                log.warning("lease of step %s of run %s lost before its effect", held.step_id, held.run_id)
                return []
            wanted = effect(carried.bundle, carried.run, held.step_id)
            outcome: Outcome | None = deferral(wanted, carried.run, held.step_id, self.store.now())
            outcome = outcome or await self._perform(wanted, carried.run, held)
            if outcome is None:
                return []
            self._crash("after_effect")
            async with carried.lock:
                planned = await self._commit(carried, held, outcome)
        finally:
            self._end(held)
        if planned is None:
            log.warning("step %s of run %s was taken over; its outcome is dropped", held.step_id, held.run_id)
            return []
        granted = [Held(held.run_id, step_id, grant.token) for step_id, grant in planned.grants.items()]
        try:
            await self._after_commit(carried, planned)
        except BaseException:
            for next_held in granted:
                self._end(next_held)
            raise
        return granted

    async def _perform(self, wanted: LlmCall | ToolCallEffect, run: RunDoc, held: Held) -> Outcome | None:
        """The outcome of the effect; None if nobody wants it any more. Only model calls can be cut: a tool that has
        begun is left to end, because half an effect is worse than a late one."""
        task = asyncio.current_task()
        if task is not None and isinstance(wanted, LlmCall):
            self._calls[held] = task
        try:
            return await perform(wanted, run, held.step_id, self._llm, self._toolbox, self._now_ms)
        except asyncio.CancelledError:
            if task is None or not isinstance(wanted, LlmCall) or held not in self._cuts:
                raise
            task.uncancel()
            cost = wanted.model.cost_nano_usd(estimate_input(wanted), 0)
            await self._book(held, {"cut_calls": 1, "cost_nano_usd": cost})
            return self._cuts[held]
        finally:
            self._calls.pop(held, None)
            self._cuts.pop(held, None)

    async def _after_commit(self, carried: Carried, planned: Commit) -> None:
        """Hints out, audit out. What fails here is made good by the scheduler and must not stop the steps in hand."""
        self._crash("after_commit")
        try:
            if hints := commit.hints(planned):
                await self._publish(hints)
            self._crash("after_publish")
            await self._copy_out(carried, planned.after)
        except AgentqError as error:
            log.warning("run %s is finished by the scheduler: %s", planned.run_id, error.code)
        except Exception as error:  # noqa: BLE001 - reported by class and place; its words may quote a person
            log.error("run %s is finished by the scheduler: %s", planned.run_id, place(error))

    async def _commit(self, carried: Carried, held: Held, outcome: Outcome) -> Commit | None:
        """Decide and write until it is written; None if the lease is lost. The effect is never repeated here.

        An outage of the database is waited out: the outcome in hand is worth more than the slot, and a commit that
        was applied without our hearing of it shows by its receipt. An outcome that cannot be stored is a failed
        attempt.
        """
        while True:
            run = carried.run
            if held.step_id not in run["steps"]:  # a parallel step of ours has ended the run
                await self._book_waste(held, outcome)
                return None
            grants: dict[str, Grant] = {}
            since = self._keeper.now()
            try:
                decision = advance.advance(carried.bundle, run, held.step_id, outcome, self._limits.max_attempts)
                grants = await self._grants(run, decision)
                planned = commit.plan(
                    run, decision, now=self.store.now(), step_id=held.step_id, token=held.token, grants=grants,
                    copied=carried.copied,
                )  # fmt: skip
                verdict = await self._persist(planned)
            except BaseException as error:
                self._give_back(run["_id"], grants)
                if isinstance(outcome, Failed | Deferred) or not isinstance(error, Exception):
                    raise
                log.error("step %s of run %s: its outcome cannot be kept: %s", held.step_id, held.run_id, place(error))
                await self._book_waste(held, outcome)
                outcome = Failed("unusable_outcome", f"{type(error).__name__} on commit.", True, None, outcome.at_ms)
                continue
            if verdict is Verdict.APPLIED:
                carried.run = planned.after
                if grants:
                    step_id, grant = next(iter(grants.items()))
                    self._hand_on(held, Held(held.run_id, step_id, grant.token), since)
                return planned
            self._give_back(run["_id"], grants)
            if verdict is Verdict.FENCED:
                await self._book_waste(held, outcome)
                return None
            await self._refresh(carried, held.step_id)

    async def _persist(self, planned: Commit) -> Verdict:
        while True:
            try:
                return await self.store.commit(planned)
            except Unavailable as error:
                log.warning("commit of run %s waits: %s", planned.run_id, error.code)
                await asyncio.sleep(OUTAGE_PAUSE_S)

    async def _refresh(self, carried: Carried, step_id: str) -> None:
        """Somebody else committed first: take the run as it is now."""
        while True:
            try:
                run = await self.store.load(carried.run["_id"])
                break
            except Unavailable:
                await asyncio.sleep(OUTAGE_PAUSE_S)
        if run is not None:
            carried.run = run
            if step_id in run["steps"] and run["steps"][step_id]["kind"] == "enter":
                self._enter(carried, step_id)

    async def _grants(self, run: RunDoc, decision: Decision) -> dict[str, Grant]:
        """Leases for the steps this process can go on with at once: it serves their pool and has room.

        The first gets the slot of the step that ends; further ones (parallel tools) need slots of their own.
        """
        grants: dict[str, Grant] = {}
        if not self._limits.inline or self._draining or decision.ends or paused(run):
            return grants
        for step_id, opening in decision.opened.items():
            if opening.pool not in self._pools or opening.delay_s > 0 or opening.held is not None:
                continue
            if grants:
                if self._room.locked():
                    break
                await self._room.acquire()
            grants[step_id] = self._grant(self._token())
            if len(grants) > 1:
                self._begin(Held(run["_id"], step_id, grants[step_id].token))
        return grants

    def _give_back(self, run_id: str, grants: dict[str, Grant]) -> None:
        for step_id, grant in grants.items():
            self._end(Held(run_id, step_id, grant.token))

    def _grant(self, token: str) -> Grant:
        return Grant(token, self._worker, self._limits.lease_ms)

    def _token(self) -> str:
        return f"{self._prefix}{next(self._count):x}"

    async def _book_waste(self, held: Held, outcome: Outcome) -> None:
        """Our work is of no use (the lease was lost, or it cannot be stored): state stays, the money is booked."""
        if isinstance(outcome, Replied):
            await self._book(held, {"llm_calls": 1, "cost_nano_usd": outcome.reply.cost_nano_usd})

    async def _book(self, held: Held, waste: dict[str, int]) -> None:
        """An outage of the database is waited out, as for a commit: nobody else knows of this money."""
        while True:
            try:
                await self.store.book_waste(held.run_id, held.token, waste)
                return
            except Unavailable as error:
                log.warning("waste of run %s waits: %s", held.run_id, error.code)
                await asyncio.sleep(OUTAGE_PAUSE_S)

    async def _copy_out(self, carried: Carried, run: RunDoc) -> None:
        """Audit events leave the run when it has ended, or when there are many."""
        if run["ended_at"] is not None:
            self._crash("before_settle")
            await finish(self.store, self._reply, run)
        elif len(run["events"]) > MAX_EVENTS_IN_RUN:
            await self.store.copy_audit(run["events"])
            carried.copied = run["events"][-1]["seq"]


async def finish(store: Store, reply: Reply, run: RunDoc) -> None:
    """After a run has ended: audit events out, the conversation's next turn, deliveries to those it has to tell, the
    answer to a waiting caller, then nothing more is due. Repeatable; who was told of this end once is not told again.
    """
    await store.copy_audit(run["events"])
    if run["conversation"] is not None:
        await store.pass_turn(run)
    if run.get("told_at") != run["ended_at"]:
        if "notify" in run:
            await store.notify(run)
        if run["reply"] is not None:  # last: a result backend that is away must hold up nothing else
            await reply(run)
    await store.settle(run)
