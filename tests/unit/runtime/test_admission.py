"""The admission's loop: what is slow holds nobody up, a lost lease stops it, who rests takes no place."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest

from agentq.engine import advance
from agentq.engine.commit import plan
from agentq.engine.window import Window
from agentq.errors import AgentqError
from agentq.protocol import Request
from agentq.run import LEAST_COST, new_run
from agentq.runtime.admission import CALM_S, LEASE_MS, Admission
from agentq.runtime.flights import Flights
from agentq.store.backlog import Limit
from agentq.store.memory import MemoryStore
from agentq.store.memory_backlog import MemoryBacklog
from tests.unit.runtime.world import Shop, make_bundle

BUNDLE = make_bundle(Shop().toolbox())


class Spied(MemoryBacklog):
    """A backlog that notes what is asked of it, and may do something before it answers."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__(store)
        self.store = store
        self.asked: list[str] = []
        self.before: dict[str, Callable[[], Awaitable[None]]] = {}

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name.startswith("_") or not asyncio.iscoroutinefunction(value) or name == "born":
            return value

        async def asked(*args: Any) -> Any:
            self.asked.append(name)
            if name in self.before:
                await self.before[name]()
            return await value(*args)

        return asked

    def born(self, run_id: str, *, waits: bool = True, cost: int = 1_000_000, **fields: Any) -> None:
        doc = new_run(
            Request(input="hello", **fields), BUNDLE.registered(), run_id=run_id, now=self.now(), waits=waits, cost=cost
        )
        self.store.insert(dict(doc))

    def in_flight(self, run_id: str) -> bool:
        return bool(self.store.runs[run_id].get("in_flight"))


class Desk:
    """An admission whose time a test sets."""

    def __init__(self, **options: Any) -> None:
        self.time_s = 100.0
        self.backlog = Spied(MemoryStore(lambda: datetime.now(UTC)))
        self.admission = Admission(
            self.backlog, self.queues, self.publish, name="a", clock=lambda: self.time_s, **options
        )

    async def queues(self) -> dict[Any, Any]:
        return {}

    async def publish(self, hints: Any) -> None:
        """Nobody listens."""

    async def tick(self, passed_s: float = 0.1) -> int:
        self.time_s += passed_s
        assert await self.admission._lead()
        return await self.admission.tick()

    @asynccontextmanager
    async def running(self) -> Any:
        running = asyncio.create_task(self.admission.run())
        yield
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - the state is in a document
            await asyncio.sleep(0.01)


async def test_a_sweep_of_turns_that_never_ends_holds_up_nobody() -> None:
    desk = Desk()
    desk.backlog.before["release"] = asyncio.Event().wait  # type: ignore[assignment]
    async with desk.running():
        await until(lambda: "release" in desk.backlog.asked)
        desk.backlog.born("r1")
        await until(lambda: desk.backlog.in_flight("r1"))


async def test_recurring_requests_that_are_slow_to_hand_in_hold_up_nobody() -> None:
    began = asyncio.Event()

    async def hand_in(_: Any) -> None:
        began.set()
        await asyncio.Event().wait()

    desk = Desk(hand_in=hand_in)

    async def due(_: int) -> list[dict[str, Any]]:
        return [{"_id": "nightly"}]

    desk.backlog.schedules = due  # type: ignore[method-assign, assignment]
    async with desk.running():
        await asyncio.wait_for(began.wait(), 20)
        desk.backlog.born("r1")
        await until(lambda: desk.backlog.in_flight("r1"))


async def test_a_tick_that_takes_long_prolongs_the_lease_before_it_lets_runs_in() -> None:
    desk = Desk()

    async def slow() -> None:
        desk.time_s += 0.8 * LEASE_MS / 1000

    desk.backlog.before["heads"] = slow
    desk.backlog.born("r1")
    assert await desk.tick() == 1
    assert desk.backlog.asked.count("lead") == 2


async def test_a_leader_that_loses_its_lease_in_a_tick_lets_nobody_in() -> None:
    """Whether it notices because the time is over or because another has the lease."""
    for passed_s, other in ((LEASE_MS / 1000 + 1, False), (0.8 * LEASE_MS / 1000, True)):
        desk = Desk()
        desk.backlog.born("r1")

        async def slow(desk: Desk = desk, passed_s: float = passed_s, other: bool = other) -> None:
            desk.time_s += passed_s
            if other:
                desk.backlog._leader = "b", datetime.max.replace(tzinfo=UTC)

        desk.backlog.before["heads"] = slow
        with pytest.raises(AgentqError, match="leads the admission no more"):
            await desk.tick()
        assert not desk.backlog.in_flight("r1")


async def test_the_lease_is_looked_at_after_the_last_wait_before_the_write() -> None:
    desk = Desk()
    desk.backlog.known_limits["default"] = Limit(per_minute=5)

    async def slow() -> None:
        desk.time_s += LEASE_MS / 1000 + 1

    desk.backlog.before["remember"] = slow
    desk.backlog.born("r1")
    with pytest.raises(AgentqError, match="leads the admission no more"):
        await desk.tick()
    assert not desk.backlog.in_flight("r1")


