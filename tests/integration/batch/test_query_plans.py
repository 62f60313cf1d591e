"""What the loops ask again and again costs by what is open, not by what is stored."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

from pymongo import MongoClient

from agentq.engine.admission import CLASSES
from agentq.store.api import Held
from agentq.store.mongo import MongoStore
from schemas.batch import flow
from tests.integration.batch.conftest import Yard, lines


async def ask_everything(store: MongoStore, run_ids: list[str], line: str) -> None:
    """Once what scheduler, admission, bookkeeper, notifier and lease keeper ask for all of the time."""
    backlog, batches = store.backlog, store.batches
    await store.due(500)
    assert [run async for run in store.live()]
    await store.queues()
    await store.stopped(run_ids)
    await store.renew([Held(run_id, "s1", "t") for run_id in run_ids], 1_000)
    await backlog.waits(CLASSES)
    assert await backlog.waiting("batch")
    assert await backlog.heads("batch", "router", [line], 16)
    await backlog.flight()
    await backlog.ended(await backlog.flying())
    await backlog.release(500)
    await backlog.limits()
    await backlog.schedules(10)
    await batches.tally()
    for batch in await batches.live():
        await batches.under_way(batch["_id"])
        await batches.waiting(batch["_id"], "", 10)
    await batches.room()
    await ask_of_jobs(store)
    await asyncio.gather(store.deliveries.due_lanes(), store.deliveries.untold())


async def ask_of_jobs(store: MongoStore) -> None:
    """The joiner's part of it, with one call that waits and one that is in a job."""
    now = store.now()
    for number, job in enumerate([None, "job_1"]):
        joins = {"endpoint": "openai/m", "since": now, "until": now, **({"job": job} if job else {})}
        await store.runs.insert_one({"_id": f"r-waits-{number}", "joins": joins, "next_due": None})
    assert await store.jobs.endpoints() == ["openai/m"]
    (waiting,) = await store.jobs.waiting("openai/m", 10)
    job_doc = await store.jobs.begin("openai/m", [waiting], "me")
    assert await store.jobs.due() == [job_doc["_id"]]
    assert [run["_id"] for run in await store.jobs.members(job_doc)] == [waiting.run_id]
    await store.jobs.turnaround_s("openai/m")
    await store.jobs.of_batch("batch_1")


async def test_no_loop_reads_the_whole_collection_of_runs(yard: Yard, mongo_url: str, database: str) -> None:
    """Every half second the scheduler read all runs there had ever been, because MongoDB does not see that a time
    below another is a date, which is what the index of due runs holds."""
    batch = (await yard.submit(lines(60))).batch
    admitted = await yard.admit(batch, 40)
    await yard.end(batch, admitted[:20])
    await yard.commit_end(batch, admitted[20])
    await yard.batches.set_budget(batch["_id"], 10_000)
    ids = [(await yard.run(batch, line))["_id"] for line in admitted[20:]]
    yard.ahead = timedelta(minutes=1)
    with MongoClient[dict[str, Any]](mongo_url) as client:
        client[database].command("profile", 2)
        await ask_everything(yard.store, ids, flow("default", batch["_id"]))
        client[database].command("profile", 0)
        asked = list(
            client[database]["system.profile"].find({"ns": {"$in": [f"{database}.runs", f"{database}.provider_jobs"]}})
        )
    assert len(asked) > 15
    whole = [one["command"] for one in asked if one.get("planSummary") == "COLLSCAN"]
    assert whole == []
