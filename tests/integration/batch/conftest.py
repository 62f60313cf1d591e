"""A yard for batches: the real MongoDB, the real submitter, bookkeeper and scheduler, an admission that lets in what
the batch's room allows, and runs that end as a test wishes."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient

from agentq.batch.submit import Order, Submission, submit_file
from agentq.engine import commit
from agentq.engine.decision import Decision, event
from agentq.run import START_STEP
from agentq.runtime.bookkeeper import Bookkeeper
from agentq.runtime.runtime import finish
from agentq.runtime.scheduler import Scheduler
from agentq.store.api import Verdict
from agentq.store.batches import Batches
from agentq.store.mongo import MongoStore
from schemas.batch import BATCH, BatchDoc, flow, run_id
from schemas.run import RUN, RunDoc
from tests.unit.runtime.world import Shop, make_bundle

BUNDLE = make_bundle(Shop().toolbox())
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of them need the servers."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.servers)


def lines(count: int, **fields: Any) -> bytes:
    """So many good lines of our format, ids m-1, m-2, ..."""
    return b"".join(
        json.dumps({"id": f"m-{n}", "input": f"question {n}", **fields}).encode() + b"\n" for n in range(1, count + 1)
    )


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 60) -> None:
    """Wait for a state."""
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110 - the state is in a database
            await asyncio.sleep(0.01)


class Yard:
    def __init__(self, store: MongoStore) -> None:
        self.store = store
        self.batches: Batches = store.batches
        self.keeper = Bookkeeper(store, store.batches, reply=self._nobody)
        self.ahead = timedelta(0)
        store.now = self._now_of(store.now)  # type: ignore[method-assign]
        store.batches._now = store.now
        store.jobs._now = store.now

    def _now_of(self, real: Any) -> Any:
        return lambda: real() + self.ahead

    async def _nobody(self, run: RunDoc) -> None:
        """Nobody waits for a reply."""

    async def submit(self, content: bytes, **order: Any) -> Submission:
        return await submit_file(self.batches, self.store.now, io.BytesIO(content), "in.jsonl", Order(**order))

    async def batch(self, batch_id: str) -> BatchDoc:
        doc = await self.batches.load(batch_id)
        assert doc is not None
        return BATCH.validate_python(doc)

    async def admit(self, batch: BatchDoc, at_most: int = 1_000_000) -> list[int]:
        """As the admission does: runs that wait, as many as the batch's room allows."""
        room = await self.batches.room()
        at_most = min(at_most, room.get(flow(batch["tenant"], batch["_id"]), at_most))
        waiting = await self.batches.waiting(batch["_id"], "", at_most) if at_most else []
        now = self.store.now()
        for run in waiting:
            await self.store.runs.update_one(
                {"_id": run["_id"], "backlog": {"$exists": True}, "status": "queued", "cancel": None},
                {
                    "$unset": {"backlog": ""}, "$inc": {"rev": 1},
                    "$set": {
                        "in_flight": True, f"steps.{START_STEP}.hints": 1, f"steps.{START_STEP}.hinted_at": now,
                        "next_due": now + timedelta(seconds=30),
                    },
                },
            )  # fmt: skip
        return [run["batch"]["line"] for run in waiting]

    async def run(self, batch: BatchDoc, line: int) -> RunDoc:
        run = await self.store.load(run_id(batch["_id"], line))
        assert run is not None
        return RUN.validate_python(run)

    async def end(self, batch: BatchDoc, which: Iterable[int], status: str = "succeeded", cost: int = 7) -> None:
        """End admitted lines as a worker's commit does."""
        await asyncio.gather(*(self._end(batch, line, status, cost) for line in which))

    async def _end(self, batch: BatchDoc, line: int, status: str, cost: int) -> None:
        await finish(self.store, self._nobody, await self.commit_end(batch, line, status, cost))

    async def commit_end(self, batch: BatchDoc, line: int, status: str = "succeeded", cost: int = 7) -> RunDoc:
        """The commit alone; its worker has still to copy the audit events out and to settle the run."""
        run = await self.run(batch, line)
        result: Any = {
            "answer": f"answer {line}", "agent": "a", "acceptance": "critic", "citations": [], "tools": [],
            "revisions": 0, "problems": [],
        }  # fmt: skip
        error = {"code": "broken", "message": "It broke.", "hint": "Mend it."}
        decision = Decision(
            [event(f"run.{status}", 1)], usage={"cost_nano_usd": cost, "input_tokens": 3, "output_tokens": 2},
            closed=tuple(run["steps"]), status=status, result=result if status == "succeeded" else None,
            error=None if status == "succeeded" else error,
        )  # fmt: skip
        planned = commit.plan(run, decision, now=self.store.now())
        assert await self.store.commit(planned) is Verdict.APPLIED
        return planned.after

    async def all_through(self, batch: BatchDoc, **how: Any) -> None:
        """All that the batch's room allows, again and again: what has ended makes room."""
        while admitted := await self.admit(batch):
            await self.end(batch, admitted, **how)
            await self.keeper.tick()
        await self.keeper.tick()

    async def schedule(self) -> None:
        """One look of the scheduler."""

        async def publish(hints: Any) -> None:
            """Nobody listens."""

        async def no() -> bool:
            return False

        await Scheduler(self.store, publish, no, name="s", reply=self._nobody, max_attempts=5).tick()

    async def results(self, batch: BatchDoc) -> list[Any]:
        return [one async for one in self.batches.by_line(batch["_id"])]


@pytest.fixture
async def yard(mongo_url: str, database: str) -> AsyncIterator[Yard]:
    store = MongoStore(mongo_url, database)
    await store.open()
    await store.register([BUNDLE])
    yield Yard(store)
    await store.close()
    with MongoClient[dict[str, Any]](mongo_url) as client:
        client.drop_database(database)


__all__ = ["Yard", "lines", "until"]
