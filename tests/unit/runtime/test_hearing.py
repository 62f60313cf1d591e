"""Hints that lead to no claim: what still waits in a queue is not published again, what was lost is, and soon."""

from __future__ import annotations

import copy
from datetime import UTC, datetime, timedelta

import pytest

from agentq.protocol import Hint, Request
from agentq.run import HINT_GRACE, new_run
from agentq.runtime.hearing import PROBE_WAIT, Hearing
from agentq.runtime.scheduler import Scheduler
from agentq.store.memory import MemoryStore
from schemas.run import RunDoc
from tests.unit.runtime.world import Shop, make_bundle

BORN = datetime(2026, 1, 1, tzinfo=UTC)
ROUND_TRIP_S = 4  # a probe there, its report back, and the look after it


class Crowd:
    """Many runs that wait for the router, one worker or none, and a scheduler."""

    def __init__(self, runs: int) -> None:
        self.time = BORN
        self.store = MemoryStore(lambda: self.time)
        self.published: list[Hint] = []
        self.looks = 0
        self._set_due, self.store.set_due = self.store.set_due, self._count_look  # type: ignore[method-assign]
        registered = make_bundle(Shop().toolbox()).registered()
        for index in range(runs):
            doc = new_run(Request(input="x"), registered, run_id=f"r{index:05d}", now=self.time)
            self.store.insert(dict(doc))
        self.scheduler = Scheduler(self.store, self.publish, self._present, name="s", reply=self._reply, max_attempts=5)

    async def publish(self, told: object) -> None:
        self.published += [hint for _, hint in told]  # type: ignore[attr-defined]

    async def _count_look(self, run: RunDoc, due: datetime | None) -> None:
        self.looks += 1
        await self._set_due(run, due)

    async def _present(self) -> bool:
        return False

    async def _reply(self, _: object) -> None:
        """Nobody waits."""

    @property
    def again(self) -> set[str]:
        """The runs whose hint was published a second time."""
        return {hint.run_id for hint in self.published}

    async def heard(self, until: datetime, wait_ms: int = 0, oldest: datetime | None = None, by: str = "w") -> None:
        queues = {"router": {"heard": until, "wait_ms": wait_ms, "oldest": oldest}}
        await self.store.beat(f"worker:{by}", {"kind": "worker", "queues": queues})

    async def pass_time(self, minutes: float, *, heard_behind: timedelta | None = None, step_s: float = 30) -> None:
        """``heard_behind``: there is a worker, and what it takes out of the queue now has waited there for so long."""
        for _ in range(round(minutes * 60 / step_s)):
            self.time += timedelta(seconds=step_s)
            if heard_behind is not None:
                await self.heard(self.time - heard_behind, int(heard_behind.total_seconds() * 1000))
            await self.scheduler.tick()

    async def live(self, seconds: float, *, deaf_for: float = 0, heard: datetime = BORN) -> None:
        """A worker serves the queue and hears at once what is published, but nothing else is: there is no traffic.

        ``deaf_for``: so many seconds long it is lost on the way. ``heard``: up to where it has heard before.
        """
        start = self.time
        await self.heard(heard)
        while (self.time - start).total_seconds() < seconds:
            self.time += timedelta(seconds=0.5)
            before = len(self.published)
            await self.scheduler.tick()
            if len(self.published) > before and (self.time - start).total_seconds() >= deaf_for:
                heard = self.time
            await self.heard(heard)


async def test_a_crowd_in_a_full_queue_gets_no_flood_of_hints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten minutes without a worker: a handful of probes, however many wait; then one that is far behind: no more."""
    monkeypatch.setattr(copy, "deepcopy", copy.copy)  # nobody changes a run that was read, and whole copies take long
    crowd = Crowd(3_000)
    await crowd.pass_time(10)
    assert 0 < len(crowd.published) <= 100
    before = len(crowd.published)
    await crowd.pass_time(10, heard_behind=timedelta(hours=1))
    assert len(crowd.published) == before, "a queue that moves needs no probe"


async def test_waiting_in_a_long_queue_costs_few_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run of a queue that takes three minutes is looked at about once a minute."""
    monkeypatch.setattr(copy, "deepcopy", copy.copy)
    crowd = Crowd(300)
    await crowd.pass_time(3, heard_behind=timedelta(minutes=4), step_s=1)
    assert crowd.published == []
    assert crowd.looks <= 4 * 300


async def test_waiting_for_no_worker_costs_ever_fewer_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy, "deepcopy", copy.copy)
    crowd = Crowd(300)
    await crowd.pass_time(5, step_s=1)
    first = crowd.looks
    await crowd.pass_time(5, step_s=1)
    assert first <= 16 * 300
    assert crowd.looks - first <= 7 * 300


async def test_lost_hints_are_published_again_as_soon_as_younger_ones_are_heard() -> None:
    crowd = Crowd(100)
    await crowd.pass_time(HINT_GRACE.total_seconds() / 60, heard_behind=timedelta(seconds=0), step_s=1)
    assert crowd.again == set(crowd.store.runs)


async def test_hints_that_were_lost_in_a_quiet_queue_are_published_again_within_seconds() -> None:
    """Nothing else is published: the probe alone tells that the queue is empty."""
    crowd = Crowd(100)
    await crowd.live(HINT_GRACE.total_seconds() + ROUND_TRIP_S)
    assert crowd.again == set(crowd.store.runs)
    assert len(crowd.published) == 100, "and each of them once"


async def test_a_lost_probe_costs_seconds() -> None:
    crowd = Crowd(100)
    first = HINT_GRACE.total_seconds() + 1
    await crowd.live(first + PROBE_WAIT.total_seconds() + ROUND_TRIP_S, deaf_for=first)
    assert crowd.again == set(crowd.store.runs)


async def test_a_second_loss_is_made_good_as_soon_as_the_first() -> None:
    crowd = Crowd(50)
    until = HINT_GRACE.total_seconds() + ROUND_TRIP_S
    await crowd.live(until)
    crowd.published.clear()
    await crowd.live(until, heard=crowd.time)
    assert crowd.again == set(crowd.store.runs)


async def test_what_a_dead_worker_had_taken_out_of_the_queue_holds_nothing_up_for_long() -> None:
    """Its last words say that it had begun nothing since; others have heard more."""
    crowd = Crowd(100)
    await crowd.heard(BORN, oldest=BORN, by="dead")
    await crowd.live(HINT_GRACE.total_seconds() + ROUND_TRIP_S, heard=BORN + timedelta(seconds=5))
    assert crowd.again == set(crowd.store.runs)


async def test_a_hint_that_waits_does_not_hide_a_lease_that_runs_out() -> None:
    """Parallel steps: one waits in a long queue, the other's worker dies."""
    crowd = Crowd(1)
    run = next(iter(crowd.store.runs.values()))
    run["steps"]["s2"] = {**run["steps"]["s1"]}
    run["leases"]["s2"] = {"token": "t", "worker": "dead", "ms": 5_000, "at": BORN + timedelta(seconds=30)}
    await crowd.pass_time(38 / 60, heard_behind=timedelta(hours=1), step_s=1)
    assert next(iter(crowd.store.runs.values()))["steps"]["s2"]["attempt"] == 2


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


def test_a_client_whose_clock_is_ahead_makes_nobody_believe_in_more_than_was_heard() -> None:
    hearing = Hearing()
    hearing.begun(hearing.received("router", BORN + timedelta(hours=1)), BORN)
    assert hearing.report()["router"] == {"heard": BORN, "wait_ms": 0, "oldest": None}
