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
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from agentq.clock import elapsed_s
from agentq.engine.admission import CLASSES, Books, Decision, Line, Quota, Waiting, correct, decide, tenant_of
from agentq.engine.window import Sight, Window, adapt
from agentq.errors import AgentqError
from agentq.place import place
from agentq.protocol import Hint, Pool, Priority
from agentq.run import START_STEP
from agentq.runtime.flights import Flights, Rates
from agentq.runtime.runtime import CrashPoint, Publish, no_crash
from agentq.store.api import Queue
from agentq.store.backlog import Backlog, Flying, Limit

log = logging.getLogger(__name__)

TICK_S = 0.1  # how long an urgent request waits at most before it is looked at
STAND_BY_S = 0.5
LEASE_MS = 3_000
RENEW_S = 1.0
HEADS_FRESH_S = 1.0  # a more urgent run that comes later is seen within this time
SLOW_S = 1.0  # limits, costs, throughput, what the clients are told
RELEASE_S = 0.25
CALM_S = 0.5  # how often to look at what waits and may not go, while nothing is in flight
AT_ONCE = 500  # runs let in by one write
ROUNDS = 20

HandIn = Callable[[dict[str, Any]], Awaitable[None]]  # hands in a recurring request that is due
Queues = Callable[[], Awaitable[dict[Pool, Queue]]]
Room = Callable[[], Awaitable[Mapping[str, int]]]  # by flow, how many runs may still be let in; 0: it is closed


