"""Provider jobs on MongoDB, and the runs that wait for them. A part of the store.

A run says itself which job its call is in, so a call is in one job at the most; a job is worked on by the scheduler
that holds its lease.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, cast

from pymongo import ASCENDING, DESCENDING, IndexModel, ReturnDocument
from pymongo.asynchronous.database import AsyncDatabase

from agentq.engine.joining import WaitingCall
from agentq.store.documents import WITHOUT_JOURNAL
from schemas.job import JOB_FORMAT, JobDoc, new_job_id
from schemas.run import RunDoc

Doc = dict[str, Any]
LEASE = timedelta(seconds=60)
SEEN_JOBS = 8  # what an endpoint's turnaround is judged by
REMEMBERED = timedelta(days=1)  # an endpoint that was slow then is tried again
LEFT_ALONE = timedelta(minutes=10)  # one that would not have a job is not asked again so soon

RUN_INDEXES = [
    IndexModel(
        [("joins.endpoint", ASCENDING), ("joins.job", ASCENDING), ("joins.since", ASCENDING)],
        name="joins",
        partialFilterExpression={"joins.endpoint": {"$exists": True}},
    ),
    IndexModel(
        [("joins.job", ASCENDING), ("_id", ASCENDING)],
        name="job",
        partialFilterExpression={"joins.job": {"$exists": True}},
    ),
]
JOB_INDEXES = [
    IndexModel([("due", ASCENDING)], name="due", partialFilterExpression={"live": True}),
    IndexModel([("endpoint", ASCENDING), ("ended_at", DESCENDING)], name="seen"),
    IndexModel([("batches", ASCENDING)], name="batches", partialFilterExpression={"live": True}),
]


def new_job(endpoint: str, calls: Sequence[WaitingCall], holder: str, now: datetime) -> JobDoc:
    """The document of a job for these calls, leased to ``holder``; none of them is marked yet."""
    return {
        "_id": new_job_id(int(now.timestamp() * 1000)), "v": JOB_FORMAT, "endpoint": endpoint, "status": "open",
        "live": True, "calls": 0, "batches": [], "created_at": now, "until": min(call.until for call in calls),
        "due": now, "tries": 0, "lease": {"holder": holder, "until": now + LEASE}, "answered": 0,
        "cost_nano_usd": 0, "error": None,
    }  # fmt: skip


def expected_s(latest: Sequence[Mapping[str, Any]], now: datetime) -> float | None:
    """How long an endpoint is to be expected to take, by its latest jobs, the newest first; see
    ``Jobs.turnaround_s``."""
    if latest and latest[0]["status"] == "given_up" and latest[0]["ended_at"] > now - LEFT_ALONE:
        return math.inf
    took = [(job["ended_at"] - job["sent_at"]).total_seconds() for job in latest if job["status"] == "done"]
    return max(took, default=None)


class Jobs:
    """Belongs to a ``MongoStore``, which gives its connection, its clock and how errors are translated."""

    def __init__(
        self,
        db: AsyncDatabase[Doc],
        now: Callable[[], datetime],
        answer: Callable[[Awaitable[Any]], Awaitable[Any]],
    ) -> None:
        self._runs = db["runs"]
        self._jobs = db["provider_jobs"]
        self._now = now
        self._answer = answer

    async def open(self) -> None:
        """Make sure of the indexes."""
        await self._answer(self._runs.create_indexes(RUN_INDEXES))
        await self._answer(self._jobs.create_indexes(JOB_INDEXES))

    # -- gathering --------------------------------------------------------------------------------------------------

    async def endpoints(self) -> list[str]:
        """The endpoints for which a call waits that is in no job. One seek each, however many calls wait."""
        found: list[str] = [""]
        while True:
            others = {"joins.endpoint": {"$gt": found[-1]}, "joins.job": None}
            following = self._runs.find_one(others, {"joins": 1}, sort=[("joins.endpoint", ASCENDING)], hint="joins")
            if (doc := await self._answer(following)) is None:
                return found[1:]
            found.append(doc["joins"]["endpoint"])

    async def waiting(self, endpoint: str, most: int) -> list[WaitingCall]:
        """The calls that wait for a job of the endpoint and are in none, the longest waiting first."""
        where = {"joins.endpoint": endpoint, "joins.job": None}
        found = self._runs.find(where, {"joins": 1}).sort("joins.since", ASCENDING).limit(most)
        return [
            WaitingCall(doc["_id"], doc["joins"]["since"], doc["joins"]["until"])
            for doc in await self._answer(found.to_list())
        ]

    async def begin(self, endpoint: str, calls: Sequence[WaitingCall], holder: str) -> JobDoc:
        """A new job, leased to us, with these calls in it but for those that wait no more or are in another."""
        job = new_job(endpoint, calls, holder, self._now())
        await self._answer(self._jobs.insert_one(cast("Doc", job)))
        free = {"_id": {"$in": [call.run_id for call in calls]}, "joins.endpoint": endpoint, "joins.job": None}
        await self._answer(self._runs.update_many(free, {"$set": {"joins.job": job["_id"]}, "$inc": {"rev": 1}}))
        return job

    async def leave(self, run_ids: Sequence[str], job_id: str) -> None:
        """These runs' calls are not in the job after all; they wait for another."""
        there = {"_id": {"$in": list(run_ids)}, "joins.job": job_id}
        await self._answer(self._runs.update_many(there, {"$unset": {"joins.job": ""}, "$inc": {"rev": 1}}))

    # -- jobs -------------------------------------------------------------------------------------------------------

    async def due(self, limit: int = 20) -> list[str]:
        """The live jobs that are to be looked at now, the longest due first."""
        found = self._jobs.find({"live": True, "due": {"$lte": self._now()}, "v": {"$lte": JOB_FORMAT}}, {"_id": 1})
        return [doc["_id"] for doc in await self._answer(found.sort("due", ASCENDING).limit(limit).to_list())]

    async def take(self, job_id: str, holder: str) -> JobDoc | None:
        """Take or prolong the lease of a live job; None if somebody else has it."""
        free_or_mine = {
            "$or": [{"lease.holder": holder}, {"lease": None}, {"$expr": {"$lt": ["$lease.until", "$$NOW"]}}]
        }
        lease: list[Doc] = [
            {"$set": {"lease": {"holder": holder, "until": {"$add": ["$$NOW", LEASE // timedelta(milliseconds=1)]}}}}
        ]
        found = self._jobs.find_one_and_update(
            {"_id": job_id, "live": True, **free_or_mine}, lease, return_document=ReturnDocument.AFTER
        )
        return cast("JobDoc | None", await self._answer(found))

    async def note(self, job_id: str, holder: str, **fields: Any) -> bool:
        """Set fields of a job whose lease we hold; False, and nothing set, if we do not."""
        written = await self._answer(self._jobs.update_one({"_id": job_id, "lease.holder": holder}, {"$set": fields}))
        return bool(written.matched_count)

    async def load(self, job_id: str) -> JobDoc | None:
        return cast("JobDoc | None", await self._answer(self._jobs.find_one({"_id": job_id})))

    async def latest(self, limit: int) -> list[JobDoc]:
        """Newest first."""
        return cast("list[JobDoc]", await self._answer(self._jobs.find({}).sort("_id", -1).limit(limit).to_list()))

    async def of_batch(self, batch_id: str) -> list[JobDoc]:
        """The live jobs in which lines of a batch are."""
        return cast("list[JobDoc]", await self._answer(self._jobs.find({"batches": batch_id, "live": True}).to_list()))

    async def turnaround_s(self, endpoint: str) -> float | None:
        """How long the endpoint is to be expected to take: the slowest of its latest jobs within a day, for ever if it
        would not have one a moment ago; None if nothing is known."""
        lately = {"endpoint": endpoint, "ended_at": {"$gte": self._now() - REMEMBERED}}
        fields = {"status": 1, "sent_at": 1, "ended_at": 1}
        found = self._jobs.find(lately, fields).sort("ended_at", DESCENDING).limit(SEEN_JOBS)
        return expected_s(await self._answer(found.to_list()), self._now())

    # -- the runs of a job ------------------------------------------------------------------------------------------

    async def members(self, job: JobDoc, after: str = "", limit: int = 200) -> list[RunDoc]:
        """Runs whose call is in the job and that still wait for it, by id."""
        where = {"joins.job": job["_id"], "_id": {"$gt": after}}
        found = self._runs.find(where, WITHOUT_JOURNAL).sort("_id", ASCENDING).limit(limit)
        return cast("list[RunDoc]", await self._answer(found.to_list()))

    async def runs(self, run_ids: Sequence[str]) -> dict[str, RunDoc]:
        found = await self._answer(self._runs.find({"_id": {"$in": list(run_ids)}}, WITHOUT_JOURNAL).to_list())
        return {doc["_id"]: cast("RunDoc", doc) for doc in found}
