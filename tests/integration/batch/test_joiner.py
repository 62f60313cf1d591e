"""Calls that wait for the provider's batch endpoint, on the real MongoDB and over real HTTP: half the price, each call
paid once whatever fails, and done within the window whatever the provider does."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Annotated, Any

import aiohttp
import pytest
from pydantic import Field

from agentq.engine.joining import WaitingCall, window
from agentq.engine.replay import agrees
from agentq.llm.endpoints import Provider
from agentq.llm.http import HttpLlm
from agentq.llm.jobs import OpenAiJobs
from agentq.offline.faults import Scenario, parse_scenario
from agentq.offline.server import Running, offline_server
from agentq.protocol import POOLS, Hint, Pool
from agentq.run import START_STEP
from agentq.runtime.joiner import Joiner
from agentq.runtime.leases import LeaseKeeper
from agentq.runtime.runtime import Runtime, no_crash
from agentq.runtime.scheduler import Scheduler
from agentq.tools import tool
from agentq.tools.declare import declared_tool
from agentq.tools.toolbox import Toolbox
from schemas.batch import BatchDoc
from schemas.catalog import BatchEndpoint, Bundle
from schemas.run import RunDoc
from tests.integration.batch.conftest import Yard, lines
from tests.unit.runtime.world import make_bundle

LINES = 6
DAY = timedelta(days=1)
Number = Annotated[str, Field(pattern=r"^[A-Z]-\d{4}$", description="Order number, for example A-1702.")]


@tool()
def get_order_status(order_number: Number) -> str:
    """Look up an order by its number: its status, items and delivery."""
    return f"Order {order_number} was shipped on Monday."


class Killed(BaseException):
    """The process is gone."""


def make_toolbox() -> Toolbox:
    found = declared_tool(get_order_status)
    assert found is not None
    return Toolbox([found])


def with_endpoint(**endpoint: Any) -> Bundle:
    made = make_bundle(make_toolbox(), tools=["get_order_status"])
    spec = BatchEndpoint(**{"turnaround_s": 600, "gather_s": 0, **endpoint})
    return made.model_copy(update={"models": {"m": made.models["m"].model_copy(update={"batch_endpoint": spec})}})


class Works:
    """A worker and a joiner in this process; hints are a list, time passes when a test says so."""

    def __init__(self, yard: Yard, server: Running, bundle: Bundle) -> None:
        self.yard, self.server, self.bundle = yard, server, bundle
        self.hints: list[tuple[Pool, Hint]] = []
        providers = {"openai": Provider(f"{server.url}/v1")}
        self.llm, self.provider = HttpLlm(providers), OpenAiJobs(providers)
        self.worker = Runtime(
            yard.store, self.llm, make_toolbox(), self.publish, pools=POOLS, worker="w", keeper=LeaseKeeper(30_000)
        )
        self.joiner = self.new_joiner()

    def new_joiner(self, crash: Callable[[str], None] = no_crash) -> Joiner:
        return Joiner(
            self.yard.store, self.yard.store.jobs, self.provider, self.publish, name="j", reply=self.yard._nobody,
            max_attempts=5, crash=crash,
        )  # fmt: skip

    async def publish(self, hints: Sequence[tuple[Pool, Hint]]) -> None:
        self.hints += hints

    async def close(self) -> None:
        await self.llm.close()
        await self.provider.close()

    async def begin(self, count: int = LINES, **order: Any) -> BatchDoc:
        """A batch with a window of a day whose lines have all been admitted."""
        content = lines(count, input="What is the status of my order A-1702?")
        now = self.yard.store.now()
        batch = (await self.yard.submit(content, complete_by=now + DAY, **order)).batch
        for line in await self.yard.admit(batch):
            self.hints.append(("router", Hint((await self.yard.run(batch, line))["_id"], START_STEP, 1)))
        return batch

    async def work(self) -> None:
        """The worker does all that pools have been told."""
        while self.hints:
            hints, self.hints = self.hints, []
            await asyncio.gather(*(self.worker.handle(pool, [hint]) for pool, hint in hints))

    async def schedule(self) -> None:
        """One look of the scheduler."""
        await Scheduler(
            self.yard.store, self.publish, self.never, name="s", reply=self.yard._nobody, max_attempts=5
        ).tick()

    async def never(self) -> bool:
        return False

    async def tick_on(self, minutes: int = 10) -> None:
        """Only the joiner works."""
        for _ in range(minutes):
            await self.joiner.tick()
            self.yard.ahead += timedelta(minutes=1)

    async def until_ended(self, batch: BatchDoc, step: timedelta = timedelta(minutes=10)) -> BatchDoc:
        """Let the system work, and time pass, until the batch has ended."""
        for _ in range(200):
            for act in (self.joiner.tick, self.schedule, self.yard.keeper.tick):
                await self.work()
                await act()
            found = await self.yard.batch(batch["_id"])
            if not found["live"]:
                return found
            self.yard.ahead += step
        raise AssertionError("the batch does not end")

    async def runs(self, batch: BatchDoc) -> list[RunDoc]:
        found = [await self.yard.run(batch, line) for line in range(1, batch["submitted"]["good"] + 1)]
        return [await self.whole(run["_id"]) for run in found]

    async def whole(self, run_id: str) -> RunDoc:
        run = await self.yard.store.load(run_id, journal=True)
        assert run is not None
        return run

    async def calls(self) -> list[dict[str, Any]]:
        """What the provider was paid for."""
        async with aiohttp.ClientSession() as session, session.get(f"{self.server.url}/_calls") as response:
            told = await response.json()
        return [call for call in told["calls"] if call["status"] == 200]

    async def scenario(self, **content: Any) -> None:
        async with (
            aiohttp.ClientSession() as session,
            session.post(self.server.url + "/_scenario", json=content) as said,
        ):
            assert said.status == 200, await said.text()

    async def release_leases(self) -> None:
        """The leases of a joiner that died have run out."""
        await self.yard.store.jobs._jobs.update_many({}, {"$set": {"lease": None}})

    def bill(self, calls: Sequence[dict[str, Any]], run: RunDoc) -> Counter[str]:
        """How often the run's calls were made, by step."""
        keys = [call["key"].replace(":", "-").split("-") for call in calls]
        return Counter(key[1] for key in keys if key[0] == run["_id"])


