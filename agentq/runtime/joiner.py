"""The joiner: gathers model calls that wait into jobs of their provider's batch endpoint, and takes the answers in.

It runs beside the scheduler, in the same process. Several may run: a call is marked with its job by one conditional
update, a job is worked on by whoever holds its lease, and an answer enters its run as any outcome does, by a
conditional commit. A crash at any point costs no call twice: a job that may have been handed in is looked for at the
provider by its name, and an answer that is in its run already is not counted again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import tempfile
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any, BinaryIO, cast

from agentq.engine import joining
from agentq.engine.effects import effect
from agentq.errors import AgentqError, ProviderError
from agentq.llm.jobs import MAX_JOB_BYTES, JobLine, JobState, OpenAiJobs, encode
from agentq.place import place as where_in_code
from agentq.runtime.answers import Answers
from agentq.runtime.bundles import Bundles
from agentq.runtime.ever import ever
from agentq.runtime.runtime import CrashPoint, Publish, Reply, no_crash
from agentq.store.api import Store
from agentq.store.jobs import LEASE, Jobs
from schemas.catalog import ModelSpec
from schemas.job import JobDoc, Place, custom_id
from schemas.llm import LlmCall
from schemas.run import RunDoc

log = logging.getLogger(__name__)

GROUP = 50  # calls taken in together: the admission shares the process and must not wait
MANY_TRIES = 8  # failures in a row to hand a job in; if the provider has it not, its calls are made live
LOOK_S = (1.0, 60.0)  # how often a job is looked at: a tenth of its age, within these bounds
LEASE_LOST = "lease_lost"
JOB_CRASH_POINTS = ("job_sending", "job_sent", "job_answer_in")  # as the others; the last one is passed in answers.py
LOST_AFTER = timedelta(days=3)  # a job that the provider cannot tell of for so long is given up


class Joiner:
    """``tick`` does everything there is to do now."""

    def __init__(
        self,
        store: Store,
        jobs: Jobs,
        provider: OpenAiJobs,
        publish: Publish,
        *,
        name: str,
        reply: Reply,
        max_attempts: int,
        crash: CrashPoint = no_crash,
    ) -> None:
        self._store = store
        self._jobs = jobs
        self._provider = provider
        self._name = f"{name}:{secrets.token_hex(4)}"
        self._crash = crash
        self._bundles = Bundles(store)
        self._answers = Answers(store, jobs, self._bundles, publish, reply, max_attempts, crash)

    async def run(self, interval_s: float) -> None:
        """Tick until cancelled; an outage is reported and waited out."""

        async def act() -> float:
            await self.tick()
            return interval_s

        await ever("the joiner", act, interval_s)

    async def tick(self) -> None:
        """Gather calls into jobs, then see to every job that is due. Raises ``Unavailable``."""
        for endpoint in await self._jobs.endpoints():
            await self._gather(endpoint)
        taken = [await self._jobs.take(job_id, self._name) for job_id in await self._jobs.due()]
        await asyncio.gather(*(self._see_to(job) for job in taken if job is not None))

    # -- gathering --------------------------------------------------------------------------------------------------

    async def _gather(self, endpoint: str) -> None:
        first = await self._jobs.waiting(endpoint, 1)
        run = await self._store.load(first[0].run_id) if first else None
        if run is None or "joins" not in run:
            return
        spec = (await self._call(run, run["joins"]["step"])).model.batch_endpoint
        assert spec is not None, "a call is deferred only where its model has the endpoint"
        waiting = await self._jobs.waiting(endpoint, spec.most)
        gathered = joining.gather(waiting, spec, await self._jobs.turnaround_s(endpoint), self._store.now())
        for at in range(0, len(gathered.live), GROUP):
            runs = await self._jobs.runs([call.run_id for call in gathered.live[at : at + GROUP]])
            free = [run for run in runs.values() if "job" not in run.get("joins", {})]
            await self._answers.release(free, "window_at_risk")
        if gathered.job:
            await self._see_to(await self._jobs.begin(endpoint, gathered.job, self._name))

    # -- one job ----------------------------------------------------------------------------------------------------

    async def _see_to(self, job: JobDoc) -> None:
        """Everything that is to be done about a job now; one that cannot be handled does not stop the others. Raises
        nothing: a look that ended early would leave other jobs being worked on, and the next would take them up too."""
        job_id = job["_id"]
        try:
            async with self._leased(job_id):
                await self._go_on(job)
        except AgentqError as error:
            log.warning("job %s is left as it is: %s", job_id, error.code)
        except Exception as error:  # noqa: BLE001 - reported by class and place; its words may quote a person
            log.error("job %s is left as it is: %s", job_id, where_in_code(error))
            with contextlib.suppress(AgentqError):
                await self._note(job_id, due=self._store.now() + timedelta(seconds=LOOK_S[1]))

    async def _go_on(self, job: JobDoc) -> None:
        """The next thing about a job, by how far it is."""
        try:
            if job["status"] == "open":
                await self._send(job)
            elif job["status"] == "sending":
                await self._find_or_send(job)
            else:
                await self._look(job)
        except ProviderError as error:
            await self._put_off(job["_id"], error)

    @contextlib.asynccontextmanager
    async def _leased(self, job_id: str) -> AsyncIterator[None]:
        """Keep the job's lease, however long the provider takes."""

        async def keep() -> None:
            while True:
                await asyncio.sleep(LEASE.total_seconds() / 3)
                with contextlib.suppress(AgentqError):
                    await self._jobs.take(job_id, self._name)

        keeping = asyncio.create_task(keep())
        try:
            yield
        finally:
            keeping.cancel()

    async def _note(self, job_id: str, **fields: Any) -> None:
        if not await self._jobs.note(job_id, self._name, **fields):
            raise AgentqError("Another scheduler works on the job.", code=LEASE_LOST)

    async def _send(self, job: JobDoc) -> None:
        """Write the job's calls into a file and hand it in."""
        with tempfile.TemporaryFile() as file:
            model, batches, count = await self._write(job, cast("BinaryIO", file))
            if model is None:
                await self._note(job["_id"], status="done", live=False, error="empty")
                return
            # From here on the provider may have it.
            await self._note(job["_id"], status="sending", calls=count, batches=sorted(batches))
            if self._store.now() >= job["until"]:  # what is in the file may be made live at any moment
                await self._give_up(job, "window_at_risk")
                return
            self._crash("job_sending")
            try:
                provider_id = await self._hand_in(job, model, cast("BinaryIO", file))
            except ProviderError as error:
                if error.retryable:  # nobody knows whether it has the job
                    raise
                await self._give_up(job, error.code, ended_at=self._store.now())
                return
        self._crash("job_sent")
        try:
            await self._sent(job["_id"], provider_id)
        except AgentqError as error:
            if error.code == LEASE_LOST:
                await self._cancel_second(job["_id"], model, provider_id)
            raise
        log.info("job %s: %d calls handed in to %s", job["_id"], count, job["endpoint"])

    async def _hand_in(self, job: JobDoc, model: ModelSpec, file: BinaryIO) -> str:
        """The provider's id of the job. An upload that outlasts the calls' time to wait is broken off: its job would
        be made when they are made live."""
        try:
            async with asyncio.timeout((job["until"] - self._store.now()).total_seconds()):
                return await self._provider.send(model, file, job["_id"])
        except TimeoutError:
            message = "The job could not be handed in in time."
            raise ProviderError(message, code="window_at_risk", retryable=True) from None

    async def _sent(self, job_id: str, provider_id: str) -> None:
        now = self._store.now()
        due = now + timedelta(seconds=LOOK_S[0])
        await self._note(job_id, status="sent", provider_id=provider_id, sent_at=now, due=due, tries=0)

    async def _cancel_second(self, job_id: str, model: ModelSpec, provider_id: str) -> None:
        """We stood still over handing a job in, and another works on it now. Ours is one too many if that one has
        handed it in as well or given it up; but it may have found ours, or find it still."""
        job = await self._jobs.load(job_id)
        known = job.get("provider_id") if job is not None else None
        if job is not None and known != provider_id and (known is not None or not job["live"]):
            await self._provider.cancel(model, provider_id)

    async def _give_up(self, job: JobDoc, code: str, **fields: Any) -> None:
        """Its calls are made live. ``ended_at`` where the provider would not have it: it is left alone for a while."""
        log.warning("job %s is given up: %s", job["_id"], code)
        await self._note(job["_id"], error=code)  # if it is still ours
        await self._release_members(job, code)
        await self._note(job["_id"], status="given_up", live=False, error=code, **fields)

    async def _write(self, job: JobDoc, file: BinaryIO) -> tuple[ModelSpec | None, set[str], int]:
        """The calls of a job into a file; what it has no room for waits for another job."""
        model: ModelSpec | None = None
        batches: set[str] = set()
        count, after = 0, ""
        while runs := await self._jobs.members(job, after, GROUP):
            for run in runs:
                step_id = run["joins"]["step"]
                call = await self._call(run, step_id)
                line = encode(call, custom_id(Place(run["_id"], step_id, run["steps"][step_id]["attempt"])))
                if count and file.tell() + len(line) > MAX_JOB_BYTES:
                    await self._jobs.leave([run["_id"]], job["_id"])
                    continue
                file.write(line)
                model, count = call.model, count + 1
                batches.add(run["batch"]["id"])
            after = runs[-1]["_id"]
        return model, batches, count

    async def _find_or_send(self, job: JobDoc) -> None:
        """Nobody knows whether the provider has the job: look for it by its name first."""
        model, _ = await self._model(job)
        found = await self._provider.find(model, job["_id"], job["created_at"])
        if found is not None:
            await self._sent(job["_id"], found)
        elif job["tries"] >= MANY_TRIES:
            await self._give_up(job, "many_tries", ended_at=self._store.now())
        else:
            await self._send(job)

    async def _look(self, job: JobDoc) -> None:
        model, wanted = await self._model(job)
        now = self._store.now()
        state = await self._provider.look(model, job["provider_id"])
        if state.ended:
            await self._take_in(job, model, state)
            return
        if job["status"] == "sent" and (not wanted or now >= job["until"]):
            await self._provider.cancel(model, job["provider_id"])
            await self._note(job["_id"], status="cancelling")
            log.warning("job %s is cancelled: %s", job["_id"], "window at risk" if wanted else "nobody waits for it")
        age_s = (now - job["sent_at"]).total_seconds()
        pause_s = min(max(age_s / 10, LOOK_S[0]), LOOK_S[1])
        await self._note(job["_id"], due=now + timedelta(seconds=pause_s), tries=0)

    async def _put_off(self, job_id: str, error: ProviderError) -> None:
        """The provider would not, or cannot be reached: try again later. A job that it may or may not have is given up
        unseen when its window is at risk."""
        job = await self._jobs.load(job_id)
        if job is None:
            return
        now, tries = self._store.now(), job["tries"] + 1
        log.warning("job %s: %s", job_id, error)
        if (job["status"] == "sending" and now >= job["until"]) or now - job["created_at"] > LOST_AFTER:
            await self._give_up(job, error.code, ended_at=now)
            return
        pause_s = error.retry_after_s or min(LOOK_S[0] * 2.0**tries, LOOK_S[1])
        # However long the provider wishes to be left alone: the window is not to pass unseen.
        last = max(job["until"], now + timedelta(seconds=LOOK_S[1]))
        await self._note(job_id, due=min(now + timedelta(seconds=pause_s), last), tries=tries)

    async def _take_in(self, job: JobDoc, model: ModelSpec, state: JobState) -> None:
        """Every answer into its run; who got none is made live."""
        ended_at, answered, cost = self._store.now(), 0, 0
        group: list[JobLine] = []
        async for line in self._provider.answers(model, state):
            answered += 1 if line.status else 0
            group.append(line)
            if len(group) == GROUP:
                cost += await self._answers.take_in(job, group)
                group = []
        cost += await self._answers.take_in(job, group)
        await self._release_members(job, state.error or f"job_{state.status}", paid=state.status == "completed")
        await self._note(
            job["_id"], status="done", live=False, ended_at=ended_at, answered=answered, cost_nano_usd=cost,
            error=state.error,
        )  # fmt: skip
        log.info("job %s: %s, %d of %d calls answered", job["_id"], state.status, answered, job["calls"])
        with contextlib.suppress(ProviderError):
            await self._provider.forget(model, state)

    async def _release_members(self, job: JobDoc, code: str, *, paid: bool = False) -> None:
        """Whoever still waits for the job is made live; who moves meanwhile is looked at again. ``paid``: the job is
        complete, so an answer that is missing, or that cannot be read, is lost."""
        while runs := await self._jobs.members(job, limit=GROUP):
            if not await self._answers.release(runs, code, paid=paid):
                await asyncio.sleep(LOOK_S[0])

    # -- what is asked ----------------------------------------------------------------------------------------------

    async def _model(self, job: JobDoc) -> tuple[ModelSpec, bool]:
        """The model of the job's calls, and whether any run still waits for it; if none does, its address only."""
        runs = await self._jobs.members(job, limit=1)
        if not runs:
            return ModelSpec.model_validate(_address(job["endpoint"])), False
        return (await self._call(runs[0], runs[0]["joins"]["step"])).model, True

    async def _call(self, run: RunDoc, step_id: str) -> LlmCall:
        wanted = effect(await self._bundles.of(run), run, step_id)
        assert isinstance(wanted, LlmCall), "only model calls are deferred"
        return wanted


def _address(endpoint: str) -> dict[str, Any]:
    """Enough of a model to reach the endpoint that a job is at."""
    name, _, base_url = endpoint.partition(" at ")
    provider, _, model = name.partition("/")
    return {"provider": provider, "model": model, "base_url": base_url or None}
