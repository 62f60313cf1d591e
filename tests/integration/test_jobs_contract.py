"""What the store promises of provider jobs and of the runs that wait for them, against memory and the real MongoDB."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from agentq.engine import advance, joining
from agentq.engine.commit import Commit, plan
from agentq.engine.decision import Deferred
from agentq.engine.joining import WaitingCall
from agentq.protocol import Request
from agentq.run import new_run
from agentq.store.api import Verdict
from agentq.store.jobs import LEASE, Jobs
from agentq.store.memory import MemoryStore
from agentq.store.memory_jobs import MemoryJobs
from agentq.store.mongo import MongoStore
from schemas.job import JOB, JobDoc
from schemas.run import RUN, RunDoc
from tests.unit.runtime.world import Shop, make_bundle

BUNDLE = make_bundle(Shop().toolbox())
DAY = timedelta(days=1)
HERE, ELSEWHERE = "openai/m-1", "openai/m-1 at http://127.0.0.1/v1"


@dataclass
class Bench:
    store: MemoryStore | MongoStore
    jobs: MemoryJobs | Jobs

    async def waiting(self, run_id: str, *, ago_s: float = 0, endpoint: str = HERE) -> RunDoc:
        """A line of a batch whose first call has waited for a job for so long."""
        now = self.store.now()
        born: Any = new_run(Request(input="hello"), BUNDLE.registered(), run_id=run_id, now=now)
        born["batch"] = {"id": "batch_1", "line": 1, "custom_id": "m-1", "complete_by": now + DAY}
        await self.store.record(born)
        entered = advance.enter_run(BUNDLE, await self.run(run_id), "s1", [], 1)
        since_ms = int((now - timedelta(seconds=ago_s)).timestamp() * 1000)
        deferred = Deferred(endpoint, now + DAY / 2, since_ms)
        await self.commit(plan(entered, joining.defer(entered, "s1", deferred), now=now))
        return await self.run(run_id)

    async def commit(self, planned: Commit) -> None:
        assert await self.store.commit(planned) is Verdict.APPLIED

    async def run(self, run_id: str) -> RunDoc:
        found = await self.store.load(run_id)
        assert found is not None
        return RUN.validate_python(found)

    async def job(self, job_id: str) -> JobDoc:
        found = await self.jobs.load(job_id)
        assert found is not None
        return JOB.validate_python(found)

    async def begin(self, *run_ids: str, holder: str = "a", endpoint: str = HERE) -> JobDoc:
        now = self.store.now()
        return await self.jobs.begin(endpoint, [WaitingCall(run_id, now, now + DAY) for run_id in run_ids], holder)

    async def forget_lease(self, job_id: str) -> None:
        """Its holder has been silent for too long."""
        lease: Any = {"holder": "gone", "until": self.store.now() - 2 * LEASE}
        if isinstance(self.jobs, MemoryJobs):
            self.jobs.docs[job_id] = {**self.jobs.docs[job_id], "lease": lease}
        else:
            await self.jobs._jobs.update_one({"_id": job_id}, {"$set": {"lease": lease}})

    async def ended(self, status: str, *, took_s: float = 0, ago: timedelta = timedelta(0)) -> None:
        """An earlier job of the endpoint."""
        end = self.store.now() - ago
        job = await self.begin("r0")
        sent = {} if status == "given_up" else {"sent_at": end - timedelta(seconds=took_s)}
        assert await self.jobs.note(job["_id"], "a", status=status, live=False, ended_at=end, **sent)


@pytest.fixture(params=["memory", pytest.param("mongo", marks=pytest.mark.servers)])
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    if request.param == "memory":
        memory = MemoryStore(lambda: datetime.now(UTC).replace(microsecond=0))
        yield Bench(memory, MemoryJobs(memory))
        return
    mongo = MongoStore(request.getfixturevalue("mongo_url"), request.getfixturevalue("database"))
    await mongo.open()
    yield Bench(mongo, mongo.jobs)
    await mongo._client.drop_database(mongo._db.name)
    await mongo.close()


async def test_calls_wait_by_endpoint_the_longest_first_until_they_are_in_a_job(bench: Bench) -> None:
    for run_id, ago_s, endpoint in [("r1", 5, HERE), ("r2", 50, HERE), ("r3", 20, HERE), ("r4", 1, ELSEWHERE)]:
        await bench.waiting(run_id, ago_s=ago_s, endpoint=endpoint)
    assert await bench.jobs.endpoints() == [HERE, ELSEWHERE]
    assert [call.run_id for call in await bench.jobs.waiting(HERE, 9)] == ["r2", "r3", "r1"]
    (first,) = await bench.jobs.waiting(HERE, 1)
    joins = (await bench.run("r2"))["joins"]
    assert first == WaitingCall("r2", joins["since"], joins["until"])
    await bench.begin("r1", "r2", "r3")
    assert await bench.jobs.endpoints() == [ELSEWHERE]
    assert await bench.jobs.waiting(HERE, 9) == []


async def test_a_new_job_is_its_makers_and_has_the_calls_that_still_waited(bench: Bench) -> None:
    """Not those that are in another job, wait for another endpoint, or wait no more. Who was looked at has moved."""
    before = [await bench.waiting(run_id) for run_id in ("r1", "r2")]
    gone, other = await bench.waiting("r3"), await bench.waiting("r4", endpoint=ELSEWHERE)
    await bench.commit(plan(gone, joining.release(gone, 1, "x"), now=bench.store.now()))
    first = await bench.begin("r1")
    second = await bench.begin("r1", "r2", "r3", other["_id"], "r5", holder="b")
    assert [run["_id"] for run in await bench.jobs.members(first)] == ["r1"]
    assert [run["_id"] for run in await bench.jobs.members(second)] == ["r2"]
    assert [(await bench.run(run["_id"]))["rev"] for run in before] == [run["rev"] + 1 for run in before]
    stale = plan(before[0], joining.release(before[0], 1, "x"), now=bench.store.now())
    assert await bench.store.commit(stale) is Verdict.MOVED
    found = await bench.job(second["_id"])
    assert (found["status"], found["live"], found["tries"]) == ("open", True, 0)
    assert found["lease"] is not None
    assert found["lease"]["holder"] == "b"


async def test_members_come_by_id_in_pages_without_their_journals(bench: Bench) -> None:
    for run_id in ("r3", "r1", "r2"):
        await bench.waiting(run_id)
    job = await bench.begin("r1", "r2", "r3")
    page = await bench.jobs.members(job, limit=2)
    assert [run["_id"] for run in page] == ["r1", "r2"]
    assert [run["_id"] for run in await bench.jobs.members(job, after="r2")] == ["r3"]
    assert all("journal" not in run for run in page)
    assert sorted(await bench.jobs.runs(["r1", "r3", "nobody"])) == ["r1", "r3"]


async def test_who_leaves_a_job_waits_for_another(bench: Bench) -> None:
    await bench.waiting("r1")
    await bench.waiting("r2")
    job = await bench.begin("r1", "r2")
    rev = (await bench.run("r1"))["rev"]
    await bench.jobs.leave(["r1"], "job_x")
    assert await bench.jobs.waiting(HERE, 9) == []
    await bench.jobs.leave(["r1"], job["_id"])
    assert [call.run_id for call in await bench.jobs.waiting(HERE, 9)] == ["r1"]
    assert (await bench.run("r1"))["rev"] == rev + 1
    assert [run["_id"] for run in await bench.jobs.members(job)] == ["r2"]


async def test_a_job_is_worked_on_by_one_until_it_is_silent_for_too_long(bench: Bench) -> None:
    job_id = (await bench.begin("r1"))["_id"]
    assert await bench.jobs.take(job_id, "b") is None
    assert not await bench.jobs.note(job_id, "b", status="sent")
    mine = await bench.jobs.take(job_id, "a")
    assert mine is not None
    assert mine["status"] == "open"
    await bench.forget_lease(job_id)
    assert await bench.jobs.take(job_id, "b") is not None
    assert not await bench.jobs.note(job_id, "a", status="sent")
    assert await bench.jobs.note(job_id, "b", status="sending", calls=2, batches=["batch_1"])
    found = await bench.job(job_id)
    assert (found["status"], found["calls"], found["batches"]) == ("sending", 2, ["batch_1"])
    assert [job["_id"] for job in await bench.jobs.of_batch("batch_1")] == [job_id]
    assert await bench.jobs.note(job_id, "b", status="done", live=False)
    assert await bench.jobs.take(job_id, "b") is None
    assert await bench.jobs.of_batch("batch_1") == []


async def test_jobs_are_looked_at_when_they_are_due_the_longest_due_first(bench: Bench) -> None:
    now = bench.store.now()
    ids = [(await bench.begin("r1"))["_id"] for _ in range(4)]
    for job_id, due in zip(ids, (now - DAY / 2, now + DAY, now - DAY, now - DAY), strict=True):
        assert await bench.jobs.note(job_id, "a", due=due)
    assert await bench.jobs.note(ids[3], "a", live=False)
    assert await bench.jobs.due() == [ids[2], ids[0]]
    assert await bench.jobs.due(limit=1) == [ids[2]]
    assert {job["_id"] for job in await bench.jobs.latest(9)} == set(ids)
    assert await bench.jobs.load("job_x") is None


async def test_an_endpoint_is_judged_by_its_slowest_job_of_a_day(bench: Bench) -> None:
    assert await bench.jobs.turnaround_s(HERE) is None
    await bench.ended("done", took_s=7_000, ago=2 * DAY)
    assert await bench.jobs.turnaround_s(HERE) is None
    await bench.ended("done", took_s=60, ago=timedelta(hours=2))
    await bench.ended("done", took_s=30, ago=timedelta(hours=1))
    assert await bench.jobs.turnaround_s(HERE) == 60
    assert await bench.jobs.turnaround_s(ELSEWHERE) is None


async def test_an_endpoint_that_would_not_have_a_job_is_left_alone_for_a_while(bench: Bench) -> None:
    await bench.ended("done", took_s=60, ago=timedelta(hours=2))
    await bench.ended("given_up", ago=timedelta(minutes=20))
    assert await bench.jobs.turnaround_s(HERE) == 60
    await bench.ended("given_up", ago=timedelta(minutes=5))
    assert await bench.jobs.turnaround_s(HERE) == math.inf


async def test_a_late_answer_is_waste_once_a_job(bench: Bench) -> None:
    """Also beside a commit that had been planned before."""
    run, spent = await bench.waiting("r1"), {"late_calls": 1, "cost_nano_usd": 7}
    for job_id in ("job_1", "job_1", "job_2"):
        await bench.store.book_waste("r1", job_id, spent)
    await bench.store.book_waste("nobody", "job_1", spent)
    await bench.commit(plan(run, joining.release(run, 1, "x"), now=bench.store.now()))
    found = await bench.run("r1")
    assert (found["waste"], found["late"]) == ({"late_calls": 2, "cost_nano_usd": 14}, ["job_1", "job_2"])
    assert found["tally"]
    await bench.store.book_waste("r1", "job_1", spent)
    assert (await bench.run("r1"))["waste"]["late_calls"] == 2
