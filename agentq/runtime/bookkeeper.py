"""The bookkeeper: counts the lines of batches that have ended, and brings batches to their ends.

It runs beside the scheduler, in the same process. Several may run: lines are counted in transactions, everything else
is a conditional update, and who loses the race does nothing.
"""

from __future__ import annotations

import asyncio
import logging

from agentq.engine import commit
from agentq.engine.decision import Decision, event
from agentq.engine.tally import batch_error, slots
from agentq.errors import Unavailable
from agentq.place import place
from agentq.runtime.ever import ever
from agentq.runtime.runtime import Reply, finish
from agentq.store.api import Store, Verdict
from agentq.store.batches import TALLY_AT_ONCE, Batches
from schemas.batch import CANCELLED, EXPIRED, BatchDoc, BatchStatus
from schemas.run import RunDoc

log = logging.getLogger(__name__)

IDLE = 4  # without a live batch it looks so many times more rarely: who submits one waits for nothing of it
SWEEP_AT_ONCE = 500
SWEEPS_A_TICK = 4  # the scheduler shares the process: a batch that ends must not keep it from others' runs
_UNDECIDED: tuple[BatchStatus, ...] = ("validating", "in_progress")


class Bookkeeper:
    """``tick`` does everything there is to do now."""

    def __init__(self, store: Store, batches: Batches, *, reply: Reply) -> None:
        self._store = store
        self._batches = batches
        self._reply = reply
        self._idle = False

    async def tick(self) -> int:
        """One round: how many ended lines were counted. Raises ``Unavailable`` where MongoDB does not answer."""
        counted = 0
        while True:
            some = await self._batches.tally()
            counted += some
            if some < TALLY_AT_ONCE:
                break
        live = await self._batches.live()
        self._idle = not live and not counted
        for batch in live:
            try:
                await self._care(batch)
            except Unavailable:
                raise
            except Exception as error:  # noqa: BLE001 - one batch must not keep the others from their ends
                log.error("batch %s is left as it is: %s", batch["_id"], place(error))
        return counted

    async def run(self, interval_s: float) -> None:
        """Tick until cancelled; an outage is reported and waited out."""

        async def act() -> float:
            await self.tick()
            return interval_s * IDLE if self._idle else interval_s

        await ever("the bookkeeper", act, interval_s)

    async def _care(self, batch: BatchDoc) -> None:
        now, window = self._store.now(), batch["complete_by"]
        if window is not None and now >= window and batch["status"] in _UNDECIDED:
            ending = await self._batches.move(batch["_id"], _UNDECIDED, "finalizing", ending="expired")
            if ending is None:
                return
            log.warning("batch %s is past its window with %d lines done", batch["_id"], batch["entries"])
            batch = ending
        if batch["total"] is not None and batch["entries"] >= batch["total"]:
            await self._end(batch)
        elif batch["ending"] is not None:
            await self._end_lines(batch)
        elif batch["status"] == "in_progress" and batch["budget_nano_usd"] is not None and batch["paused"] is None:
            await self._mind_budget(batch["_id"])

    async def _end(self, batch: BatchDoc) -> None:
        """Every line has its result or its error."""
        ends: dict[str | None, BatchStatus] = {"expired": "expired", "cancelled": "cancelled", None: "completed"}
        passed = {"at.finalizing": self._store.now()} if batch["status"] == "in_progress" else {}
        all_ended = {"$expr": {"$gte": ["$entries", "$total"]}}
        await self._batches.move(batch["_id"], [batch["status"]], ends[batch["ending"]], all_ended, **passed)

    async def _mind_budget(self, batch_id: str) -> None:
        """Nothing is under way and there is no room for another line: the batch says so until somebody raises it."""
        under_way = await self._batches.under_way(batch_id)
        batch = await self._batches.load(batch_id)
        if batch is None or batch["status"] != "in_progress" or under_way or slots(batch, 0) != 0:
            return
        if await self._batches.pause(batch_id, {"by": "budget", "at": self._store.now()}):
            log.warning("batch %s is paused: its budget has no room for another line", batch_id)

    async def _end_lines(self, batch: BatchDoc) -> None:
        """What waits ends at once, as never started; what is under way is cancelled as any run is."""
        reason = EXPIRED if batch["ending"] == "expired" else CANCELLED
        await self._batches.cancel_in_flight(batch["_id"], reason)
        after = batch["swept"]
        for _ in range(SWEEPS_A_TICK):
            waiting = await self._batches.waiting(batch["_id"], after, SWEEP_AT_ONCE)
            if not waiting:
                return
            ended = await asyncio.gather(*(self._end_waiting(run, reason) for run in waiting))
            if not all(ended):
                return  # one was admitted or changed meanwhile: look again at the next tick
            after = waiting[-1]["_id"]
            await self._batches.set_swept(batch["_id"], after)

    async def _end_waiting(self, run: RunDoc, reason: str) -> bool:
        now = self._store.now()
        cancelled = event(
            "run.cancelled", int(now.timestamp() * 1000), None, reason=reason, open_steps=sorted(run["steps"])
        )
        decision = Decision(
            [cancelled], closed=tuple(run["steps"]), status="cancelled", error=batch_error(reason), drops=("backlog",)
        )
        planned = commit.plan(run, decision, now=now, unclaimed=tuple(run["steps"]))
        if await self._store.commit(planned) is not Verdict.APPLIED:
            return False
        await finish(self._store, self._reply, planned.after)
        return True
