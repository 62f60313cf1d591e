"""The provider's batch endpoint, and the way to it as one process sees it.

A job takes its time, and may answer partly, fail, expire, or be stuck until it is cancelled: that is the endpoint's
``Mood`` and no fault. What the seed may do besides: refuse a request, for now or for good; do it and lose the answer;
slow it down; kill or freeze the process that made it; take the endpoint away from all.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from agentq.errors import ProviderError
from agentq.llm.jobs import JobLine, JobState
from schemas.catalog import ModelSpec
from schemas.job import place_of
from schemas.llm import LlmReply
from tests.simulation.loop import Process, answer, fail

if TYPE_CHECKING:
    from tests.simulation.world import World


class Mood(NamedTuple):
    """How an endpoint is. Of its jobs, some never end by themselves, are refused as a whole or expire; of the calls in
    them, some are never made, fail, or are answered so that nobody can read it. ``most_ms``: how long a job takes."""

    most_ms: int
    cancel_ms: int
    stuck: float = 0.0
    failed: float = 0.0
    expired: float = 0.0
    unmade: float = 0.0
    broken: float = 0.0
    unreadable: float = 0.0

    @classmethod
    def of(cls, rng: random.Random) -> Mood:
        times = rng.choice((3_000, 20_000, 20_000, 300_000)), rng.choice((1_000, 30_000, 600_000))
        if rng.random() < 0.4:
            return cls(*times)
        return cls(*times, *(rng.choice((0.0, 0.1, 0.4)) for _ in range(6)))


class Asked(NamedTuple):
    """One call of a job. ``at_ms``: when it is made (None: never); ``line``: what the file of answers says then, unless
    it is ``unreadable`` where the job is complete; ``cost``: 0 where it failed."""

    at_ms: int | None
    line: JobLine
    cost: int
    unreadable: bool


@dataclass(slots=True)
class Job:
    """A job at the provider. ``ends_ms``: when it ends; None: not before somebody cancels it."""

    id: str
    name: str
    status: str
    ends_ms: int | None
    asked: list[Asked]
    cancelled: bool = False
    lines: list[JobLine] | None = None  # what it came to, from its end on
    files: dict[str, list[JobLine]] = field(default_factory=dict)


class Provider:
    """The endpoint itself: what of its jobs is paid and when is written into the books."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._mood = Mood.of(world.rng)
        self.jobs: dict[str, Job] = {}
        self.down_until = 0
        self.refuses = False  # while it is down: for good, as far as a caller can see

    # -- requests ---------------------------------------------------------------------------------------------------

    def upload(self) -> None:
        """A file of calls; of no consequence until a job is made of it."""

    def create(self, name: str, lines: list[dict[str, Any]], process: Process) -> str:
        rng, mood, now = self._world.rng, self._mood, self._world.clock.ms
        drawn = rng.random()
        ends_ms = now + 1 + int(rng.random() ** 2 * mood.most_ms)
        status = "completed"
        if drawn < mood.stuck:
            status = "stuck"
        elif drawn < mood.stuck + mood.failed / 2:
            status = "failed"
        elif drawn < mood.stuck + mood.failed / 2 + mood.expired:
            status = "expired"
        asked = [self._asked(line, status, now, ends_ms) for line in lines]
        made = Job(f"p{len(self.jobs) + 1}", name, status, None if status == "stuck" else ends_ms, asked)
        self.jobs[made.id] = made
        self._world.books.jobs.sent(made, process, self._world.server.now())
        return made.id

    def find(self, name: str) -> str | None:
        return next((job.id for job in reversed(self.jobs.values()) if job.name == name), None)

    def look(self, job_id: str) -> JobState:
        job = self.jobs[job_id]
        if not self._ended(job):
            return JobState(job.id, "cancelling" if job.cancelled else "in_progress", f"{job_id}-in", (), None)
        error = "invalid_file" if job.status == "failed" else None
        files = tuple(name for name in job.files if name != f"{job_id}-in")
        return JobState(job.id, job.status, f"{job_id}-in", files, error)

    def cancel(self, job_id: str) -> None:
        world, job = self._world, self.jobs[job_id]
        if self._ended(job):
            raise ProviderError("it has ended", code="provider_unavailable", retryable=True)
        world.books.jobs.cancelled(job, world.server.now())
        if not job.cancelled:
            job.cancelled, job.status = True, "cancelled"
            job.ends_ms = world.clock.ms + 1 + int(world.rng.random() ** 2 * self._mood.cancel_ms)

    def read(self, file: str) -> list[JobLine]:
        return self._files(file)[file]

    def delete(self, file: str) -> None:
        del self._files(file)[file]

    def _files(self, file: str) -> dict[str, list[JobLine]]:
        job = self.jobs[file.partition("-")[0]]
        if file not in job.files:
            raise ProviderError("no such file", code="bad_model_request", retryable=False)
        return job.files

    # -- what becomes of a job --------------------------------------------------------------------------------------

    def _asked(self, line: dict[str, Any], status: str, now: int, ends_ms: int) -> Asked:
        """What becomes of a call in a job that ends like this."""
        world, mood, custom_id = self._world, self._mood, line["custom_id"]
        at_ms = world.rng.randrange(now, ends_ms) if status != "failed" else None
        if (status == "completed" and world.rng.random() < mood.unmade) or (
            status in ("stuck", "expired") and world.rng.random() < 0.5
        ):
            at_ms = None
        if world.rng.random() < mood.broken:
            return Asked(at_ms, JobLine(custom_id, world.rng.choice((429, 429, 500, 400)), {}), 0, False)
        cost = world.next_cost()
        answered = JobLine(custom_id, 200, self._answer(line, cost))
        return Asked(at_ms, answered, cost, world.rng.random() < mood.unreadable)

    def _answer(self, line: dict[str, Any], cost: int) -> dict[str, Any]:
        """The body of an answer: what the run's script says now, which is what it says while the run waits."""
        place = place_of(line["custom_id"])
        assert place is not None
        stored = self._world.server.runs[place.run_id]
        step = stored["steps"].get(place.step_id)
        purpose = {"turn": "turn", "critique": "critique"}.get(step["kind"] if step else "", "route")
        script = self._world.scripts[place.run_id]
        return _body(script.answer(purpose, line["body"]["messages"], stored, cost))

    def _ended(self, job: Job) -> bool:
        """Has it ended? From then on it is certain what it came to."""
        if job.lines is None and job.ends_ms is not None and job.ends_ms <= self._world.clock.ms:
            self._settle(job, job.ends_ms)
        return job.lines is not None

    def _settle(self, job: Job, end_ms: int) -> None:
        rng = self._world.rng
        job.lines = []
        for asked in job.asked:
            made = asked.at_ms is not None and asked.at_ms <= end_ms
            readable = not (asked.unreadable and job.status == "completed")
            if made and readable:
                job.lines.append(asked.line)
            elif not made and (job.status == "completed" or (job.status != "failed" and rng.random() < 0.5)):
                job.lines.append(JobLine(asked.line.custom_id, 0, {}))
            if made and asked.cost:
                self._world.books.jobs.paid(job, asked.line.custom_id, asked.cost, readable=readable)
        rng.shuffle(job.lines)
        cut = rng.randint(0, len(job.lines))
        parts = {f"{job.id}-out": job.lines[:cut], f"{job.id}-err": job.lines[cut:], f"{job.id}-in": []}
        job.files = {name: lines for name, lines in parts.items() if lines or name.endswith("-in")}

    def close(self) -> None:
        """The schedule is over: what was made until now is paid, whoever asks for it or not."""
        for job in self.jobs.values():
            if not self._ended(job):
                self._settle(job, self._world.clock.ms)


