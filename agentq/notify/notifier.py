"""The notifier: brings deliveries to their receivers, and tries again what did not arrive.

It runs beside the scheduler, in the same process. Several may run: a delivery is claimed by one of them. Nothing sleeps
with a delivery in hand: what is to be tried later waits in MongoDB.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta

from agentq.engine.delivery import MAX_ATTEMPTS, of_batch, retry_delay_s
from agentq.errors import AgentqError
from agentq.notify.failure import NotDelivered
from agentq.place import place
from agentq.store.deliveries import LEASE, Deliveries
from schemas.delivery import Delivery, DeliveryKind, Failure

log = logging.getLogger(__name__)

Send = Callable[[Delivery], Awaitable[None]]
AT_ONCE = 64
LANE_AT_ONCE = 8  # one receiver that is slow, or a tenant's dead host, leaves room for the others
TENANT_AT_ONCE = 32
TRY_S = LEASE.total_seconds() - 25  # what takes longer is cut, well before its claim runs out


def no_crash(point: str) -> None:
    """Production: crash points do nothing."""


class Notifier:
    """``tick`` begins every try that is due and fits; ``send`` says how, by the kind of delivery, and raises
    ``NotDelivered``."""

    def __init__(
        self,
        deliveries: Deliveries,
        send: Mapping[DeliveryKind, Send],
        *,
        crash: Callable[[str], None] = no_crash,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._deliveries = deliveries
        self._send = send
        self._crash = crash
        self._chance = chance
        self._under_way: Counter[str] = Counter()  # by lane, and by tenant
        self._tries: set[asyncio.Task[None]] = set()

    async def tick(self) -> int:
        """One round: how many tries were begun. Raises ``Unavailable`` where MongoDB does not answer."""
        for batch in await self._deliveries.untold():
            await self._deliveries.add(of_batch(batch))
            await self._deliveries.told(batch["_id"])
        begun = 0
        for lane in await self._deliveries.due_lanes():
            for _ in range(self._room(lane)):
                delivery = await self._deliveries.claim(lane)
                if delivery is None:
                    break
                self._begin(delivery)
                begun += 1
        return begun

    def _room(self, lane: str) -> int:
        tenant, _, _ = lane.partition("|")
        return max(0, min(
            AT_ONCE - len(self._tries), LANE_AT_ONCE - self._under_way[lane], TENANT_AT_ONCE - self._under_way[tenant]
        ))  # fmt: skip

    async def settle(self) -> None:
        """Wait until the tries under way have ended."""
        while self._tries:
            await asyncio.wait(self._tries)

    async def run(self, interval_s: float) -> None:
        """Tick until cancelled; an outage is reported and waited out. Tries under way at the end are cut; what they
        carried is due again when its claim runs out."""
        try:
            while True:
                try:
                    while await self.tick():
                        if self._tries:
                            await asyncio.wait(self._tries, timeout=interval_s, return_when=asyncio.FIRST_COMPLETED)
                except AgentqError as error:
                    log.warning("the notifier waits: %s", error)
                except Exception as error:  # noqa: BLE001 - ending here would leave everybody untold, in silence
                    log.error("the notifier waits: %s", place(error))
                await asyncio.sleep(interval_s)
        finally:
            for task in self._tries:
                task.cancel()

    def _begin(self, delivery: Delivery) -> None:
        counted = Counter([delivery["lane"], delivery["tenant"]])
        task = asyncio.create_task(self._try(delivery))
        self._under_way += counted
        self._tries.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tries.discard(task)
            self._under_way -= counted

        task.add_done_callback(ended)

    async def _try(self, delivery: Delivery) -> None:
        """One try, and the mark of how it went. Without the mark it is tried again, so nothing is raised."""
        try:
            failure = await self._outcome(delivery)
            if failure is None:
                self._crash("after_delivery")
                await self._deliveries.arrived(delivery)
            else:
                await self._failed(delivery, failure)
        except AgentqError as error:
            log.warning("delivery %s is tried again: %s", delivery["_id"], error.code)

    async def _outcome(self, delivery: Delivery) -> NotDelivered | None:
        """None if it arrived."""
        if delivery["attempts"] > MAX_ATTEMPTS:  # whoever tried it did not live to say so
            return NotDelivered("Every try ended without an outcome.", code="attempts_used_up", final=True)
        try:
            async with asyncio.timeout(TRY_S):
                await self._send[delivery["kind"]](delivery)
        except NotDelivered as failure:
            return failure
        except TimeoutError:
            return NotDelivered("It took too long.", code="timeout")
        except Exception as error:  # noqa: BLE001 - it counts as a try, so that it does not go on for ever
            log.error("delivery %s: %s", delivery["_id"], place(error))
            return NotDelivered(f"Unexpected: {type(error).__name__}.", code="internal")
        return None

    async def _failed(self, delivery: Delivery, failure: NotDelivered) -> None:
        now = self._deliveries.now()
        delay_s = None if failure.final else retry_delay_s(delivery["attempts"], self._chance())
        retry_at = None if delay_s is None else now + timedelta(seconds=max(delay_s, failure.retry_after_s or 0))
        told: Failure = {"code": failure.code, "message": failure.message, "at": now}
        marked = await self._deliveries.failed(delivery, told, retry_at)
        if marked and retry_at is None:
            log.warning("delivery %s is dead: %s", delivery["_id"], failure.code)