@asynccontextmanager
async def works(yard: Yard, bundle: Bundle | None = None, **scenario: Any) -> AsyncIterator[Works]:
    bundle = bundle or with_endpoint()
    await yard.store.register([bundle])
    told = parse_scenario(scenario, "test") if scenario else Scenario()
    async with offline_server(scenario=told) as server:
        made = Works(yard, server, bundle)
        try:
            yield made
        finally:
            await made.close()


async def check(
    made: Works, batch: BatchDoc, *, live: int, waste: bool = False, step: timedelta = timedelta(minutes=10)
) -> None:
    """Every line succeeded; each call was paid once, ``live`` of them at the full price; sums and journals agree."""
    ended = await made.until_ended(batch, step)
    runs = await made.runs(batch)
    assert {run["status"] for run in runs} == {"succeeded"}, [run["error"] for run in runs]
    calls = await made.calls()
    assert sum(call["batch"] == "" for call in calls) == live
    if not waste:
        for run in runs:
            assert set(made.bill(calls, run).values()) == {1}
            assert sum(made.bill(calls, run).values()) == run["usage"]["llm_calls"]
        assert ended["waste_nano_usd"] == 0
    spent = [run["usage"]["cost_nano_usd"] + run["waste"].get("cost_nano_usd", 0) for run in runs]
    assert ended["cost_nano_usd"] == sum(spent)
    for run in runs:
        assert agrees({made.bundle.hash: made.bundle}, run)
        assert "joins" not in run


