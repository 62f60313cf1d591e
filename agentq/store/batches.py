"""Batches on MongoDB: submission, counting, bringing to an end, reading results. A part of the store.

What must agree is written in one transaction: a chunk of lines with how far the submission got; ended lines with the
batch's counters and its ledger. Everything else is a conditional update of the batch's document.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar, cast

from pymongo import ASCENDING, AsyncMongoClient, IndexModel, ReturnDocument
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import DuplicateKeyError, ExecutionTimeout
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern

from agentq.engine.tally import Tally, slots, tally
from agentq.errors import Unavailable
from agentq.protocol import TERMINAL
from agentq.run import Registered
from schemas.batch import (
    EXPIRED,
    BadLine,
    BatchDoc,
    BatchStatus,
    LedgerPage,
    Pause,
    Submitted,
    bad_line_id,
    flow,
    page_id,
    run_id,
    run_range,
)
from schemas.run import RunDoc

T = TypeVar("T")
Doc = dict[str, Any]
TALLY_AT_ONCE = 1_000

RUN_INDEXES = [
    IndexModel([("batch.id", ASCENDING)], name="tally", partialFilterExpression={"tally": True}),
    IndexModel(
        [("batch.id", ASCENDING), ("in_flight", ASCENDING)],
        name="batch_flight",
        partialFilterExpression={"in_flight": True, "batch.id": {"$exists": True}},
    ),
]
BATCH_INDEXES = [
    IndexModel([("key", ASCENDING)], name="key", unique=True),
    IndexModel([("live", ASCENDING)], name="live", partialFilterExpression={"live": True}),
]
BAD_LINE_INDEXES = [IndexModel([("tally", ASCENDING)], name="tally", partialFilterExpression={"tally": True})]
# A run that has ended is counted when its worker (or the scheduler) is done with it: what is written to it inside a
# transaction would keep that one waiting, and what that one writes meanwhile would undo the transaction.
_READY: Doc = {
    "tally": True, "$nor": [{"status": {"$in": sorted(TERMINAL)}, "next_due": {"$type": "date"}}],
}  # fmt: skip
_COUNTED = {"batch": 1, "status": 1, "usage": 1, "waste": 1, "cancel": 1, "error.code": 1, "booked": 1}
_END = {  # agentq.engine.tally.line_end; a run that has not ended keeps what was counted of it before
    "$switch": {
        "branches": [
            {"case": {"$eq": ["$status", "succeeded"]}, "then": "succeeded"},
            {"case": {"$in": ["$status", ["failed", "rejected"]]}, "then": "failed"},
            {
                "case": {"$and": [
                    {"$eq": ["$status", "cancelled"]}, {"$in": [EXPIRED, ["$cancel.reason", "$error.code"]]},
                ]},
                "then": "expired",
            },
            {"case": {"$eq": ["$status", "cancelled"]}, "then": "cancelled"},
        ],
        "default": {"$ifNull": ["$booked.end", None]},
    }
}  # fmt: skip
_BOOK: list[Doc] = [{"$set": {"booked": {"end": _END, "usage": "$usage", "waste": "$waste"}}}, {"$unset": "tally"}]
_HISTORY = {"_id": 0, "usage": 1, "waste": 1, "created_at": 1, "ended_at": 1, "input": 1}


class Batches:
    """Belongs to a ``MongoStore``, which gives its connection, its clock and how errors are translated."""

    def __init__(
        self,
        client: AsyncMongoClient[Doc],
        db: AsyncDatabase[Doc],
        now: Callable[[], datetime],
        answer: Callable[[Awaitable[Any]], Awaitable[Any]],
    ) -> None:
        self._client = client
        self._runs = db["runs"]
        self._batches = db["batches"]
        self._bad_lines = db["bad_lines"]
        self._ledger = db["ledger"]
        self._cursors = db["batch_cursors"]
        self._workflow_names = db["workflow_names"]
        self._now = now
        self._answer = answer

    async def open(self) -> None:
        """Make sure of the indexes."""
        for collection, indexes in (
            (self._runs, RUN_INDEXES), (self._batches, BATCH_INDEXES), (self._bad_lines, BAD_LINE_INDEXES),
        ):  # fmt: skip
            await self._answer(collection.create_indexes(indexes))

    # -- submission -------------------------------------------------------------------------------------------------

    async def workflows(self) -> list[Registered]:
        """The current version of every workflow: a batch is pinned to these as a whole."""
        return cast("list[Registered]", await self._answer(self._workflow_names.find({}, {"_id": 0}).to_list()))

    async def create(self, batch: BatchDoc) -> BatchDoc:
        """Store a new batch; where there is one with its key already, that one is given back."""
        if await self._answer(self._insert(cast("Doc", batch))):
            return batch
        return cast("BatchDoc", await self._answer(self._batches.find_one({"key": batch["key"]})))

    async def _insert(self, batch: Doc) -> bool:
        try:
            await self._batches.insert_one(batch)
        except DuplicateKeyError:
            return False
        return True

    async def add_lines(
        self, batch_id: str, before: Submitted, after: Submitted, runs: Sequence[Doc], bad: Sequence[BadLine]
    ) -> bool:
        """Store the lines between ``before`` and ``after`` whole, with ``after`` as the place to go on from.

        False, and nothing stored, where the submission is elsewhere (another submitter, a cancelled batch).
        """

        async def add(session: AsyncClientSession) -> bool:
            place = {"_id": batch_id, "status": "validating", "submitted.line": before["line"]}
            moved = await self._batches.update_one(place, {"$set": {"submitted": after}}, session=session)
            if moved.matched_count == 0:
                return False
            if runs:
                await self._runs.insert_many(runs, ordered=False, session=session)
            if bad:
                await self._bad_lines.insert_many(cast("Sequence[Doc]", bad), ordered=False, session=session)
            return True

        return await self._transaction(add)

    # -- status -----------------------------------------------------------------------------------------------------

    async def load(self, batch_id: str) -> BatchDoc | None:
        return cast("BatchDoc | None", await self._answer(self._batches.find_one({"_id": batch_id})))

    async def by_key(self, key: str) -> BatchDoc | None:
        """The batch of a submission."""
        return cast("BatchDoc | None", await self._answer(self._batches.find_one({"key": key})))

    async def latest(self, condition: Doc, limit: int) -> list[BatchDoc]:
        """Newest first."""
        found = self._batches.find(condition).sort("_id", -1).limit(limit)
        return cast("list[BatchDoc]", await self._answer(found.to_list()))

    async def live(self) -> list[BatchDoc]:
        """Every batch that has not ended."""
        return cast("list[BatchDoc]", await self._answer(self._batches.find({"live": True}).to_list()))

    async def move(
        self, batch_id: str, source: Sequence[BatchStatus], to: BatchStatus, condition: Doc | None = None, **fields: Any
    ) -> BatchDoc | None:
        """Change the status, if it is one of ``source``; gives the batch as it then is, None if it was not.

        A batch that leaves ``validating`` has as many lines as are on disk.
        """
        fields |= {
            "status": to,
            f"at.{to}": self._now(),
            "live": to not in ("completed", "failed", "expired", "cancelled"),
        }
        written = {name: {"$literal": value} for name, value in fields.items()}
        total = {"$ifNull": ["$total", {"$add": ["$submitted.good", "$submitted.bad"]}]}
        found = self._batches.find_one_and_update(
            {"_id": batch_id, "status": {"$in": list(source)}, **(condition or {})},
            [{"$set": {**written, "total": total}}],
            return_document=ReturnDocument.AFTER,
        )
        return cast("BatchDoc | None", await self._answer(found))

    async def pause(self, batch_id: str, pause: Pause | None) -> BatchDoc | None:
        """Pause a live batch, or (None) go on; None, and nothing changed, where it is so already. A person's pause
        takes the place of the budget's, so that a higher budget does not end it; never the other way round."""
        condition: Doc = {"_id": batch_id, "status": {"$in": ["validating", "in_progress"]}}
        if pause is None:
            condition["paused"] = {"$ne": None}
        elif pause["by"] == "person":
            condition["paused.by"] = {"$ne": "person"}
        else:
            condition["paused"] = None
        found = self._batches.find_one_and_update(
            condition, {"$set": {"paused": pause}}, return_document=ReturnDocument.AFTER
        )
        return cast("BatchDoc | None", await self._answer(found))

    async def set_budget(self, batch_id: str, nano_usd: int) -> BatchDoc | None:
        """Change what a live batch may cost; one that its budget has paused goes on, one that a person has does not."""
        by_budget = {"$eq": ["$paused.by", "budget"]}
        found = self._batches.find_one_and_update(
            {"_id": batch_id, "live": True},
            [{"$set": {"budget_nano_usd": nano_usd, "paused": {"$cond": [by_budget, None, "$paused"]}}}],
            return_document=ReturnDocument.AFTER,
        )
        return cast("BatchDoc | None", await self._answer(found))

    async def set_swept(self, batch_id: str, upto: str) -> None:
        await self._answer(self._batches.update_one({"_id": batch_id}, {"$set": {"swept": upto}}))

    # -- counting ---------------------------------------------------------------------------------------------------

    async def tally(self) -> int:
        """Count lines that have ended, are settled and were not counted before, up to TALLY_AT_ONCE runs and as many
        bad lines; gives how many there were. One transaction: counters, money, ledger and the flags that say "not
        counted yet"."""
        waiting = await self._answer(self._runs.find_one(_READY, {"_id": 1}, hint="tally"))
        if waiting is None and await self._answer(self._bad_lines.find_one({"tally": True}, {"_id": 1})) is None:
            return 0
        return await self._transaction(self._tally)

    async def _tally(self, session: AsyncClientSession) -> int:
        runs = await self._runs.find(_READY, _COUNTED, session=session).hint("tally").limit(TALLY_AT_ONCE).to_list()
        bad = await self._bad_lines.find({"tally": True}, session=session).limit(TALLY_AT_ONCE).to_list()
        for batch_id, counted in tally(runs, cast("list[BadLine]", bad)).items():
            await self._count(batch_id, counted, session)
        if runs:
            counted_runs = {"_id": {"$in": [run["_id"] for run in runs]}}
            await self._runs.update_many(counted_runs, _BOOK, session=session)
        if bad:
            ids = [line["_id"] for line in bad]
            await self._bad_lines.update_many({"_id": {"$in": ids}}, {"$unset": {"tally": ""}}, session=session)
        return len(runs) + len(bad)

    async def _count(self, batch_id: str, counted: Tally, session: AsyncClientSession) -> None:
        grown = {**counted.added, "entries": len(counted.lines)}
        before = await self._batches.find_one_and_update(
            {"_id": batch_id},
            {"$inc": grown, "$max": {"max_line_nano_usd": counted.max_line_nano_usd}},
            projection={"entries": 1},
            session=session,
        )
        if before is None or not counted.lines:
            return
        first = before["entries"]
        page: LedgerPage = {
            "_id": page_id(batch_id, first), "batch": batch_id, "first": first, "lines": counted.lines,
            "at": self._now(),
        }  # fmt: skip
        await self._ledger.insert_one(cast("Doc", page), session=session)

    async def under_way(self, batch_id: str) -> int:
        """Lines admitted whose cost is not booked yet. Costs by what is in flight, never by the size of the batch.

        Read before the batch's costs, so that a line which is booked meanwhile counts twice, never not at all.
        """
        flying = await self.in_flight(batch_id)
        unbooked = {"tally": True, "batch.id": batch_id}
        return flying + cast("int", await self._answer(self._runs.count_documents(unbooked, hint="tally")))

    async def in_flight(self, batch_id: str) -> int:
        """Lines that have been admitted and have not ended."""
        flying = {"in_flight": True, "batch.id": batch_id}
        return cast("int", await self._answer(self._runs.count_documents(flying, hint="batch_flight")))

    async def held(self, batch: BatchDoc) -> int:
        """Lines that wait for a time of their own."""
        waiting = {"backlog.hold": "time", "flow": flow(batch["tenant"], batch["_id"])}
        return cast("int", await self._answer(self._runs.count_documents(waiting, hint="held_flow")))

    async def room(self) -> dict[str, int]:
        """For admission: how many more lines may be admitted now, by the flow of each batch that is not open. 0 says
        that it is closed (being submitted, paused, out of budget, ending); what is not named may have as many as the
        pools have room for. Four queries, however many batches there are."""
        batches = {batch["_id"]: batch for batch in await self.live()}
        counted = [
            batch["_id"] for batch in batches.values()
            if batch["budget_nano_usd"] is not None and batch["status"] == "in_progress" and batch["paused"] is None
        ]  # fmt: skip
        under_way: Counter[str] = Counter()
        if counted:  # one after the other, costs last, as with ``under_way``
            under_way += await self._count_by_batch({"in_flight": True, "batch.id": {"$in": counted}}, "batch_flight")
            under_way += await self._count_by_batch({"tally": True, "batch.id": {"$in": counted}}, "tally")
            found = await self._answer(self._batches.find({"_id": {"$in": counted}}).to_list())
            batches |= {batch["_id"]: cast("BatchDoc", batch) for batch in found}
        room: dict[str, int] = {}
        for batch_id, batch in batches.items():
            if (left := slots(batch, under_way[batch_id])) is not None:
                room[flow(batch["tenant"], batch_id)] = left
        return room

    async def _count_by_batch(self, condition: Doc, hint: str) -> Counter[str]:
        grouped = await self._answer(
            self._runs.aggregate(
                [{"$match": condition}, {"$group": {"_id": "$batch.id", "runs": {"$sum": 1}}}], hint=hint
            )
        )
        return Counter({one["_id"]: one["runs"] for one in await self._answer(grouped.to_list())})

    # -- bringing to an end -----------------------------------------------------------------------------------------

    async def waiting(self, batch_id: str, after: str, limit: int) -> list[RunDoc]:
        """Lines that wait for admission, in order, after the run id ``after``."""
        first, last = run_range(batch_id)
        condition = {"_id": {"$gt": after or first, "$lt": last}, "backlog": {"$exists": True}}
        found = self._runs.find(condition, {"journal": 0}).sort("_id", ASCENDING).limit(limit)
        return cast("list[RunDoc]", await self._answer(found.to_list()))

    async def cancel_in_flight(self, batch_id: str, reason: str) -> int:
        """Ask for the end of every line that has been admitted: the ordinary cancel. Gives how many were asked."""
        now = self._now()
        condition = {
            "in_flight": True, "batch.id": batch_id, "status": {"$nin": sorted(TERMINAL)}, "cancel": None,
        }  # fmt: skip
        update = {"$set": {"cancel": {"reason": reason, "at": now}, "next_due": now}, "$inc": {"rev": 1}}
        asked = await self._answer(self._runs.update_many(condition, update, hint="batch_flight"))
        return cast("int", asked.modified_count)

    # -- results ----------------------------------------------------------------------------------------------------

    async def entries(self, batch_id: str, start: int, limit: int = 500) -> list[RunDoc | BadLine]:
        """Ended lines in the order in which they were counted, from the ``start``-th (from 0): each line once."""
        first = await self._answer(
            self._ledger.find_one(
                {"_id": {"$gte": page_id(batch_id, 0), "$lte": page_id(batch_id, start)}}, sort=[("_id", -1)]
            )
        )
        if first is None:
            return []
        span = {"$gte": first["_id"], "$lt": page_id(batch_id, start + limit)}
        pages = await self._answer(self._ledger.find({"_id": span}).sort("_id", ASCENDING).to_list())
        numbered = [line for page in pages for line in page["lines"]]
        lines = numbered[start - first["first"] :][:limit]
        found = await self._ended(batch_id, lines)
        return [found[line] for line in lines]

    async def _ended(self, batch_id: str, lines: Sequence[int]) -> Mapping[int, RunDoc | BadLine]:
        ids = [run_id(batch_id, line) for line in lines]
        runs = await self._answer(self._runs.find({"_id": {"$in": ids}}, {"journal": 0}).to_list())
        found: dict[int, RunDoc | BadLine] = {run["batch"]["line"]: cast("RunDoc", run) for run in runs}
        missing = [bad_line_id(batch_id, line) for line in lines if line not in found]
        if missing:
            bad = await self._answer(self._bad_lines.find({"_id": {"$in": missing}}).to_list())
            found |= {line["line"]: cast("BadLine", line) for line in bad}
        return found

    async def by_line(self, batch_id: str) -> AsyncIterator[RunDoc | BadLine]:
        """Every line that has ended, as it now is, in the order of the file. Streams."""
        runs, bad = self.runs_of(batch_id), self._bad_of(batch_id)
        run, line = await anext(runs, None), await anext(bad, None)
        while run is not None or line is not None:
            if line is None or (run is not None and run["batch"]["line"] < line["line"]):
                assert run is not None
                if run["status"] in TERMINAL:
                    yield run
                run = await anext(runs, None)
            else:
                yield line
                line = await anext(bad, None)

    async def runs_of(self, batch_id: str) -> AsyncIterator[RunDoc]:
        """The runs of a batch in the order of their lines."""
        first, last = run_range(batch_id)
        async for run in self._pages(self._runs, first, last):
            yield cast("RunDoc", run)

    async def _bad_of(self, batch_id: str) -> AsyncIterator[BadLine]:
        async for line in self._pages(self._bad_lines, f"{batch_id}:", f"{batch_id};"):
            yield cast("BadLine", line)

    async def _pages(self, collection: Any, first: str, last: str, size: int = 500) -> AsyncIterator[Doc]:
        """By ranges of ids instead of one long cursor: it may be read as slowly as one likes."""
        condition: Doc = {"_id": {"$gte": first, "$lt": last}}
        while True:
            page = await self._answer(collection.find(condition, {"journal": 0}).sort("_id", 1).limit(size).to_list())
            for doc in page:
                yield doc
            if len(page) < size:
                return
            condition = {"_id": {"$gt": page[-1]["_id"], "$lt": last}}

    async def cursor(self, batch_id: str, name: str) -> int:
        """How many ended lines a named reader has had."""
        doc = await self._answer(self._cursors.find_one({"_id": f"{batch_id}:{name}"}))
        return 0 if doc is None else cast("int", doc["at"])

    async def move_cursor(self, batch_id: str, name: str, to: int) -> None:
        """A named reader has had so many; never backwards."""
        moved = self._cursors.update_one({"_id": f"{batch_id}:{name}"}, {"$max": {"at": to}}, upsert=True)
        await self._answer(moved)

    async def history(self, workflow: str, limit: int = 1_000) -> list[Doc]:
        """Usage, waste, times and input of the workflow's newest succeeded runs; fewer than there are, or none, where
        they cannot be found within two seconds: an estimate is not worth more."""
        condition = {"workflow.name": workflow, "status": "succeeded"}
        found = self._runs.find(condition, _HISTORY).sort("_id", -1).limit(limit).max_time_ms(2_000)
        try:
            return cast("list[Doc]", await self._answer(found.to_list()))
        except Unavailable as error:
            if isinstance(error.__cause__, ExecutionTimeout):
                return []
            raise

    # -- inside -----------------------------------------------------------------------------------------------------

    async def _transaction(self, work: Callable[[AsyncClientSession], Awaitable[T]]) -> T:
        """All of ``work`` or nothing, majority-journaled; repeated where it met another writer."""

        async def run() -> T:
            async with self._client.start_session() as session:
                return await session.with_transaction(
                    work,
                    read_concern=ReadConcern("snapshot"),
                    write_concern=WriteConcern(w="majority", j=True),
                )

        return cast("T", await self._answer(run()))