async def test_what_waits_and_may_not_go_is_looked_at_less_often_and_a_newcomer_at_once() -> None:
    """A batch that is paused or was left half submitted, and nothing in flight."""

    async def closed() -> dict[str, int]:
        return {"bulk": 0}

    desk = Desk(room=closed)
    for index in range(5):
        desk.backlog.born(f"b{index}", tenant="bulk", priority="batch")
    await desk.tick()
    desk.backlog.asked.clear()
    seconds = 10
    for _ in range(10 * seconds):
        assert await desk.tick() == 0
    assert desk.backlog.asked.count("flight") <= seconds / CALM_S + 1 + seconds  # once a second for the clients
    assert len(desk.backlog.asked) / seconds < 30
    await desk.tick()
    desk.backlog.born("r1", priority="interactive")
    assert await desk.tick() == 1
    assert desk.backlog.in_flight("r1")


async def test_runs_that_rest_take_no_place_of_those_that_could_go() -> None:
    """Paused, or waiting for a person: for weeks, perhaps."""
    desk = Desk(window=4)
    for index in range(20):
        desk.backlog.born(f"p{index:02d}", waits=False)
        desk.backlog.store.runs[f"p{index:02d}"]["status"] = ("paused", "waiting")[index % 2]
    for index in range(9):
        desk.backlog.born(f"r{index}")
    assert await desk.tick() == 4
    await desk.tick(1.1)
    gate = await desk.backlog.remembered("gate")
    assert gate is not None
    active = sum(desk.backlog.in_flight(f"r{index}") for index in range(9))
    assert gate["room"] == max(0, desk.admission._windows["router"].size - active)


async def test_a_run_dearer_than_the_whole_cap_goes_alone() -> None:
    desk = Desk()
    desk.backlog.known_limits["default"] = Limit(spend=1_000)
    desk.backlog.born("r1", cost=5_000)
    desk.backlog.born("r2", cost=10)
    assert await desk.tick() == 1
    assert desk.backlog.in_flight("r1")
    assert await desk.tick() == 0
    await _end(desk.backlog, "r1")
    assert await desk.tick() == 1
    assert desk.backlog.in_flight("r2")


async def test_what_waits_for_a_providers_job_counts_for_a_cap_on_spend_and_takes_no_place() -> None:
    """Its money is as good as spent; that is what the cap is for."""
    desk = Desk()
    desk.backlog.known_limits["default"] = Limit(in_flight=1, spend=1_000)
    for run_id in ("r1", "r2", "r3"):
        desk.backlog.born(run_id, cost=500)
    for run_id in ("r1", "r2"):
        assert await desk.tick() == 1
        assert desk.backlog.in_flight(run_id)
        joins: Any = {"step": "s1", "endpoint": "openai/m", "since": desk.backlog.now(), "until": desk.backlog.now()}
        desk.backlog.store.runs[run_id] |= {"status": "waiting", "joins": joins}  # type: ignore[typeddict-item]
    assert await desk.tick() == 0
    await _end(desk.backlog, "r1")
    assert await desk.tick() == 1


async def _end(backlog: Spied, run_id: str) -> None:
    run = await backlog.store.load(run_id)
    assert run is not None
    await backlog.store.commit(plan(run, advance.cancel(run, 1), now=backlog.now()))


async def test_only_what_was_charged_is_corrected_when_it_ends() -> None:
    """No credit for a run that went straight to its pool, nor for one that a leader before had let in."""
    backlog = Spied(MemoryStore(lambda: datetime.now(UTC)))
    backlog.born("straight", waits=False, cost=900)
    backlog.born("mine", cost=500)
    flights = Flights(backlog)
    await flights.look(1.0)
    assert await backlog.admit(["mine"]) == {"mine"}
    flights.admitted("mine", "router", "standard", "default", 500)
    assert await flights.look(2.0) == []
    await _end(backlog, "straight")
    await _end(backlog, "mine")
    assert [difference for *_, difference in await flights.look(3.0)] == [LEAST_COST - 500]
    assert flights.rate("router") == 2.0, "both count as ended"
    assert await flights.look(4.0) == []


async def test_a_class_that_had_nothing_to_do_is_as_fast_as_when_it_had() -> None:
    """Or the first request after a night would be told that it waits for years."""
    desk = Desk()
    for index in range(4):
        desk.backlog.born(f"r{index}", waits=False)
    flights = Flights(desk.backlog)
    await flights.look(1.0)
    for index in range(4):
        await _end(desk.backlog, f"r{index}")
    await flights.look(2.0)
    for second in range(3, 600):
        await flights.look(float(second))
    assert flights.told()["rates"] == {"standard": 4.0}
    assert flights.ending() < 0.01


async def test_a_run_that_comes_behind_the_last_known_of_its_line_is_let_in_at_the_next_look() -> None:
    """Its line was just fetched and used up; it does not wait until that is forgotten."""
    desk = Desk()
    for index in range(6):
        desk.backlog.born(f"r{index}")
        await desk.tick()
        assert desk.backlog.in_flight(f"r{index}")