async def test_a_batch_with_a_window_goes_through_the_endpoint_at_half_the_price(yard: Yard) -> None:
    async with works(yard) as made:
        first = await made.begin(1, live=True)
        await check(made, first, live=4)
        (at_full_price,) = [run["usage"]["cost_nano_usd"] for run in await made.runs(first)]
        batch = await made.begin()
        await check(made, batch, live=4)
        assert {run["usage"]["cost_nano_usd"] for run in await made.runs(batch)} == {at_full_price // 2}
        jobs = await yard.store.jobs.latest(10)
        assert [(job["status"], job["calls"], job["answered"]) for job in jobs] == [("done", LINES, LINES)] * 4
        assert sum(job["cost_nano_usd"] for job in jobs) == LINES * at_full_price // 2
        assert {tuple(job["batches"]) for job in jobs} == {(batch["_id"],)}


async def test_a_batch_without_a_window_is_not_kept_waiting(yard: Yard) -> None:
    async with works(yard) as made:
        now = yard.store.now()
        batch = (await yard.submit(lines(1, input="What is the status of my order A-1702?"))).batch
        await yard.admit(batch)
        made.hints.append(("router", Hint((await yard.run(batch, 1))["_id"], START_STEP, 1)))
        await made.work()
        assert (await yard.run(batch, 1))["status"] == "succeeded"
        assert yard.store.now() - now < timedelta(minutes=1)


async def test_a_waiting_run_keeps_nobody_from_a_place(yard: Yard) -> None:
    async with works(yard, with_endpoint(gather_s=3_600)) as made:
        batch = await made.begin()
        await made.work()
        await made.joiner.tick()
        assert {run["status"] for run in await made.runs(batch)} == {"waiting"}
        assert await yard.store.backlog.flight() == []
        assert await yard.store.jobs.latest(1) == [], "it still gathers"
        assert await made.calls() == []


async def test_a_job_that_takes_too_long_is_given_up_and_its_calls_are_made_live_within_the_window(yard: Yard) -> None:
    async with works(yard, batches={"stuck": True}) as made:
        batch = await made.begin()
        began = yard.store.now()
        await check(made, batch, live=LINES * 4)
        ended = await yard.batch(batch["_id"])
        assert ended["status"] == "completed"
        assert yard.store.now() <= began + DAY
        (job,) = await yard.store.jobs.latest(10)
        assert (job["status"], job["answered"]) == ("done", 0)


async def test_what_a_given_up_job_has_answered_is_used_and_paid_once(yard: Yard) -> None:
    async with works(yard, batches={"stuck": True, "partial": 0.5}) as made:
        batch = await made.begin()
        await check(made, batch, live=LINES * 4 - LINES // 2)


async def test_a_job_whose_creation_was_not_heard_of_is_found_by_its_name(yard: Yard) -> None:
    async with works(yard, batches={"lose_answer": True, "times": 1}) as made:
        batch = await made.begin()
        await check(made, batch, live=0)
        assert len({call["batch"] for call in await made.calls()}) == 4


@pytest.mark.parametrize(("point", "nth"), [("job_sending", 1), ("job_sent", 1), ("job_answer_in", 3)])
async def test_a_scheduler_that_dies_over_a_job_costs_no_call_twice(yard: Yard, point: str, nth: int) -> None:
    passed = Counter[str]()

    def crash(at: str) -> None:
        passed[at] += 1
        if at == point and passed[at] == nth:
            raise Killed

    async with works(yard) as made:
        batch = await made.begin()
        await made.work()
        made.joiner = made.new_joiner(crash)
        with pytest.raises(Killed):
            await made.tick_on()
        made.joiner = made.new_joiner()
        await made.release_leases()
        await check(made, batch, live=0, step=timedelta(seconds=20))  # a step that nobody was told of is found soon


async def test_an_endpoint_that_refuses_leaves_every_call_to_be_made_live(yard: Yard) -> None:
    async with works(yard, batches={"refuse": 400}) as made:
        batch = await made.begin()
        await check(made, batch, live=LINES * 4, step=timedelta(minutes=3))
        assert [job["status"] for job in await yard.store.jobs.latest(10)].count("given_up") < 4, "not asked each time"


async def test_an_endpoint_that_is_busy_is_asked_again(yard: Yard) -> None:
    async with works(yard, batches={"refuse": 503, "times": 3}) as made:
        batch = await made.begin()
        await check(made, batch, live=0)


async def test_a_call_that_fails_in_its_job_is_tried_again_live(yard: Yard) -> None:
    rule = {"name": "one fails", "match": {"purpose": "critique"}, "action": {"status": 429}, "times": 1}
    async with works(yard, rules=[rule]) as made:
        batch = await made.begin()
        await check(made, batch, live=1)


async def test_an_answer_that_cannot_be_read_is_a_lost_call(yard: Yard) -> None:
    rule = {"name": "half a line", "match": {"purpose": "critique"}, "action": {"malformed": True}, "times": 1}
    async with works(yard, rules=[rule]) as made:
        batch = await made.begin()
        await check(made, batch, live=1, waste=True)
        assert [run["waste"].get("lost_calls", 0) for run in await made.runs(batch)].count(1) == 1


async def test_a_cancelled_batch_cancels_its_jobs_and_pays_for_what_was_answered_once(yard: Yard) -> None:
    """Also when the answers are looked at twice."""
    async with works(yard, batches={"stuck": True, "partial": 0.5}) as made:
        batch = await made.begin()
        await made.work()
        await made.joiner.tick()
        assert len(await made.calls()) == LINES // 2
        await yard.batches.move(batch["_id"], ["in_progress"], "cancelling", ending="cancelled")
        ended = await made.until_ended(batch)
        for _ in range(3):
            yard.ahead += timedelta(minutes=10)
            await made.joiner.tick()
        (job,) = await yard.store.jobs.latest(10)
        assert job["status"] == "done"
        await yard.store.jobs._jobs.update_many({}, {"$set": {"status": "sent", "live": True, "lease": None}})
        await yard.keeper.tick()
        await made.joiner.tick()
        await yard.keeper.tick()
        ended = await yard.batch(batch["_id"])
        assert ended["counts"]["cancelled"] == LINES
        runs = await made.runs(batch)
        assert [run["waste"].get("late_calls", 0) for run in runs].count(1) == LINES // 2
        assert ended["cost_nano_usd"] == ended["waste_nano_usd"] == job["cost_nano_usd"] > 0


async def test_without_a_joiner_the_scheduler_makes_calls_live_and_late_answers_are_waste(yard: Yard) -> None:
    async with works(yard, batches={"seconds": 0}) as made:
        batch = await made.begin()
        await made.work()
        await made.joiner.tick()  # handed in, and answered; then no joiner looks for most of the window
        run = await yard.run(batch, 1)
        yard.ahead += window(run["created_at"], run["batch"]["complete_by"]).live_at - yard.store.now()
        for _ in range(5):
            await made.schedule()
            await made.work()
        assert (await yard.run(batch, 1))["status"] == "succeeded"
        await made.joiner.tick()
        runs = await made.runs(batch)
        assert {run["waste"]["late_calls"] for run in runs} == {1}
        await check(made, batch, live=LINES * 4, waste=True)


async def test_an_endpoint_that_has_become_slow_is_not_waited_for(yard: Yard) -> None:
    async with works(yard, batches={"seconds": 0}) as made:
        now = yard.store.now()
        seen = await yard.store.jobs.begin("openai/m-1", [WaitingCall("r0", now, now)], "x")
        slow = {"status": "done", "live": False, "sent_at": now - DAY, "ended_at": now, "error": None}
        await yard.store.jobs._jobs.update_one({"_id": seen["_id"]}, {"$set": slow})
        batch = await made.begin()
        await check(made, batch, live=LINES * 4)
