"""The admission's loop: one leader lets waiting runs into the pools, up to a window that follows what the pools do.

The leader is whoever holds a lease document. All that must survive it is in MongoDB: what waits, what is in flight, the
admissions of the last minute where a rate is limited, what a workflow costs. Its books (who was served how much) start
anew with each leader, which is fair from then on. Each run is let in by one conditional update, so two leaders, or one
that was frozen, cannot let one in twice; a crash after the update leaves a run whose hint the scheduler publishes.

Whoever loses the lease between its last look at the clock and that update lets in what it had decided beside the new
leader: once, at most ``AT_ONCE`` runs, by which windows and caps may be exceeded until they have ended.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

from agentq.clock import elapsed_s
from agentq.engine.admission import (
    CLASSES,
    Admitted,
    Books,
    Decision,
    Quota,
    correct,
    decide,
    places,
    reserved,
    tenant_of,
)
from agentq.engine.window import Sight, Window, adapt
from agentq.errors import AgentqError
from agentq.protocol import Hint, Pool, Priority
from agentq.run import START_STEP
from agentq.runtime.ever import ever
from agentq.runtime.flights import Flights, Rates
from agentq.runtime.lines import Lines
from agentq.runtime.runtime import CrashPoint, Publish, no_crash
from agentq.store.api import Queue
from agentq.store.backlog import Backlog, Flying, Limit

log = logging.getLogger(__name__)

TICK_S = 0.1  # how long an urgent request waits at most before it is looked at
STAND_BY_S = 0.5
LEASE_MS = 3_000
RENEW_S = 1.0
SLOW_S = 1.0  # limits, costs, throughput, what the clients are told
RELEASE_S = 0.25
CALM_S = 0.5  # how often to look at what waits and may not go, while nothing is in flight
AT_ONCE = 500  # runs let in by one write
ROUNDS = 20

HandIn = Callable[[dict[str, Any]], Awaitable[None]]  # hands in a recurring request that is due
Queues = Callable[[], Awaitable[dict[Pool, Queue]]]
Room = Callable[[], Awaitable[Mapping[str, int]]]  # by flow, how many runs may still be let in; 0: it is closed
Counts = dict[Priority, int]  # runs in flight


class Admission:
    """``run`` until cancelled. ``window``: runs a pool may have in flight at first: what one worker holds.

    ``name`` is for people; each leader adds to it what no other has, be it of the same process id on another day.
    """

    def __init__(
        self,
        backlog: Backlog,
        queues: Queues,
        publish: Publish,
        *,
        name: str,
        window: int = 256,
        hand_in: HandIn | None = None,
        room: Room | None = None,
        clock: Callable[[], float] = elapsed_s,
        crash: CrashPoint = no_crash,
    ) -> None:
        self._backlog = backlog
        self._queues = queues
        self._publish = publish
        self._name = f"{name}:{secrets.token_hex(4)}"
        self._first_window = window
        self._hand_in = hand_in
        self._room = room
        self._clock = clock
        self._crash = crash
        self._leads_until = 0.0
        self._forget()

    def _forget(self) -> None:
        self._windows: dict[Pool, Window] = {}
        self._books: dict[Pool, Books] = {}
        self._lines = Lines(self._backlog, AT_ONCE)
        self._limits: dict[str, Limit] = {}
        self._weights: dict[str, float] = {}
        self._routes: dict[Pool, frozenset[Pool]] = {}
        self._heard: dict[Pool, datetime] = {}
        self._later: dict[Pool, float] = {}
        self._full: dict[Pool, bool] = {}
        self._flights = Flights(self._backlog)
        self._rates = Rates()
        self._next: dict[str, float] = {}
        self._waiting: set[Priority] = set()
        self._calm = False

    async def run(self) -> None:
        """Lead, or stand by, until cancelled; an outage is reported and waited out.

        What may take long with many turns or schedules is done beside the ticks, so that it holds up nobody's run.
        """
        async with asyncio.TaskGroup() as group:
            for act in (self._lead_on, self._release, self._recur):
                group.create_task(ever("the admission", act, STAND_BY_S))

    async def _lead_on(self) -> float:
        """A tick. Those that take long take half of the time at most: MongoDB has others to serve."""
        began = self._clock()
        if not await self._lead():
            return STAND_BY_S
        await self.tick()
        took = self._clock() - began
        return max(took, TICK_S - took)

    async def _release(self) -> float:
        """Runs whose time has come, turns that are next. Takes half of the time at most."""
        if not self._leads():
            return STAND_BY_S
        began = self._clock()
        await self._backlog.release(AT_ONCE)
        return max(RELEASE_S, self._clock() - began)

    async def _recur(self) -> float:
        """Recurring requests that are due."""
        if self._hand_in is not None and self._leads():
            for schedule in await self._backlog.schedules(AT_ONCE):
                if self._leads():
                    await self._hand_in(schedule)
        return SLOW_S

    def _leads(self) -> bool:
        return self._clock() < self._leads_until

    async def _lead(self) -> bool:
        now = self._clock()
        if now < self._leads_until - LEASE_MS / 1000 + RENEW_S:
            return True
        if not await self._backlog.lead(self._name, LEASE_MS):
            if self._leads_until:
                log.warning("another scheduler leads the admission now")
            self._leads_until = 0.0
            return False
        if now >= self._leads_until:
            self._forget()
            await self._recall()
        self._leads_until = now + LEASE_MS / 1000
        return True

    async def _go_on_leading(self) -> None:
        """Prolong the lease when it is time, within a tick that takes long. Raises where it is lost."""
        now = self._clock()
        if now < self._leads_until - LEASE_MS / 1000 + RENEW_S:
            return
        if now >= self._leads_until or not await self._backlog.lead(self._name, LEASE_MS):
            self._leads_until = 0.0
            raise _lost()
        self._leads_until = now + LEASE_MS / 1000

    async def _recall(self) -> None:
        """What the leader before knew and nothing else tells."""
        self._rates.load(await self._backlog.remembered("rates") or {})
        self._flights.load(await self._backlog.remembered("gate") or {})

    def _time_for(self, what: str, every_s: float) -> bool:
        now = self._clock()
        if now < self._next.get(what, 0.0):
            return False
        self._next[what] = now + every_s
        return True

    async def tick(self) -> int:
        """One look at everything that waits: how many runs were let in. Cheap while nothing does, or while nothing of
        it may go (a batch that is paused): then only a class of which nothing waited yet is looked for each time."""
        admitted = 0
        if not self._calm or self._time_for("calm", CALM_S) or await self._backlog.waits({*CLASSES} - self._waiting):
            self._calm = False
            classes = await self._backlog.waits(CLASSES)
            self._lines.keep(classes)
            if classes:
                admitted = await self._admit(classes)
            self._waiting = self._lines.classes  # who was let in just now waits no more
        if self._time_for("slow", SLOW_S):
            await self._go_on_leading()
            await self._look_slowly()
        return admitted

    async def _look_slowly(self) -> None:
        """What need not be known at once: limits, what runs did cost, how fast the pools are. Then tell the clients.

        An urgent request that comes meanwhile waits for this, so the questions are asked side by side.
        """
        ended, *_ = await asyncio.gather(
            self._flights.look(self._clock()), self._learn_limits(), self._look_at_routes(), self._listen()
        )
        for pool, priority, flow, difference in ended:
            tenant = tenant_of(flow)
            if pool in self._books:
                weight = self._weights.get(tenant, 1.0)
                self._books[pool] = correct(self._books[pool], priority, tenant, weight, difference)
        await self._tell()

    async def _look_at_routes(self) -> None:
        if self._time_for("routes", 30):
            self._routes = await self._backlog.routes()

    async def _listen(self) -> None:
        if not self._waiting and not self._time_for("queues", 5):
            return
        queues = await self._queues()
        fresh = {pool for pool, queue in queues.items() if queue.heard != self._heard.get(pool)}
        self._heard = {pool: queue.heard for pool, queue in queues.items()}
        for start, route in self._routes.items():
            waits = [queues[pool].wait_ms / 1000 for pool in route - {start} if pool in fresh]
            if waits:
                self._later[start] = max(waits)

    async def _learn_limits(self) -> None:
        if self._time_for("limits", SLOW_S):
            self._limits = await self._backlog.limits()
            self._weights = {name: limit.weight for name, limit in self._limits.items()}

    async def _tell(self) -> None:
        """What clients go by: may a request go straight to its pool, what may it cost, whose runs are capped."""
        flight: Counts = {}
        for one in await self._backlog.flight():
            flight[one.priority] = flight.get(one.priority, 0) + one.runs
        size = max([self._first_window, *(window.size for window in self._windows.values())])
        ending = int(self._flights.ending())  # in the second for which a client goes by this
        await self._backlog.remember(
            "gate",
            {
                "at": self._backlog.now(),
                "waiting": sorted(self._waiting),
                "room": max(0, size - sum(flight.values())) + (0 if self._waiting else ending),
                "reserved": {priority: reserved(priority, size, flight) for priority in CLASSES},
                "capped": sorted(name for name, limit in self._limits.items() if limit.caps),
                "lines": {name: limit.waiting for name, limit in self._limits.items() if limit.waiting is not None},
                **self._flights.told(),
                "weights": self._weights,
                "active": {priority: self._lines.flows(priority) for priority in self._waiting},
            },
        )

    # -- letting in -------------------------------------------------------------------------------------------------

    async def _admit(self, classes: set[Priority]) -> int:
        flight, _ = await asyncio.gather(self._backlog.flight(), self._learn_limits())
        counts: dict[Pool, Counts] = {}
        for one in flight:
            here = counts.setdefault(one.pool, {})
            here[one.priority] = here.get(one.priority, 0) + one.runs
        await self._look(classes, counts)
        admitted, quotas = 0, None
        for pool in self._lines.pools:
            window = self._window(pool, [one for one in flight if one.pool == pool])
            self._full[pool] = not self._open(pool, counts.setdefault(pool, {}), self._lines.of(pool))
            if not self._full[pool]:
                quotas = await self._allowed(flight) if quotas is None else quotas
                quotas, count = await self._fill(pool, window, counts[pool], quotas)
                admitted += count
        # Then only time, a person or a newcomer changes anything, and an urgent one is not to wait for the next look.
        self._calm = not admitted and not flight and "interactive" not in classes
        return admitted

    async def _look(self, classes: set[Priority], counts: Mapping[Pool, Counts]) -> None:
        """See who waits, in the classes for which it is time."""
        now = self._clock()
        for priority in classes:
            pools = [pool for pool in self._lines.pools if self._lines.of(pool).get(priority)]
            full = not any(self._open(pool, counts.get(pool, {}), [priority]) for pool in pools)
            if self._lines.due(priority, now, full=full):
                await self._lines.look(priority, now)

    def _open(self, pool: Pool, counts: Counts, classes: Iterable[Priority]) -> bool:
        """Has the pool a place for any of these?"""
        window = self._windows.get(pool)
        return window is None or any(places(priority, window.size, counts) > 0 for priority in classes)

    def _window(self, pool: Pool, here: Iterable[Flying]) -> int:
        taken = sum(one.runs for one in here if one.taken)
        untaken = sum(one.runs for one in here if not one.taken)
        before = self._windows.get(pool) or Window(max(self._first_window, taken + untaken))
        sight = Sight(
            taken, untaken, self._flights.rate(pool), self._later.pop(pool, None), self._full.get(pool, False),
            self._first_window,
        )  # fmt: skip
        self._windows[pool] = adapt(before, sight)
        return self._windows[pool].size

    async def _fill(
        self, pool: Pool, window: int, counts: Counts, quotas: Mapping[str, Quota]
    ) -> tuple[Mapping[str, Quota], int]:
        """Let runs into one pool until it is full, or nothing that waits may go."""
        total = 0
        for _ in range(ROUNDS):
            decision = await self._decide(pool, window, counts, quotas)
            refused = await self._let_in(pool, decision, counts) if decision.admitted else []
            total += len(decision.admitted) - len(refused)
            books = decision.books
            for one in refused:  # ended or paused meanwhile: it costs its tenant nothing
                tenant = tenant_of(one.flow)
                books = correct(books, one.priority, tenant, self._weights.get(tenant, 1.0), -one.run.cost)
            self._books[pool], quotas = books, decision.quotas
            if not decision.wanted and len(decision.admitted) < AT_ONCE:
                self._full[pool] = sum(counts.values()) >= window
                break
        return quotas, total

    async def _decide(self, pool: Pool, window: int, counts: Counts, quotas: Mapping[str, Quota]) -> Decision:
        """Decide; if more has to be known for that, know it and decide again: that is cheaper than to write twice."""

        def decided() -> Decision:
            return decide(
                self._books.get(pool, Books()), self._lines.of(pool), window=window, flight=counts,
                weights=self._weights, quotas=quotas, limit=AT_ONCE,
            )  # fmt: skip

        decision = decided()
        if decision.wanted:
            await self._lines.fetch(pool, decision.wanted, self._clock())
            decision = decided()
        return decision

    async def _let_in(self, pool: Pool, decision: Decision, counts: Counts) -> list[Admitted]:
        """Gives those of them that may not go any more."""
        await self._go_on_leading()
        limited = [name for one in decision.admitted for name in {one.flow, tenant_of(one.flow)}]
        if self._rates.count([name for name in limited if self._capped_rate(name)], self._second()):
            await self._backlog.remember("rates", self._rates.dump())
        if not self._leads():  # nothing may be awaited between this and the write
            raise _lost()
        admitted = await self._backlog.admit([one.run.run_id for one in decision.admitted])
        self._crash("after_admit")
        self._lines.went(pool, decision.admitted)
        hints, refused = [], []
        for one in decision.admitted:
            if one.run.run_id in admitted:
                counts[one.priority] = counts.get(one.priority, 0) + 1
                self._flights.admitted(one.run.run_id, pool, one.priority, one.flow, one.run.cost)
                hints.append((pool, Hint(one.run.run_id, START_STEP, 1)))
            else:
                refused.append(one)
        await self._publish(hints)
        return refused

    def _capped_rate(self, name: str) -> bool:
        return name in self._limits and self._limits[name].per_minute is not None

    def _second(self) -> int:
        return int(self._backlog.now().timestamp())

    async def _allowed(self, flight: Iterable[Flying]) -> Mapping[str, Quota]:
        """What may still be admitted for those that have caps, and of what has no room for more."""
        spenders = {tenant_of(name) for name, limit in self._limits.items() if limit.spend is not None}
        quotas = self._quotas(flight, await self._backlog.joining(spenders) if spenders else {})
        return quotas if self._room is None else with_room(quotas, await self._room())

    def _quotas(self, flight: Iterable[Flying], joining: Mapping[str, int]) -> dict[str, Quota]:
        """``joining``: the cost of what waits for a provider's job, by flow."""
        capped = {name: limit for name, limit in self._limits.items() if limit.caps}
        runs, spend = dict.fromkeys(capped, 0), dict.fromkeys(capped, 0)
        for flow, count, cost in ((flow, *flying) for one in flight for flow, flying in one.flows.items()):
            for name in {flow, tenant_of(flow)} & capped.keys():
                runs[name] += count
                spend[name] += cost
        for flow, cost in joining.items():
            for name in {flow, tenant_of(flow)} & capped.keys():
                spend[name] += cost
        return {
            name: Quota(
                None if limit.in_flight is None else limit.in_flight - runs[name],
                None if limit.spend is None else limit.spend - spend[name],
                None if limit.per_minute is None else limit.per_minute - self._rates.recent(name, self._second()),
                idle=not runs[name] and not spend[name],
            )
            for name, limit in capped.items()
        }


def _lost() -> AgentqError:
    return AgentqError("This scheduler leads the admission no more.", code="lease_lost")


def with_room(quotas: Mapping[str, Quota], rooms: Mapping[str, int]) -> dict[str, Quota]:
    """Quotas that also keep each flow within its room."""
    found = dict(quotas)
    for flow, room in rooms.items():
        known = found.get(flow, Quota())
        found[flow] = known._replace(runs=room if known.runs is None else min(room, known.runs))
    return found
