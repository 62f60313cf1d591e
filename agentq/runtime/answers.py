"""What a provider's job says of its calls, taken into the runs that wait for it; who got no answer is made live.

An answer enters its run as any outcome does, by a conditional commit. One that is in its run already is not counted
again, one for which nobody waits any more is waste.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from agentq.engine import advance, commit, joining
from agentq.engine.commit import Commit
from agentq.engine.decision import Decision, Failed, Replied
from agentq.engine.effects import effect
from agentq.errors import ProviderError
from agentq.llm.jobs import JobLine, decode, usage_of
from agentq.protocol import TERMINAL, Hint, Pool
from agentq.runtime.bundles import Bundles
from agentq.runtime.runtime import CrashPoint, Publish, Reply, finish
from agentq.store.api import Store, Verdict
from agentq.store.jobs import Jobs
from schemas.job import JobDoc, Place, place_of
from schemas.llm import LlmCall
from schemas.run import RunDoc

FULL_QUEUE_MS = 250  # how long hints may wait in a pool's queue before no more answers are taken in
HELD_BACK = 20  # times that a look at the queues holds answers back, a quarter of a second each


class Answers:
    """Belongs to a ``Joiner``. Every method may be repeated after a crash; raises ``Unavailable``."""

    def __init__(
        self, store: Store, jobs: Jobs, bundles: Bundles, publish: Publish, reply: Reply, max_attempts: int,
        crash: CrashPoint,
    ) -> None:  # fmt: skip
        self._store = store
        self._jobs = jobs
        self._bundles = bundles
        self._publish = publish
        self._reply = reply
        self._max_attempts = max_attempts
        self._crash = crash

    async def take_in(self, job: JobDoc, lines: Sequence[JobLine]) -> int:
        """Some answers into their runs; what they cost, in nano-dollars."""
        await self._wait_for_room()
        places = [(line, place) for line in lines if (place := place_of(line.custom_id)) is not None]
        runs = await self._jobs.runs([place.run_id for _, place in places])
        hints: list[tuple[Pool, Hint]] = []
        costs = await asyncio.gather(
            *(self._one(job, runs[place.run_id], place, line, hints) for line, place in places if place.run_id in runs)
        )
        if hints:
            await self._publish(hints)
        return sum(costs)

    async def release(self, runs: Sequence[RunDoc], code: str, *, paid: bool = False) -> int:
        """These wait no more, their calls are made live; how many there were. ``paid``: their answers are lost."""
        await self._wait_for_room()
        at_ms = self._now_ms()
        waiting = [run for run in runs if "joins" in run and run["status"] not in TERMINAL]
        released = await asyncio.gather(
            *(self._commit(run, advance.released(run, at_ms, code, paid=paid), run["joins"]["step"]) for run in waiting)
        )
        planned = [one for one in released if one is not None]
        hints = [hint for one in planned for hint in commit.hints(one)]
        if hints:
            await self._publish(hints)
        return len(planned)

    async def _one(self, job: JobDoc, run: RunDoc, place: Place, line: JobLine, hints: list[tuple[Pool, Hint]]) -> int:
        """One answer into its run; what it cost."""
        while True:
            call = await self._call_of(job, run, place)
            if call is None:
                return await self._late(job, run, place, line)
            decision, cost = await self._decided(job, run, call, line)
            planned = await self._commit(run, decision, place.step_id)
            if planned is not None:
                self._crash("job_answer_in")
                await self._follow(planned, hints)
                return cost
            fresh = await self._store.load(run["_id"])
            if fresh is None:
                return 0
            run = fresh

    async def _call_of(self, job: JobDoc, run: RunDoc, place: Place) -> LlmCall | None:
        """The call of the run that waits for this very answer, None if none does any more."""
        joins = run.get("joins")
        if run["status"] in TERMINAL or joins is None or joins.get("job") != job["_id"]:
            return None
        if joins["step"] != place.step_id or run["steps"][place.step_id]["attempt"] != place.attempt:
            return None
        wanted = effect(await self._bundles.of(run), run, place.step_id)
        assert isinstance(wanted, LlmCall), "only model calls are deferred"
        return joining.discounted(wanted)

    async def _decided(self, job: JobDoc, run: RunDoc, call: LlmCall, line: JobLine) -> tuple[Decision, int]:
        """What the line means for the run that waits for it, and what it cost."""
        if line.status == 0:
            return advance.released(run, self._now_ms(), "not_answered"), 0
        bundle = await self._bundles.of(run)
        outcome = _outcome(call, line, self._now_ms())
        cost = outcome.reply.cost_nano_usd if isinstance(outcome, Replied) else 0
        return advance.joined(bundle, run, outcome, job["_id"], self._max_attempts), cost

    async def _late(self, job: JobDoc, run: RunDoc, place: Place, line: JobLine) -> int:
        """Nobody waits for the answer: it is in the run already, or its run went on without it. Then it is waste."""
        if not 200 <= line.status < 300:
            return 0
        bundle = await self._bundles.of(run)
        models = [model for model in bundle.models.values() if joining.endpoint_of(model) == job["endpoint"]]
        cost = joining.priced(models[0]).cost_nano_usd(*usage_of(line)) if models else 0
        if not await self._is_in(run, place, job["_id"]):
            waste = {"late_calls": 1, "cost_nano_usd": cost}
            await self._store.book_waste(run["_id"], job["_id"], waste)
        return cost

    async def _is_in(self, run: RunDoc, place: Place, job_id: str) -> bool:
        """Has the run had this job's answer? Its audit trail tells."""
        told = [*run["events"], *[event async for event in self._store.audit_events(run["_id"])]]
        return any(
            event["type"] == "step.joined" and event["step"] == place.step_id and event["data"]["job"] == job_id
            for event in told
        )

    async def _follow(self, planned: Commit, hints: list[tuple[Pool, Hint]]) -> None:
        """What comes after a commit. A next call that may wait for a job as well is deferred at once: told to a pool,
        thousands of them would stand before everybody's next step."""
        run = planned.after
        if run["status"] in TERMINAL:
            await finish(self._store, self._reply, run)
            return
        for pool, hint in commit.hints(planned):
            wanted = effect(await self._bundles.of(run), run, hint.step_id)
            deferred = joining.deferral(wanted, run, hint.step_id, self._store.now())
            put_off = None if deferred is None else joining.defer(run, hint.step_id, deferred)
            if put_off is None or await self._commit(run, put_off, hint.step_id) is None:
                hints.append((pool, hint))

    async def _commit(self, run: RunDoc, decision: Decision, step_id: str) -> Commit | None:
        """Commit on the condition that the run has not moved and nobody works on the step; None where it has."""
        planned = commit.plan(run, decision, now=self._store.now(), unclaimed=(step_id,))
        return planned if await self._store.commit(planned) is Verdict.APPLIED else None

    async def _wait_for_room(self) -> None:
        """Hold answers back while hints queue: what they lead to must not stand before others' steps."""
        for _ in range(HELD_BACK):
            queues = await self._store.queues()
            if max((queue.wait_ms for queue in queues.values()), default=0) <= FULL_QUEUE_MS:
                return
            await asyncio.sleep(FULL_QUEUE_MS / 1000)

    def _now_ms(self) -> int:
        return int(self._store.now().timestamp() * 1000)


def _outcome(call: LlmCall, line: JobLine, at_ms: int) -> Replied | Failed:
    try:
        return Replied(decode(call, line), at_ms)
    except ProviderError as error:
        return Failed(error.code, error.message, error.retryable, error.retry_after_s, at_ms)
