"""The joiner in moments that a real provider seldom makes: what it did is looked at call by call."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any, cast

from agentq.llm.jobs import JobState
from agentq.run import new_run_id
from agentq.runtime.joiner import Joiner
from agentq.store.memory import MemoryStore
from agentq.store.memory_jobs import MemoryJobs
from schemas.job import JobDoc
from schemas.run import RunDoc
from tests.unit.engine.play import START, Line


class Provider:
    """Takes every job and says what was asked of it. ``broken``: jobs on which it makes us stumble; ``slow`` ones are
    told of when ``tell`` is set."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.cancelled: list[str] = []
        self.looked: list[str] = []
        self.broken: set[str] = set()
        self.slow: set[str] = set()
        self.tell = asyncio.Event()

    async def send(self, model: Any, lines: Any, name: str) -> str:
        self.sent.append(name)
        return f"at provider: {name}"

    async def cancel(self, model: Any, job_id: str) -> None:
        self.cancelled.append(job_id)

    async def look(self, model: Any, job_id: str) -> JobState:
        if job_id in self.broken:
            raise ValueError("what nobody thought of")
        if job_id in self.slow:
            await self.tell.wait()
        self.looked.append(job_id)
        return JobState(job_id, "in_progress", "file", (), None)


class Desk:
    def __init__(self) -> None:
        self.now = START
        self.store = MemoryStore(lambda: self.now)
        self.jobs = MemoryJobs(self.store)
        self.provider = Provider()
        self.hints: list[Any] = []
        made: Any = Joiner(
            self.store, cast("Any", self.jobs), cast("Any", self.provider), self._publish, name="j", reply=self._reply,
            max_attempts=5,
        )  # fmt: skip
        self.joiner: Joiner = made

    async def _publish(self, hints: Any) -> None:
        self.hints += hints

    async def _reply(self, run: RunDoc) -> None:
        """Nobody waits."""

    async def waits(self) -> RunDoc:
        """A run whose call waits for a job."""
        line = Line().deferred()
        run = cast("RunDoc", {**line.whole, "_id": new_run_id()})
        await self.store.register([line.bundle])
        self.store.runs[run["_id"]] = run
        return run

    async def job(self, **fields: Any) -> JobDoc:
        """A job of one such run, held by our joiner."""
        run = await self.waits()
        (call,) = [one for one in await self.jobs.waiting(run["joins"]["endpoint"], 99) if one.run_id == run["_id"]]
        job = await self.jobs.begin(run["joins"]["endpoint"], [call], self.joiner._name)
        await self.jobs.note(job["_id"], self.joiner._name, **fields)
        found = await self.jobs.load(job["_id"])
        assert found is not None
        return found

    async def sent(self, name: str) -> JobDoc:
        return await self.job(status="sent", provider_id=name, sent_at=self.now)


async def test_a_job_that_nobody_can_handle_keeps_no_other_from_being_looked_at() -> None:
    """And the look does not end before all of them are done: the next one would take them up a second time."""
    desk = Desk()
    broken, slow = await desk.sent("broken"), await desk.sent("slow")
    desk.provider.broken, desk.provider.slow = {"broken"}, {"slow"}
    desk.now += timedelta(seconds=1)
    tick = asyncio.create_task(desk.joiner.tick())
    while desk.jobs.docs[broken["_id"]]["due"] <= desk.now:
        await asyncio.sleep(0)
        assert not tick.done()
    assert not tick.done()
    desk.provider.tell.set()
    await tick
    assert desk.provider.looked == ["slow"]
    assert desk.jobs.docs[slow["_id"]]["due"] > desk.now


async def test_a_job_whose_calls_may_be_live_by_now_is_not_handed_in() -> None:
    desk = Desk()
    job = await desk.job()
    desk.now = job["until"]
    await desk.joiner.tick()
    assert desk.provider.sent == []
    ended = desk.jobs.docs[job["_id"]]
    assert (ended["status"], ended["error"], ended["live"]) == ("given_up", "window_at_risk", False)
    assert not any("joins" in run for run in desk.store.runs.values())
    assert [hint.attempt for _, hint in desk.hints] == [2]


async def test_of_two_who_handed_a_job_in_the_one_who_stood_still_cancels_only_what_is_too_much() -> None:
    desk = Desk()
    job = await desk.job(status="sending")
    for now_known, cancelled in (
        ({"status": "sent", "provider_id": "mine"}, []),
        ({"status": "sending", "provider_id": None}, []),  # the other may find it still
        ({"status": "sent", "provider_id": "other"}, ["mine"]),
        ({"status": "given_up", "provider_id": None, "live": False}, ["mine"]),
    ):
        desk.provider.cancelled = []
        desk.jobs.docs[job["_id"]] = cast("JobDoc", {**job, **now_known})
        await desk.joiner._cancel_second(job["_id"], cast("Any", None), "mine")
        assert desk.provider.cancelled == cancelled, now_known
