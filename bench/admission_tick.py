"""What a whole look of the admission costs, with a real mongod: ``python -m bench.admission --mongod``.

A leader's tick reads what is in flight and who waits, fetches the heads of the lines, decides, lets runs in and, once a
second, looks at limits, costs and throughput. Everything is real but the hints, which nobody hears, and the window: it
is fixed, so each tick has as many places as runs were ended before it. Time is the bench's own, a tenth of a second a
tick, so that what is done once a second is done every tenth tick, however fast the ticks follow.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import Any, NamedTuple

from pymongo import AsyncMongoClient, WriteConcern

from agentq.engine.window import Window
from agentq.protocol import Hint, Pool, Request
from agentq.run import Registered, new_run
from agentq.runtime.admission import TICK_S, Admission
from agentq.store.backlog import Flying
from agentq.store.mongo import MongoStore
from bench.pace import Pace

WINDOW = 512
TICKS = 60
DATABASE = "bench_admission"
WORKFLOW: Registered = {
    "name": "bench", "hash": "0" * 64, "start_pool": "router", "start_recovery": "retry", "max_wall_s": 600.0,
}  # fmt: skip
_INSERT = 5_000


class Cost(NamedTuple):
    """CPU seconds of one kind of tick, of the leader and of mongod meanwhile."""

    ticks: int
    runs: int
    leader_s: float
    mongod_s: float
    wall_s: float
    pace: float


async def fill(url: str, tenants: list[str], runs: int) -> None:
    """``runs`` documents that wait, as requests of the class ``batch`` are born, of tenants at random. Every tenant
    has a weight, every tenth a cap."""
    store = MongoStore(url, DATABASE)
    await store.open()  # the indexes
    await store.close()
    async with AsyncMongoClient[dict[str, Any]](url) as client:
        inserted = client[DATABASE].get_collection("runs", write_concern=WriteConcern(w=1, j=False))
        waiting = _documents(tenants, runs)
        while some := list(islice(waiting, _INSERT)):
            await inserted.insert_many(some, ordered=False)
        limits = [
            {"_id": tenant, "weight": 1.0 + index % 5, **({"in_flight": 50} if index % 10 == 0 else {})}
            for index, tenant in enumerate(tenants)
        ]
        await client[DATABASE]["limits"].insert_many(limits)


def _documents(tenants: list[str], runs: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(1)
    born = {
        tenant: new_run(
            Request(input="Where is my order?", tenant=tenant, priority="batch"), WORKFLOW, run_id="r", waits=True,
            now=datetime.now(UTC),
        )
        for tenant in tenants
    }  # fmt: skip
    for number in range(runs):
        doc: dict[str, Any] = dict(born[rng.choice(tenants)])
        doc["_id"] = f"r{number:028x}"
        doc["backlog"] = {**doc["backlog"], "cost": rng.randrange(1_000, 2_000_000)}
        yield doc


class _Leader(Admission):
    """An admission whose window stays."""

    def _window(self, pool: Pool, here: Iterable[Flying]) -> int:  # noqa: ARG002
        self._windows[pool] = Window(WINDOW)
        return WINDOW


class Ticks:
    """Ticks of a leader on a filled database."""

    def __init__(self, store: MongoStore, mongod_pid: int, pace: Pace) -> None:
        self._store = store
        self._pace = pace
        self._mongod = (~mongod_pid << 3) | 2  # the kernel's number for the CPU clock of another process
        self._now_s = 0.0
        self._flying: list[str] = []
        self._rng = random.Random(2)
        self.leader = _Leader(
            store.backlog, store.queues, self._publish, name="bench", window=WINDOW, room=store.batches.room,
            clock=lambda: self._now_s,
        )  # fmt: skip

    async def _publish(self, hints: Sequence[tuple[Pool, Hint]]) -> None:
        self._flying += [hint.run_id for _, hint in hints]

    async def measure(self, ticks: int, ended: int) -> Cost:
        """The cost of ``ticks``, before each of which ``ended`` runs have ended and what had been let in was taken."""
        runs, leader, mongod, wall, began = 0, 0, 0, 0.0, time.monotonic()
        for _ in range(ticks):
            await self._work(ended)
            self._now_s += TICK_S
            before = time.thread_time_ns(), time.clock_gettime_ns(self._mongod), time.perf_counter()
            assert await self.leader._lead()
            runs += await self.leader.tick()
            leader += time.thread_time_ns() - before[0]
            mongod += time.clock_gettime_ns(self._mongod) - before[1]
            wall += time.perf_counter() - before[2]
        return Cost(ticks, runs, leader / 1e9, mongod / 1e9, wall, self._pace.between(began, time.monotonic()))

    async def _work(self, ended: int) -> None:
        """What workers do: runs are taken, and some end."""
        self._rng.shuffle(self._flying)
        gone, self._flying = self._flying[:ended], self._flying[ended:]
        end = {"status": "succeeded", "in_flight": False, "ended_at": self._store.now(), "next_due": None}
        await self._store.runs.update_many({"_id": {"$in": gone}}, {"$set": end})
        await self._store.runs.update_many({"_id": {"$in": self._flying}}, {"$set": {"status": "running"}})


async def report(url: str, mongod_pid: int, rooms: Iterable[int]) -> None:
    """Print what ticks cost on a database that ``fill`` has filled."""
    store = MongoStore(url, DATABASE)
    await store.open()
    with Pace() as pace:
        ticks = Ticks(store, mongod_pid, pace)
        while (await ticks.measure(1, 0)).runs:
            """Until the window is full."""
        print(f"  CPU, {WINDOW} in flight       leader               mongod         wall  pace")
        for ended in (0, *rooms):
            cost = await ticks.measure(TICKS, ended)
            what = f"{cost.runs / TICKS:.0f} runs a tick" if ended else "the pools are full"
            print(f"  {what:20}{_row(cost)}", flush=True)
    await store.close()


def _row(cost: Cost) -> str:
    """Milliseconds a tick, microseconds a run."""
    parts = [
        f"{spent / cost.ticks * 1e3:6.2f} ms" + (f" {spent / cost.runs * 1e6:5.0f} us" if cost.runs else " " * 9)
        for spent in (cost.leader_s, cost.mongod_s)
    ]
    return f"{parts[0]:>20}{parts[1]:>21}{cost.wall_s / cost.ticks * 1e3:8.1f} ms{cost.pace:6.2f}"
