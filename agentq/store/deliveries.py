"""Deliveries on MongoDB: made once an end, claimed by a conditional update, marked by the claimer. A part of the store.

A claim moves ``not_before`` past the time a try may take; it is the lease. Who dies between sending and marking leaves
a delivery that is due again: it goes out once more, under the same id.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from typing import Any, cast

from pymongo import ASCENDING, IndexModel, ReturnDocument, UpdateOne
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import BulkWriteError

from agentq.errors import Unavailable
from agentq.group import Group
from schemas.batch import BatchDoc
from schemas.delivery import Delivery, DeliveryStatus, Failure

Doc = dict[str, Any]
LEASE = timedelta(seconds=45)  # longer than any try may take
KEEP_DELIVERED = timedelta(days=7)
BATCHES_AT_ONCE = 100

INDEXES = [
    IndexModel([("status", ASCENDING), ("lane", ASCENDING), ("not_before", ASCENDING)], name="lanes"),
    IndexModel([("subject", ASCENDING)], name="subject"),
    IndexModel([("created_at", ASCENDING)], name="latest"),
    IndexModel([("forget_at", ASCENDING)], name="forget", expireAfterSeconds=0),
]
UNTOLD = IndexModel([("told", ASCENDING)], name="untold", partialFilterExpression={"told": False})


class Deliveries:
    """Belongs to a ``MongoStore``, which gives its connection, its clock and how errors are translated."""

    def __init__(
        self,
        db: AsyncDatabase[Doc],
        now: Callable[[], datetime],
        answer: Callable[[Awaitable[Any]], Awaitable[Any]],
    ) -> None:
        self._deliveries = db["deliveries"]
        self._batches = db["batches"]
        self._answer = answer
        self.now = now
        self._adds: Group[Sequence[Delivery], None] = Group(self._add_group)

    async def open(self) -> None:
        """Make sure of the indexes."""
        await self._answer(self._deliveries.create_indexes(INDEXES))
        await self._answer(self._batches.create_indexes([UNTOLD]))

    async def add(self, deliveries: Sequence[Delivery]) -> None:
        """Make deliveries durable; those that are there already stay as they are."""
        if deliveries:
            await self._adds(deliveries)

    async def _add_group(self, groups: list[Sequence[Delivery]]) -> list[None]:
        writes = [
            UpdateOne({"_id": one["_id"]}, {"$setOnInsert": one}, upsert=True)
            for deliveries in groups
            for one in deliveries
        ]
        try:
            await self._answer(self._deliveries.bulk_write(writes, ordered=False))
        except BulkWriteError as error:
            if any(not _is_duplicate(one) for one in error.details["writeErrors"]):
                raise Unavailable("MongoDB refused a delivery.", code="delivery_refused") from error
        return [None] * len(groups)

    # -- trying -----------------------------------------------------------------------------------------------------

    async def due_lanes(self) -> list[str]:
        """The lanes in which something is due, the longest due first. Costs by the number of lanes."""
        heads = await self._answer(
            self._deliveries.aggregate(
                [
                    {"$match": {"status": "pending"}},
                    {"$sort": {"status": 1, "lane": 1, "not_before": 1}},
                    {"$group": {"_id": "$lane", "due": {"$first": "$not_before"}}},
                ],
                hint="lanes",
            )
        )
        now = self.now()
        found = [(one["due"], one["_id"]) for one in await self._answer(heads.to_list()) if one["due"] <= now]
        return [lane for _, lane in sorted(found)]

    async def claim(self, lane: str) -> Delivery | None:
        """Take the delivery of a lane that has been due longest; nobody else gets it for ``LEASE``. None: there is
        none. Where the answer is lost, that try is lost with it, and the delivery comes again."""
        now = self.now()
        found = self._deliveries.find_one_and_update(
            {"status": "pending", "lane": lane, "not_before": {"$lte": now}},
            {"$set": {"not_before": now + LEASE, "token": os.urandom(8).hex()}, "$inc": {"attempts": 1}},
            sort=[("not_before", ASCENDING)],
            return_document=ReturnDocument.AFTER,
        )
        return cast("Delivery | None", await self._answer(found))

    async def arrived(self, delivery: Delivery) -> bool:
        """The receiver has it. False: somebody else has claimed it since, and it may arrive again."""
        now = self.now()
        return await self._mark(delivery, status="delivered", error=None, ended_at=now, forget_at=now + KEEP_DELIVERED)

    async def failed(self, delivery: Delivery, failure: Failure, retry_at: datetime | None) -> bool:
        """Try it again at ``retry_at``; None gives it up, for a person to decide."""
        if retry_at is not None:
            return await self._mark(delivery, error=failure, not_before=retry_at)
        return await self._mark(delivery, status="dead", error=failure, ended_at=failure["at"])

    async def _mark(self, delivery: Delivery, **fields: Any) -> bool:
        ours = {"_id": delivery["_id"], "status": "pending", "token": delivery["token"]}
        marked = await self._answer(self._deliveries.update_one(ours, {"$set": {**fields, "token": None}}))
        return bool(marked.matched_count)

    # -- people -----------------------------------------------------------------------------------------------------

    async def load(self, delivery_id: str) -> Delivery | None:
        return cast("Delivery | None", await self._answer(self._deliveries.find_one({"_id": delivery_id})))

    async def latest(self, condition: Doc, limit: int) -> list[Delivery]:
        """Newest first."""
        found = self._deliveries.find(condition).sort("created_at", -1).limit(limit)
        return cast("list[Delivery]", await self._answer(found.to_list()))

    async def count(self, status: DeliveryStatus) -> int:
        return cast("int", await self._answer(self._deliveries.count_documents({"status": status}, hint="lanes")))

    async def redrive(self, condition: Doc) -> int:
        """Dead deliveries that fit are tried again from the start, at once; gives how many."""
        return await self._anew({**condition, "status": "dead"})

    async def hasten(self, delivery_id: str) -> bool:
        """Try a delivery that waits for its next try again from the start, at once. False: it does not wait."""
        return bool(await self._anew({"_id": delivery_id, "status": "pending", "token": None}))

    async def _anew(self, condition: Doc) -> int:
        anew = {"status": "pending", "attempts": 0, "not_before": self.now(), "ended_at": None}
        redriven = await self._answer(self._deliveries.update_many(condition, {"$set": anew}))
        return cast("int", redriven.modified_count)

    # -- batches ----------------------------------------------------------------------------------------------------

    async def untold(self) -> list[BatchDoc]:
        """Batches that have ended and have not told so yet."""
        found = self._batches.find({"told": False, "live": False}).limit(BATCHES_AT_ONCE)
        return cast("list[BatchDoc]", await self._answer(found.to_list()))

    async def told(self, batch_id: str) -> None:
        """Its deliveries are durable."""
        await self._answer(self._batches.update_one({"_id": batch_id}, {"$set": {"told": True}}))


def _is_duplicate(error: Any) -> bool:
    """Two that make the same delivery at once: one of them wins."""
    return bool(error["code"] == 11000)