@dataclass(slots=True)
class _Heads:
    """What is known of a flow's line."""

    runs: list[Waiting] = field(default_factory=list)
    more: bool = True
    since: float = 0.0


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
        self._heads: dict[tuple[Priority, Pool, str], _Heads] = {}
        self._limits: dict[str, Limit] = {}
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
                group.create_task(_ever(act))

    async def _lead_on(self) -> float:
        began = self._clock()
        if not await self._lead():
            return STAND_BY_S
        await self.tick()
        return max(0.01, TICK_S - (self._clock() - began))

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
            lines = await self._backlog.waiting()
            self._calm = False
            if lines:
                admitted = await self._admit(lines)
            left = {key for key, heads in self._heads.items() if heads.runs or heads.more} if lines else set()
            self._waiting = {priority for priority, _, _ in left}  # who was let in just now waits no more
        if self._time_for("slow", SLOW_S):
            await self._go_on_leading()
            await self._look_slowly()
        return admitted

    async def _look_slowly(self) -> None:
        """What need not be known at once: limits, what runs did cost, how fast the pools are. Then tell the clients.

        An urgent request that comes meanwhile waits for this, so the questions are asked side by side.
        """
        ended, *_ = await asyncio.gather(
            self._flights.look(self._clock()), self._look_at_limits(), self._look_at_routes(), self._listen()
        )
        for pool, priority, flow, difference in ended:
            tenant = tenant_of(flow)
            if pool in self._books:
                self._books[pool] = correct(self._books[pool], priority, tenant, self._weight(tenant), difference)
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

    def _weight(self, tenant: str) -> float:
        return self._limits[tenant].weight if tenant in self._limits else 1.0

    async def _tell(self) -> None:
        """What clients go by: may a request go straight to its pool, what may it cost, whose runs are capped."""
        flight = sum(one.runs for one in await self._backlog.flight())
        size = max([self._first_window, *(window.size for window in self._windows.values())])
        told = self._flights.told()
        ending = int(sum(told["rates"].values()))  # in the second for which a client goes by this
        await self._backlog.remember(
            "gate",
            {
                "at": self._backlog.now(),
                "waiting": sorted(self._waiting),
                "room": max(0, size - flight) + (0 if self._waiting else ending),
                "capped": sorted(name for name, limit in self._limits.items() if limit.caps),
                "lines": {name: limit.waiting for name, limit in self._limits.items() if limit.waiting is not None},
                **told,
                "weights": {name: limit.weight for name, limit in self._limits.items()},
                "active": {p: len({key[2] for key in self._heads if key[0] == p}) for p in self._waiting},
            },
        )

    # -- letting in -------------------------------------------------------------------------------------------------

    async def _admit(self, waiting: Mapping[Priority, Mapping[Pool, list[str]]]) -> int:
        flight, room, _ = await asyncio.gather(self._backlog.flight(), self._rooms(), self._look_at_limits())
        quotas: Mapping[str, Quota] = with_room(self._quotas(flight), room)
        self._keep_heads({(priority, pool, flow) for priority, pools in waiting.items()
                          for pool, flows in pools.items() for flow in flows})  # fmt: skip
        admitted = 0
        for pool in sorted({pool for pools in waiting.values() for pool in pools}):
            here = [one for one in flight if one.pool == pool]
            window = self._window(pool, here)
            counts: dict[Priority, int] = dict.fromkeys(CLASSES, 0)
            for one in here:
                counts[one.priority] += one.runs
            quotas, count = await self._fill(pool, window, counts, quotas)
            admitted += count
        # Then only time, a person or a newcomer changes anything, and an urgent one is not to wait for the next look.
        self._calm = not admitted and not flight and "interactive" not in waiting
        return admitted

    async def _rooms(self) -> Mapping[str, int]:
        return {} if self._room is None else await self._room()

    async def _look_at_limits(self) -> None:
        if self._time_for("limits", SLOW_S / 2):
            self._limits = await self._backlog.limits()

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
        self, pool: Pool, window: int, counts: dict[Priority, int], quotas: Mapping[str, Quota]
    ) -> tuple[Mapping[str, Quota], int]:
        """Let runs into one pool until it is full, or nothing that waits may go."""
        weights = {tenant: limit.weight for tenant, limit in self._limits.items()}
        total, full = 0, False
        for _ in range(ROUNDS):
            decision = decide(
                self._books.get(pool, Books()), self._lines(pool), window=window, flight=counts, weights=weights,
                quotas=quotas, limit=AT_ONCE,
            )  # fmt: skip
            if decision.admitted:
                await self._let_in(pool, decision, counts)
                total += len(decision.admitted)
            self._books[pool] = decision.books
            quotas = decision.quotas
            if not decision.wanted and len(decision.admitted) < AT_ONCE:
                full = sum(counts.values()) >= window
                break
            await asyncio.gather(*(self._fetch(priority, pool, flow) for priority, flow in decision.wanted))
        self._full[pool] = full
        return quotas, total

    async def _let_in(self, pool: Pool, decision: Decision, counts: dict[Priority, int]) -> None:
        await self._go_on_leading()
        limited = [name for one in decision.admitted for name in {one.flow, tenant_of(one.flow)}]
        if self._rates.count([name for name in limited if self._capped_rate(name)], self._second()):
            await self._backlog.remember("rates", self._rates.dump())
        if not self._leads():  # nothing may be awaited between this and the write
            raise _lost()
        admitted = await self._backlog.admit([one.run.run_id for one in decision.admitted])
        self._crash("after_admit")
        for one in decision.admitted:
            heads = self._heads[one.priority, pool, one.flow]
            heads.runs = heads.runs[1:] if heads.runs and heads.runs[0] == one.run else heads.runs
            if one.run.run_id in admitted:
                counts[one.priority] += 1
                self._flights.admitted(one.run.run_id, pool, one.priority, one.flow, one.run.cost)
        hints = [(pool, Hint(one.run.run_id, START_STEP, 1)) for one in decision.admitted if one.run.run_id in admitted]
        await self._publish(hints)

    def _capped_rate(self, name: str) -> bool:
        return name in self._limits and self._limits[name].per_minute is not None

    def _second(self) -> int:
        return int(self._backlog.now().timestamp())

    def _quotas(self, flight: Iterable[Flying]) -> dict[str, Quota]:
        """What may still be admitted for those that have caps."""
        runs: dict[str, int] = {}
        spend: dict[str, int] = {}
        for one in flight:
            for name in {one.flow, tenant_of(one.flow)}:
                runs[name] = runs.get(name, 0) + one.runs
                spend[name] = spend.get(name, 0) + one.cost
        found = {}
        for name, limit in self._limits.items():
            if limit.caps:
                found[name] = Quota(
                    None if limit.in_flight is None else limit.in_flight - runs.get(name, 0),
                    None if limit.spend is None else limit.spend - spend.get(name, 0),
                    None if limit.per_minute is None else limit.per_minute - self._rates.recent(name, self._second()),
                    idle=not runs.get(name),
                )
        return found

    # -- the heads of the lines -------------------------------------------------------------------------------------

    def _keep_heads(self, flows: set[tuple[Priority, Pool, str]]) -> None:
        """Keep what is fresh. Of a line whose known runs are used up and that still waits, others have come since."""
        now = self._clock()
        fresh = {key: heads for key, heads in self._heads.items() if now - heads.since < HEADS_FRESH_S}
        kept = {key: fresh[key] for key in flows & fresh.keys() if fresh[key].runs}
        self._heads = {key: kept.get(key) or _Heads() for key in flows}

    def _lines(self, pool: Pool) -> dict[Priority, dict[str, Line]]:
        found: dict[Priority, dict[str, Line]] = {}
        for (priority, where, flow), heads in self._heads.items():
            if where == pool and (heads.runs or heads.more):
                found.setdefault(priority, {})[flow] = Line(heads.runs, heads.more)
        return found

    async def _fetch(self, priority: Priority, pool: Pool, flow: str) -> None:
        limit = min(200, max(16, AT_ONCE // max(1, len(self._heads))))
        runs = await self._backlog.heads(priority, pool, flow, limit)
        self._heads[priority, pool, flow] = _Heads(runs, len(runs) == limit, self._clock())


async def _ever(act: Callable[[], Awaitable[float]]) -> None:
    """Act again and again, after the pause in seconds that it gives; an outage is reported and waited out."""
    while True:
        pause = STAND_BY_S
        try:
            pause = await act()
        except AgentqError as error:
            log.warning("the admission waits: %s", error)
        except Exception as error:  # noqa: BLE001 - reported by class and place; it must not stop for good
            log.error("the admission waits: %s", place(error))
        await asyncio.sleep(pause)


def _lost() -> AgentqError:
    return AgentqError("This scheduler leads the admission no more.", code="lease_lost")


def with_room(quotas: Mapping[str, Quota], rooms: Mapping[str, int]) -> dict[str, Quota]:
    """Quotas that also keep each flow within its room."""
    found = dict(quotas)
    for flow, room in rooms.items():
        known = found.get(flow, Quota())
        found[flow] = replace(known, runs=room if known.runs is None else min(room, known.runs))
    return found
