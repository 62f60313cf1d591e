"""Long queues: what still waits in them is not published again, what was lost is."""

from __future__ import annotations

import copy
from datetime import UTC, datetime, timedelta

import pytest

from agentq.protocol import Hint, Request
from agentq.run import new_run
from agentq.runtime.hearing import PROBE_HINTS, Hearing
from agentq.runtime.scheduler import Scheduler
from agentq.store.memory import MemoryStore
from tests.unit.runtime.world import Shop, make_bundle

BORN = datetime(2026, 1, 1, tzinfo=UTC)


class Crowd:
    """Many runs that wait for the router, and a scheduler that looks twice a minute."""

    def __init__(self, runs: int) -> None:
        self.time = BORN
        self.store = MemoryStore(lambda: self.time)
        self.published: list[Hint] = []
        registered = make_bundle(Shop().toolbox()).registered()
        for index in range(runs):
            doc = new_run(Request(input="x"), registered, run_id=f"r{index:05d}", now=self.time)
            self.store.insert(dict(doc))
        self.scheduler = Scheduler(self.store, self.publish, self._present, name="s", reply=self._reply, max_attempts=5)

    async def publish(self, told: object) -> None:
        self.published += [hint for _, hint in told]  # type: ignore[attr-defined]

    async def _present(self) -> bool:
        return False

    async def _reply(self, _: object) -> None:
        """Nobody waits."""

    async def heard(self, until: datetime) -> None:
        queues = {"router": {"heard": until, "wait_ms": 0, "oldest": None}}
        await self.store.beat("worker:w", {"kind": "worker", "queues": queues})

    async def pass_time(self, minutes: float, *, heard_behind: timedelta | None) -> None:
        for _ in range(int(minutes * 2)):
            self.time += timedelta(seconds=30)
            if heard_behind is not None:
                await self.heard(self.time - heard_behind)
            await self.scheduler.tick()


async def test_a_crowd_in_a_full_queue_gets_no_flood_of_hints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten minutes without a worker: a handful of probes, however many wait; then one that is far behind: no more."""
    monkeypatch.setattr(copy, "deepcopy", copy.copy)  # nobody changes a run that was read, and whole copies take long
    crowd = Crowd(3_000)
    await crowd.pass_time(10, heard_behind=None)
    assert 0 < len(crowd.published) <= 150
    before = len(crowd.published)
    await crowd.pass_time(10, heard_behind=timedelta(hours=1))
    assert len(crowd.published) - before <= 4 * PROBE_HINTS


async def test_lost_hints_are_published_again_as_soon_as_younger_ones_are_heard() -> None:
    crowd = Crowd(100)
    await crowd.pass_time(3, heard_behind=timedelta(seconds=0))
    assert {hint.run_id for hint in crowd.published} == set(crowd.store.runs)


async def test_a_quiet_queue_is_probed_and_when_the_probe_is_heard_the_rest_follows() -> None:
    crowd = Crowd(100)
    await crowd.pass_time(0.5, heard_behind=None)
    assert len(crowd.published) == PROBE_HINTS
    await crowd.pass_time(1, heard_behind=timedelta(seconds=0))
    assert {hint.run_id for hint in crowd.published} == set(crowd.store.runs)


def test_a_worker_tells_how_far_it_has_heard_and_what_waits_in_it() -> None:
    hearing = Hearing()
    first = hearing.received("router", BORN)
    second = hearing.received("router", BORN + timedelta(seconds=1))
    hearing.begun(second, BORN + timedelta(seconds=3))
    told = hearing.report()["router"]
    assert told == {"heard": BORN + timedelta(seconds=1), "wait_ms": 2000, "oldest": BORN}
    hearing.begun(first, BORN + timedelta(seconds=4))
    assert hearing.report()["router"]["oldest"] is None
    assert hearing.report()["router"]["heard"] == BORN + timedelta(seconds=1)