async def test_who_was_let_in_at_a_look_does_not_make_the_next_ones_wait() -> None:
    """Requests that come one at a time go straight again as soon as a jam is over."""
    desk = Desk()
    for index in range(3):
        desk.backlog.born(f"r{index}")
        await desk.tick(1)
        told = await desk.backlog.remembered("gate")
        assert told is not None
        assert told["waiting"] == []


async def test_while_nothing_waits_a_whole_workers_room_and_what_ends_meanwhile_goes_straight() -> None:
    """A window that an earlier jam made small is no reason to send a quiet system's requests to the backlog."""
    desk = Desk()
    assert await desk.admission._lead()
    desk.admission._windows["router"] = Window(8)
    desk.admission._flights._class_rates["standard"] = 40.0
    await desk.tick(1)
    told = await desk.backlog.remembered("gate")
    assert told is not None
    assert told["room"] == 256 + 40


async def test_a_more_urgent_run_is_seen_though_the_line_is_known_already() -> None:
    desk = Desk(window=2)
    for index in range(9):
        desk.backlog.born(f"r{index}")
    assert await desk.tick() == 2
    desk.backlog.born("urgent", urgency=9)
    await _end(desk.backlog, "r0")
    assert await desk.tick() == 1
    assert desk.backlog.in_flight("urgent")


async def test_lines_are_read_together_and_what_is_known_of_them_is_used_up_first() -> None:
    """Ten tenants: one question for all of their lines, none for the runs that it brought, one write a tick."""
    desk = Desk(window=10)
    for index in range(150):
        desk.backlog.born(f"r{index:03d}", tenant=f"t{index % 10}")
    admitted, ticks = 0, 0
    while admitted < 150:
        admitted, ticks = admitted + await desk.tick(), ticks + 1
        for run_id in [run["_id"] for run in desk.backlog.store.runs.values() if run.get("in_flight")]:
            await _end(desk.backlog, run_id)
    assert desk.backlog.asked.count("admit") == ticks
    assert desk.backlog.asked.count("heads") == 1


async def test_while_there_is_no_place_it_is_only_asked_what_is_in_flight_and_whether_a_class_waits() -> None:
    desk = Desk(window=2)
    for index in range(9):
        desk.backlog.born(f"r{index}", priority="batch")
    await desk.tick()
    desk.admission._windows["router"] = Window(2, 2)
    for run in desk.backlog.store.runs.values():
        run["status"] = "running" if run.get("in_flight") else run["status"]
    await desk.tick()
    desk.backlog.asked.clear()
    await desk.tick()
    assert set(desk.backlog.asked) == {"waits", "flight"}


async def test_the_more_flows_wait_the_less_often_it_is_looked_who_they_are() -> None:
    """A look reads each of them; one who comes meanwhile to a class in which nothing waited is seen all the same."""
    desk = Desk(window=1_000)
    for index in range(400):
        desk.backlog.born(f"b{index:03d}", tenant=f"t{index}", priority="batch")
        desk.backlog.born(f"c{index:03d}", tenant=f"t{index}", priority="batch")
    desk.backlog.known_limits = {f"t{index}": Limit(in_flight=1) for index in range(400)}
    assert await desk.tick() == 400
    desk.backlog.asked.clear()
    for _ in range(10):
        await desk.tick()
    assert 3 <= desk.backlog.asked.count("waiting") <= 6
    desk.backlog.born("s1", tenant="new", priority="standard")
    assert await desk.tick() == 1


async def test_a_run_that_may_not_go_any_more_costs_its_tenant_nothing() -> None:
    """Its line was known; it was paused after that."""
    desk = Desk(window=1)
    for index in range(3):
        desk.backlog.born(f"r{index}")
    await desk.tick()
    served = desk.admission._books["router"].ledgers["standard"].tenants["default"]
    desk.backlog.store.runs["r1"]["status"] = "paused"
    await _end(desk.backlog, "r0")
    assert await desk.tick() == 1
    assert desk.backlog.in_flight("r2")
    assert desk.admission._books["router"].ledgers["standard"].tenants["default"] == 2 * served


async def test_a_line_whose_first_run_may_not_go_is_not_read_at_each_look() -> None:
    """Ten thousand that are being cancelled stand before the others for a while; each reading passes over them all."""
    desk = Desk(window=1)
    for index in range(30):
        desk.backlog.born(f"r{index:02d}")
    desk.backlog.store.runs["r00"]["status"] = "paused"
    for _ in range(10):
        await desk.tick()
        for run_id in [run["_id"] for run in desk.backlog.store.runs.values() if run.get("in_flight")]:
            await _end(desk.backlog, run_id)
    assert desk.backlog.asked.count("heads") <= 2
    desk.backlog.store.runs["r00"]["status"] = "queued"
    await desk.tick(1.1)
    assert desk.backlog.in_flight("r00"), "its turn has not been forgotten"
