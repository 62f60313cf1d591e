"""The scheduler: looks only at runs that are due, and makes good what crashes, outages and waiting left undone.

Several may run: every act is a conditional commit, and who loses the race does nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta

from agentq.engine import commit
from agentq.engine.recovery import look
from agentq.errors import AgentqError, Unavailable
from agentq.place import place
from agentq.protocol import TERMINAL, Hint, Pool
from agentq.runtime.hearing import Unheard
from agentq.runtime.runtime import CrashPoint, Publish, Reply, finish, no_crash
from agentq.store.api import Store, Verdict
from schemas.run import RunDoc

log = logging.getLogger(__name__)

ROUNDS = 4  # batches in one look: then a sign of life, the broker, and on without a pause
LOOK_AGAIN = timedelta(seconds=1)  # after a lost race, or where our clock ran ahead of MongoDB's
STAYS_DUE = timedelta(seconds=10)
AWAY_MARGIN = timedelta(seconds=15)  # an outage begins before it is noticed
BrokerLost = Callable[[], Awaitable[bool]]


class Scheduler:
    """``tick`` does what is due now, ``ROUNDS`` batches at most. ``broker_lost`` says, once, that the broker has lost
    its data."""

    def __init__(
        self,
        store: Store,
        publish: Publish,
        broker_lost: BrokerLost,
        *,
        name: str,
        reply: Reply,
        max_attempts: int,
        batch: int = 500,
        crash: CrashPoint = no_crash,
    ) -> None:
        self._store = store
        self._publish = publish
        self._broker_lost = broker_lost
        self._name = name
        self._reply = reply
        self._max_attempts = max_attempts
        self._batch = batch
        self._crash = crash
        self._unheard = Unheard()
        self._away_since: datetime | None = None

    async def tick(self) -> int:
        """One look: how many runs were looked at. Raises ``Unavailable`` where a server does not answer."""
        await self._watch_broker()
        looked = 0
        for _ in range(ROUNDS):
            runs = await self._store.due(self._batch)
            looked += len(runs)
            if runs:
                self._unheard.refresh(await self._store.queues(), self._store.now())
            await asyncio.gather(*(self._look(run) for run in runs))
            if len(runs) < self._batch:
                break
        await self._store.beat(f"scheduler:{self._name}", {"kind": "scheduler", "looked_at": looked})
        return looked

    async def _watch_broker(self) -> None:
        """Has the broker lost its data, or come back from an outage in which hints went nowhere? Then they are
        published again. While it is away, everything that needs no broker goes on."""
        try:
            lost = await self._broker_lost()
        except Unavailable as error:
            if self._away_since is None:
                log.warning("the scheduler goes on without a broker: %s", error)
                self._away_since = self._store.now()
            return
        if lost:
            await self._publish_all("is new or empty", None)
        elif self._away_since is not None:
            await self._publish_all("was away", self._away_since - AWAY_MARGIN)
        self._away_since = None

    async def run(self, interval_s: float) -> None:
        """Tick until cancelled, at once again while there is more to do; an outage is reported and waited out."""
        clock_ticks = 0
        while True:
            looked = 0
            try:
                if clock_ticks % max(1, int(60 / interval_s)) == 0:
                    await self._store.sync_clock()
                clock_ticks += 1
                looked = await self.tick()
            except AgentqError as error:
                log.warning("the scheduler waits: %s", error)
            await asyncio.sleep(0 if looked >= ROUNDS * self._batch else interval_s)

    async def _look(self, run: RunDoc) -> None:
        """Everything that is due about one run; a run that cannot be handled does not stop the others."""
        try:
            if run["status"] in TERMINAL:
                await finish(self._store, self._reply, run)
            else:
                await self._mend(run)
            return
        except AgentqError as error:
            log.warning("run %s stays due: %s", run["_id"], error.code)
        except Exception as error:  # noqa: BLE001 - reported by class and place; its words may quote a person
            log.error("run %s stays due: %s", run["_id"], place(error))
        # Not at once: runs that cannot be handled would fill every batch and hide the others.
        await self._store.set_due(run, self._store.now() + STAYS_DUE)

    async def _mend(self, run: RunDoc) -> None:
        hints: list[tuple[Pool, Hint]] = []
        heard = self._unheard.heard_for(run, self._store.now())
        while (act := look(run, self._store.now(), self._max_attempts, heard)) is not None:
            planned = commit.plan(
                run, act.decision, now=self._store.now(), step_id=act.step_id, token=act.token, lapsed=act.lapsed,
                unclaimed=act.unclaimed,
            )  # fmt: skip
            verdict = await self._store.commit(planned)
            if verdict is not Verdict.APPLIED:
                await self._store.set_due(run, self._store.now() + LOOK_AGAIN)
                break
            self._crash("scheduler_after_commit")
            hints += commit.hints(planned)
            run = planned.after
            if run["status"] in TERMINAL:
                await finish(self._store, self._reply, run)
                return
        else:
            now = self._store.now()
            await self._store.set_due(run, max(self._unheard.look_again(run, now), now + LOOK_AGAIN))
        if hints:
            await self._publish(hints)

    async def _publish_all(self, what: str, since: datetime | None) -> None:
        """Every step that could be claimed is hinted again, in moderate batches; ``since``: of those that were hinted
        then or later, because what the broker had before that it still has."""
        log.warning("the broker %s: live runs are dispatched again", what)
        hints: list[tuple[Pool, Hint]] = []
        count = 0
        async for run in self._store.live():
            hints += claimable(run, since)
            if len(hints) >= self._batch:
                await self._publish(hints)
                count, hints = count + len(hints), []
        if hints:
            await self._publish(hints)
        log.warning("dispatched %d steps again", count + len(hints))


def claimable(run: RunDoc, since: datetime | None = None) -> list[tuple[Pool, Hint]]:
    """Hints for the steps of a run that a worker may claim now and that were hinted ``since`` then (None: ever)."""
    return [
        (step["pool"], Hint(run["_id"], step_id, step["attempt"]))
        for step_id, step in run["steps"].items()
        if step_id not in run["leases"] and "not_before" not in step and "held" not in step and "backlog" not in run
        if since is None or step["hinted_at"] >= since
    ]