def _body(reply: LlmReply) -> dict[str, Any]:
    """A chat completion. Its tokens are its cost: one nano-dollar each."""
    calls = [
        {"id": wish["id"], "type": "function", "function": {"name": wish["name"], "arguments": wish["arguments"]}}
        for wish in reply.tool_calls
    ]
    message = {"content": reply.text, **({"tool_calls": calls} if calls else {})}
    usage = {"prompt_tokens": reply.cost_nano_usd, "completion_tokens": 0}
    return {"choices": [{"finish_reason": reply.finish, "message": message}], "usage": usage, "model": reply.model}


class ProviderPort:
    """``agentq.llm.jobs.OpenAiJobs`` as one process has it."""

    def __init__(self, world: World, provider: Provider, process: Process) -> None:
        self._world = world
        self._provider = provider
        self._process = process

    async def send(self, model: ModelSpec, lines: BinaryIO, name: str) -> str:
        lines.seek(0)
        asked = [json.loads(line) for line in lines]
        await self._reach("upload", self._provider.upload)
        sent: str = await self._reach("create", self._provider.create, name, asked, self._process)
        return sent

    async def find(self, model: ModelSpec, name: str, since: datetime) -> str | None:
        found: str | None = await self._reach("find", self._provider.find, name)
        return found

    async def look(self, model: ModelSpec, job_id: str) -> JobState:
        state: JobState = await self._reach("look", self._provider.look, job_id)
        return state

    async def cancel(self, model: ModelSpec, job_id: str) -> None:
        await self._reach("cancel", self._provider.cancel, job_id)

    async def answers(self, model: ModelSpec, state: JobState) -> AsyncIterator[JobLine]:
        for file in state.files:
            for line in await self._reach("answers", self._provider.read, file):
                yield line

    async def forget(self, model: ModelSpec, state: JobState) -> None:
        for file in (*state.files, state.asked):
            await self._reach("forget", self._provider.delete, file)

    def _reach(self, name: str, act: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """Send a request; the seed decides when it arrives, if it is done, when its answer comes, and if."""
        world, process = self._world, self._process
        future = process.create_future()
        fault = world.faults.strike("job", process.name) or self._outage()
        if fault is not None:
            world.note(process, f"{fault} at {name} {args[:1]}")
            world.disturb(process, fault)
        if fault == "kill_before":
            world.kill(process)
        elif fault in ("job_busy", "job_refused"):
            world.clock.after(world.slow(3_000), process, fail, future, _refusal(world.rng, fault))
        else:
            world.clock.after(world.quick(), None, self._arrive, future, name, act, args, fault)
        return future

    def _outage(self) -> str | None:
        world, provider = self._world, self._provider
        if not world.faults.on or world.clock.ms >= provider.down_until:
            return None
        if world.rng.random() < 0.2:
            return "job_unheard"
        return "job_refused" if provider.refuses else "job_busy"

    def _arrive(
        self, future: asyncio.Future[Any], name: str, act: Callable[..., Any], args: tuple[Any, ...], fault: str | None
    ) -> None:
        world, process = self._world, self._process
        try:
            result, error = act(*args), None
        except ProviderError as refused:
            result, error = None, refused
        if world.clock.trace is not None:
            world.note(process, f"provider: {name} {args[:1]} -> {error or result}")
        back = world.slow(300_000) if fault == "job_slow" else world.quick()
        if fault == "kill_after":
            world.kill(process)
        elif fault == "job_unheard":
            world.clock.after(back, process, fail, future, _refusal(world.rng, "job_busy"))
        elif error is not None:
            world.clock.after(back, process, fail, future, error)
        else:
            world.clock.after(back, process, answer, future, result)


def _refusal(rng: random.Random, fault: str) -> ProviderError:
    if fault == "job_refused":
        return ProviderError("no", code="bad_credentials", retryable=False)
    return ProviderError(
        "busy", code="provider_overloaded", retryable=True, retry_after_s=rng.choice((None, 5.0, 40.0))
    )
