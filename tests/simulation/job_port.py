"""Provider jobs in the simulated database, and the way to them as one process sees it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from agentq.engine.joining import WaitingCall
from agentq.store.jobs import new_job
from agentq.store.memory import MemoryStore
from agentq.store.memory_jobs import MemoryJobs
from schemas.job import JobDoc
from schemas.run import RunDoc
from tests.simulation.invariants import Books

if TYPE_CHECKING:
    from tests.simulation.port import Port

SPINNING = 500  # pages of runs in one look of the joiner


class JobsServer(MemoryJobs):
    """The jobs in memory, with the books told of what was done to them."""

    def __init__(self, store: MemoryStore, books: Books) -> None:
        super().__init__(store)
        self._books = books

    async def due_by(self, now: datetime) -> list[str]:
        """``due`` by the asking process's clock, as MongoDB's store asks."""
        return self.due_at(now)

    async def mark(self, job: JobDoc, calls: Sequence[WaitingCall]) -> None:
        before = {run["_id"]: run["joins"].get("job") for run in self._store.runs.values() if "joins" in run}
        await super().mark(job, calls)
        for run in self._store.runs.values():
            if run.get("joins", {}).get("job") != before.get(run["_id"]):
                self._books.jobs.marked(run, before[run["_id"]])

    async def note(self, job_id: str, holder: str, **fields: Any) -> bool:
        before = self.docs[job_id]
        noted = await super().note(job_id, holder, **fields)
        if noted:
            self._books.jobs.noted(before, self.docs[job_id], self._store.now())
        return noted


class JobsPort:
    """``agentq.store.jobs.Jobs`` as one process has it."""

    def __init__(self, port: Port) -> None:
        self._ask = port._ask
        self._now = port.now
        self._world = port.world
        self._jobs = port.world.server.jobs
        self.pages = 0

    async def endpoints(self) -> list[str]:
        found: list[str] = await self._ask("endpoints", self._jobs.endpoints)
        return found

    async def waiting(self, endpoint: str, most: int) -> list[WaitingCall]:
        found: list[WaitingCall] = await self._ask("waiting", self._jobs.waiting, endpoint, most)
        return found

    async def begin(self, endpoint: str, calls: Sequence[WaitingCall], holder: str) -> JobDoc:
        """Two requests, as on MongoDB. The job's name is random there; here it must be the same in every replay."""
        job = new_job(endpoint, calls, holder, self._now())
        job["_id"] = self._world.job_name()
        await self._ask("begin", self._jobs.insert, job)
        await self._ask("mark", self._jobs.mark, job, calls)
        return job

    async def leave(self, run_ids: Sequence[str], job_id: str) -> None:
        await self._ask("leave", self._jobs.leave, run_ids, job_id)

    async def due(self) -> list[str]:
        self.pages = 0
        found: list[str] = await self._ask("due_jobs", self._jobs.due_by, self._now())
        return found

    async def take(self, job_id: str, holder: str) -> JobDoc | None:
        job: JobDoc | None = await self._ask("take", self._jobs.take, job_id, holder)
        return job

    async def note(self, job_id: str, holder: str, **fields: Any) -> bool:
        async def note() -> bool:
            return await self._jobs.note(job_id, holder, **fields)

        noted: bool = await self._ask(f"note {job_id} {fields.get('status', '')}", note)
        return noted

    async def load(self, job_id: str) -> JobDoc | None:
        job: JobDoc | None = await self._ask("load_job", self._jobs.load, job_id)
        return job

    async def turnaround_s(self, endpoint: str) -> float | None:
        seconds: float | None = await self._ask("turnaround", self._jobs.turnaround_s, endpoint)
        return seconds

    async def members(self, job: JobDoc, after: str = "", limit: int = 200) -> list[RunDoc]:
        self.pages += 1
        if self.pages == SPINNING:
            self._world.books.wrong("one look of the joiner goes round and round")
            self._world.clock.stopped = True
        found: list[RunDoc] = await self._ask("members", self._jobs.members, job, after, limit)
        return found

    async def runs(self, run_ids: Sequence[str]) -> dict[str, RunDoc]:
        found: dict[str, RunDoc] = await self._ask("runs", self._jobs.runs, run_ids)
        return found
