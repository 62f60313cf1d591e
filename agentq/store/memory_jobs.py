"""Provider jobs in memory, for tests and simulation: what MongoDB's promise, checked by the same contract suite."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, cast

from agentq.engine.joining import WaitingCall
from agentq.store.jobs import LEASE, REMEMBERED, SEEN_JOBS, expected_s, new_job
from agentq.store.memory import MemoryStore
from schemas.job import JOB_FORMAT, JobDoc
from schemas.run import Joins, RunDoc


class MemoryJobs:
    """``agentq.store.jobs.Jobs`` beside a store in memory. A stored document is replaced, never changed."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self.docs: dict[str, JobDoc] = {}

    # -- gathering --------------------------------------------------------------------------------------------------

    def _free(self) -> list[RunDoc]:
        """The runs that wait and are in no job, the longest waiting first."""
        found = [run for run in self._store.runs.values() if "joins" in run and "job" not in run["joins"]]
        return sorted(found, key=lambda run: run["joins"]["since"])

    async def endpoints(self) -> list[str]:
        return sorted({run["joins"]["endpoint"] for run in self._free()})

    async def waiting(self, endpoint: str, most: int) -> list[WaitingCall]:
        found = [run for run in self._free() if run["joins"]["endpoint"] == endpoint]
        return [WaitingCall(run["_id"], run["joins"]["since"], run["joins"]["until"]) for run in found[:most]]

    async def begin(self, endpoint: str, calls: Sequence[WaitingCall], holder: str) -> JobDoc:
        job = new_job(endpoint, calls, holder, self._store.now())
        await self.insert(job)
        await self.mark(job, calls)
        return job

    async def insert(self, job: JobDoc) -> None:
        """The first half of ``begin``."""
        self.docs[job["_id"]] = {**job}

    async def mark(self, job: JobDoc, calls: Sequence[WaitingCall]) -> None:
        """The second half of ``begin``."""
        for call in calls:
            run = self._store.runs.get(call.run_id)
            if run is not None and self.may_mark(run, job["endpoint"]):
                run["joins"], run["rev"] = {**run["joins"], "job": job["_id"]}, run["rev"] + 1

    def may_mark(self, run: RunDoc, endpoint: str) -> bool:
        """Does the run wait for this endpoint, in no job yet?"""
        joins = run.get("joins")
        return joins is not None and joins["endpoint"] == endpoint and "job" not in joins

    async def leave(self, run_ids: Sequence[str], job_id: str) -> None:
        for run in self._in(job_id):
            if run["_id"] in run_ids:
                left = {name: value for name, value in run["joins"].items() if name != "job"}
                run["joins"], run["rev"] = cast("Joins", left), run["rev"] + 1

    # -- jobs -------------------------------------------------------------------------------------------------------

    async def due(self, limit: int = 20) -> list[str]:
        return self.due_at(self._store.now(), limit)

    def due_at(self, now: datetime, limit: int = 20) -> list[str]:
        """``due`` by a clock that may not be the server's, as MongoDB's is asked."""
        found = [job for job in self.docs.values() if job["live"] and job["due"] <= now and job["v"] <= JOB_FORMAT]
        return [job["_id"] for job in sorted(found, key=lambda job: job["due"])[:limit]]

    async def take(self, job_id: str, holder: str) -> JobDoc | None:
        job, now = self.docs.get(job_id), self._store.now()
        if job is None or not job["live"]:
            return None
        if job["lease"] is not None and job["lease"]["holder"] != holder and job["lease"]["until"] >= now:
            return None
        self.docs[job_id] = {**job, "lease": {"holder": holder, "until": now + LEASE}}
        return {**self.docs[job_id]}

    async def note(self, job_id: str, holder: str, **fields: Any) -> bool:
        job = self.docs.get(job_id)
        if job is None or job["lease"] is None or job["lease"]["holder"] != holder:
            return False
        self.docs[job_id] = cast("JobDoc", {**job, **fields})
        return True

    async def load(self, job_id: str) -> JobDoc | None:
        job = self.docs.get(job_id)
        return None if job is None else {**job}

    async def latest(self, limit: int) -> list[JobDoc]:
        return [{**self.docs[job_id]} for job_id in sorted(self.docs, reverse=True)[:limit]]

    async def of_batch(self, batch_id: str) -> list[JobDoc]:
        return [{**job} for job in self.docs.values() if batch_id in job["batches"] and job["live"]]

    async def turnaround_s(self, endpoint: str) -> float | None:
        now = self._store.now()
        ended = [
            job for job in self.docs.values()
            if job["endpoint"] == endpoint and "ended_at" in job and job["ended_at"] >= now - REMEMBERED
        ]  # fmt: skip
        return expected_s(sorted(ended, key=lambda job: job["ended_at"], reverse=True)[:SEEN_JOBS], now)

    # -- the runs of a job ------------------------------------------------------------------------------------------

    def _in(self, job_id: str) -> list[RunDoc]:
        return [run for run in self._store.runs.values() if run.get("joins", {}).get("job") == job_id]

    async def members(self, job: JobDoc, after: str = "", limit: int = 200) -> list[RunDoc]:
        found = sorted(run["_id"] for run in self._in(job["_id"]) if run["_id"] > after)
        return [*(await self.runs(found[:limit])).values()]

    async def runs(self, run_ids: Sequence[str]) -> dict[str, RunDoc]:
        found = [await self._store.load(run_id) for run_id in run_ids]
        return {run["_id"]: run for run in found if run is not None}
