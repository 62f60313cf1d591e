"""Runs batches on the event loop: reads the file, answers its lines, waits as the scenario says, writes the files."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from uuid import uuid4

from agentq.offline import batch_lines, wire
from agentq.offline.batch_lines import Input, Line, Result
from agentq.offline.batches import Batch, Order, Status
from agentq.offline.calls import Calls
from agentq.offline.faults import BatchPlan
from agentq.offline.files import Files
from agentq.offline.wire import Refusal

_LOG = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Job:
    """A batch on its way. ``due`` and ``ends`` by the loop's clock: when it completes, when its window has passed."""

    batch: Batch
    plan: BatchPlan
    content: bytes
    due: float
    ends: float
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    results: list[Result] = field(default_factory=list)

    def is_over(self) -> bool:
        """Is no other line to be answered? Where the plan is to expire, it says itself how many lines are answered: so
        their number depends on no clock."""
        late = not self.plan.expires and asyncio.get_running_loop().time() >= self.ends
        return late or self.cancelled.is_set()

    async def hold(self) -> None:
        """Until it is due, cancelled, or past its window."""
        try:
            async with asyncio.timeout_at(self.ends if self.plan.expires else self.due):
                await self.cancelled.wait()
        except TimeoutError:
            pass  # it goes on

    def move(self, status: Status) -> None:
        self.batch = self.batch.moved(status, time.time())


class Jobs:
    """The batches there are. A batch goes by the plan it was created under, its lines by the rules of their moment."""

    def __init__(self, calls: Calls, files: Files) -> None:
        self._calls, self._files = calls, files
        self._jobs: dict[str, _Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()

    def create(self, order: Order, plan: BatchPlan) -> Batch:
        """A batch that is being validated. Raises ``Refusal`` where its file is none for a batch."""
        file = self._files.find(order.input_file_id, param="input_file_id")
        if file.purpose != "batch":
            raise Refusal(400, f"The purpose of {file.id} is '{file.purpose}', not 'batch'.", param="input_file_id")
        now, clock = time.time(), asyncio.get_running_loop().time()
        batch = Batch(f"batch_{uuid4().hex}", order, int(now), int(now + plan.window_s))
        job = _Job(batch, plan, file.content, clock + plan.seconds, clock + plan.window_s)
        self._jobs[batch.id] = job
        task = asyncio.create_task(self._run(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return batch

    def find(self, batch_id: str) -> Batch:
        """Raises ``Refusal`` (404) where there is none."""
        return self._job(batch_id).batch

    def newest_first(self) -> list[Batch]:
        return [job.batch for job in reversed(self._jobs.values())]

    def cancel(self, batch_id: str) -> Batch:
        """Answer no other line of it. Raises ``Refusal`` where there is none (404) or it is too late (409)."""
        job = self._job(batch_id)
        job.batch = job.batch.cancelled(time.time())
        job.cancelled.set()
        return job.batch

    async def stop(self) -> None:
        """Leave everything as it is; the batches are gone with the server."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _job(self, batch_id: str) -> _Job:
        if batch_id not in self._jobs:
            raise Refusal(404, f"No batch found with id '{batch_id[:80]}'.", param="id")
        return self._jobs[batch_id]

    async def _run(self, job: _Job) -> None:
        lines = await self._read(job)
        if job.batch.status == "failed":
            return
        waits = job.plan.stuck or job.plan.seconds
        early = int(len(lines) * job.plan.partial) if waits else len(lines)
        await self._answer(job, lines[:early])
        await job.hold()
        if not job.plan.expires:
            await self._answer(job, lines[early:])
        await self._finish(job, lines)

    async def _read(self, job: _Job) -> Sequence[Line]:
        """Check the file. The batch is in progress then, or failed, unless it was cancelled meanwhile."""
        found = Input(job.batch.order.endpoint)
        for number, raw in enumerate(BytesIO(job.content), start=1):
            await self._give_way()
            found.take(number, raw)
        found.close()
        job.content = b""
        lines = [] if found.problems else found.lines
        job.batch = replace(job.batch, total=len(lines), model=found.model, problems=tuple(found.problems))
        if job.batch.status == "validating":
            job.move("failed" if found.problems else "in_progress")
        return lines

    async def _answer(self, job: _Job, lines: Sequence[Line]) -> None:
        for line in lines:
            await self._give_way()
            if job.is_over():
                return
            result = await self._result(job.batch.id, line)
            job.results.append(result)
            job.batch = job.batch.counted(result)

    async def _result(self, batch_id: str, line: Line) -> Result:
        try:
            prompt = wire.read("openai", line.body)
            made = await self._calls.answer(prompt, "openai", key=line.custom_id, batch=batch_id)
            return batch_lines.result(batch_id, line.custom_id, made)
        except Refusal as refusal:
            return batch_lines.refused(batch_id, line.custom_id, refusal)
        except Exception:  # noqa: BLE001 - as a live call gets a 500; the other lines are answered all the same
            _LOG.exception("A line of %s could not be answered", batch_id)
            return batch_lines.refused(batch_id, line.custom_id, Refusal(500, "The server had an error."))

    async def _finish(self, job: _Job, lines: Sequence[Line]) -> None:
        """Write the files; the lines that were not answered are in the error file."""
        cancelled = job.batch.status == "cancelling"
        late = job.plan.expires or len(job.results) < len(lines)
        if not cancelled:
            job.move("finalizing")
        results = job.results
        for line in lines[len(results) :]:
            await self._give_way()
            why: batch_lines.Unanswered = "batch_cancelled" if cancelled else "batch_expired"
            results.append(batch_lines.unanswered(job.batch.id, line.custom_id, why))
        output = await self._keep(f"{job.batch.id}_output.jsonl", [each for each in results if not each.failed])
        errors = await self._keep(f"{job.batch.id}_error.jsonl", [each for each in results if each.failed])
        job.results = []
        job.batch = replace(job.batch, output_file_id=output, error_file_id=errors)
        job.move("cancelled" if cancelled else "expired" if late else "completed")

    async def _keep(self, filename: str, results: list[Result]) -> str | None:
        """The id of the file, None where it would be empty."""
        if not results:
            return None
        content = bytearray()
        for result in sorted(results, key=lambda each: each.place):
            await self._give_way()
            content += result.text
        return self._files.keep(filename, "batch_output", bytes(content), time.time()).id

    async def _give_way(self) -> None:
        """Let everything else on the loop have its turn; of all batches, one goes on at a time. So a live call waits
        for one line, however many there are."""
        async with self._turn:
            await asyncio.sleep(0)
