"""The scheduler's rounds: however much is due, it goes on showing signs of life and watching the broker."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from agentq.protocol import Request
from agentq.run import new_run
from agentq.runtime.scheduler import ROUNDS, Scheduler
from agentq.store.memory import MemoryStore
from schemas.run import RunDoc
from tests.unit.runtime.world import Shop, make_bundle

BORN = datetime(2026, 1, 1, tzinfo=UTC)
BATCH = 5


class Stream(MemoryStore):
    """Runs become due as fast as they are looked at, until ``left`` of them have."""

    def __init__(self, left: int) -> None:
        self.time = BORN
        super().__init__(lambda: self.time)
        self.left = left
        self.moved: set[str] = set()
        self.over = asyncio.Event()
        self.registered = make_bundle(Shop().toolbox()).registered()

    async def due(self, limit: int) -> list[RunDoc]:
        for _ in range(min(limit, self.left)):
            doc = new_run(Request(input="x"), self.registered, run_id=f"r{self.left:05d}", now=BORN, hinted=False)
            self.insert(dict(doc))
            self.left -= 1
        return await super().due(limit)

    async def set_due(self, run: RunDoc, due: datetime | None) -> None:
        await super().set_due(run, due)
        self.moved.add(run["_id"])
        if not self.left and len(self.moved) == len(self.runs):
            self.over.set()


class Looking:
    """A scheduler over a stream; counts its looks at the broker."""

    def __init__(self, runs: int) -> None:
        self.store = Stream(runs)
        self.watched = 0
        self.scheduler = Scheduler(
            self.store, self._publish, self._lost, name="s", reply=self._reply, max_attempts=5, batch=BATCH
        )

    async def _publish(self, hints: object) -> None:
        """Nobody hears."""

    async def _lost(self) -> bool:
        self.watched += 1
        return False

    async def _reply(self, run: RunDoc) -> None:
        """Nobody waits."""


async def test_a_steady_stream_of_due_runs_starves_neither_the_heartbeat_nor_the_watch_on_the_broker() -> None:
    """Each look ends after so many runs, with a sign of life, and the next one begins with the broker."""
    looking = Looking(10 * ROUNDS * BATCH)
    for look in range(1, 4):
        looking.store.time += timedelta(seconds=1)
        assert await looking.scheduler.tick() == ROUNDS * BATCH
        assert looking.watched == look
        assert looking.store.beats["scheduler:s"]["at"] == looking.store.time


async def test_what_a_look_has_left_over_is_looked_at_without_a_pause() -> None:
    looking = Looking(3 * ROUNDS * BATCH + 1)
    running = asyncio.create_task(looking.scheduler.run(interval_s=3_600))
    async with asyncio.timeout(10):
        await looking.store.over.wait()
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    assert looking.watched == 4
