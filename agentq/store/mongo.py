"""The store on MongoDB: every query has a name here, and no other module of the system speaks to the database.

Writes are majority-acknowledged and journaled. Claims, commits and audit inserts that become ready while one is under
way go out together (``agentq.group``). One event loop owns a store.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Collection, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar, cast

from bson.codec_options import CodecOptions
from pymongo import (
    ASCENDING,
    DESCENDING,
    AsyncMongoClient,
    IndexModel,
    ReadPreference,
    ReturnDocument,
    UpdateOne,
    WriteConcern,
    timeout,
)
from pymongo.asynchronous.cursor import AsyncCursor
from pymongo.errors import (
    BulkWriteError,
    ConfigurationError,
    ConnectionFailure,
    DuplicateKeyError,
    ExecutionTimeout,
    OperationFailure,
    PyMongoError,
    WriteConcernError,
)

from agentq.clock import elapsed_s
from agentq.engine.commit import Commit, Grant
from agentq.engine.delivery import of_run
from agentq.errors import AgentqError, ConfigError, Unavailable
from agentq.event import AuditHead, Event
from agentq.group import Group
from agentq.protocol import TERMINAL, Hint, Pool
from agentq.run import RUN_FORMAT
from agentq.store import documents
from agentq.store.api import Dead, Held, Letters, Queue, Verdict
from agentq.store.backlog import MongoBacklog
from agentq.store.backlog_queries import BACKLOG_INDEXES
from agentq.store.batches import Batches
from agentq.store.deliveries import Deliveries
from agentq.store.documents import WITHOUT_JOURNAL
from agentq.store.jobs import Jobs
from schemas.catalog import Bundle
from schemas.chat import Message
from schemas.run import RunDoc

T = TypeVar("T")
Doc = dict[str, Any]

OPTIONS: Doc = {
    "w": "majority",
    "journal": True,
    "retryWrites": False,  # a tenth of mongod's work; claims and commits are repeated and judged by us
    "retryReads": True,
    "serverSelectionTimeoutMS": 20_000,  # longer than an election: a failover is a pause, not an error
    "connectTimeoutMS": 3_000,
    "socketTimeoutMS": 20_000,
    "appname": "agentq",
}
DUPLICATE_KEY = 11000
NOT_ALLOWED = (13, 18)  # unauthorized, authentication failed

RUN_INDEXES = [
    *BACKLOG_INDEXES,
    *(
        IndexModel([("ended_at", DESCENDING)], name=name, partialFilterExpression={field: {"$exists": True}})
        for name, field in (("quarantined", "quarantine.code"), ("rejected", "refused.code"))
    ),
    IndexModel([("next_due", ASCENDING)], name="due", partialFilterExpression={"next_due": {"$type": "date"}}),
    IndexModel(
        [("tenant", ASCENDING), ("idempotency_key", ASCENDING)],
        name="idempotency",
        unique=True,
        partialFilterExpression={"idempotency_key": {"$type": "string"}},
    ),
    IndexModel(
        [("tenant", ASCENDING), ("conversation", ASCENDING), ("turn", ASCENDING)],
        name="turns",
        unique=True,
        partialFilterExpression={"conversation": {"$type": "string"}},
    ),
]

BEAT_INDEXES = [IndexModel([("at", ASCENDING)], name="forget", expireAfterSeconds=86_400)]


class MongoStore:
    """``agentq.store.api.Store`` on a MongoDB replica set. Create it inside the event loop that will use it.

    Raises ``ConfigError`` where ``url`` cannot be read; connects at first use.
    """

    def __init__(self, url: str, database: str = "agentq") -> None:
        try:
            self._client: AsyncMongoClient[Doc] = AsyncMongoClient(url, **OPTIONS)
        except (ConfigurationError, ValueError):  # the library's own words may quote a password
            raise ConfigError(
                "The MongoDB URL is not valid.", code="bad_mongo_url",
                hint="It reads mongodb://user:password@host:27017/, user and password percent-encoded.",
            ) from None  # fmt: skip
        options: CodecOptions[Doc] = CodecOptions(tz_aware=True, tzinfo=UTC)
        # Verdicts are read where they were written, whatever the URL prefers.
        self._db = self._client.get_database(database, codec_options=options, read_preference=ReadPreference.PRIMARY)
        self.runs = self._db["runs"]
        self.audit = self._db["audit"]
        # Copies must outlive a change of primary before the run lets go of its events, but need not wait for a journal;
        # a lost ``settle``, ``set_due`` or ``beat`` is simply done again.
        self._audit_copies = self.audit.with_options(write_concern=WriteConcern(w="majority", j=False))
        self._beats = self._db.get_collection("heartbeats", write_concern=WriteConcern(w=1, j=False))
        self._unhurried_runs = self.runs.with_options(write_concern=WriteConcern(w=1, j=False))
        self._turns = self._db["conversations"].with_options(write_concern=WriteConcern(w=1, j=False))
        self._server_ahead_s = time.time() - elapsed_s()  # until it is measured
        self.backlog = MongoBacklog(self._db, self.now, self._answer)
        self.batches = Batches(self._client, self._db, self.now, self._answer)
        self.deliveries = Deliveries(self._db, self.now, self._answer)
        self.jobs = Jobs(self._db, self.now, self._answer)
        self._claims: Group[tuple[Hint, Grant], RunDoc | None] = Group(self._claim_group)
        self._commits: Group[Commit, Verdict] = Group(self._commit_group)
        self._copies: Group[Sequence[Event], None] = Group(self._copy_group)
        self._settles: Group[RunDoc, None] = Group(self._settle_group)
        self._dues: Group[tuple[RunDoc, datetime | None], None] = Group(self._due_group)

    async def open(self, *, within_s: float | None = None) -> None:
        """Check the server, measure its clock, make sure of the indexes. Safe to repeat.

        Raises ``ConfigError`` where the server is no replica set (writes could be lost), is not of the one that the URL
        names, or refuses the credentials; ``Unavailable`` where none answers (``within_s``: for so long; default the
        20 s that an election may take).
        """
        hello = await self._hello(within_s)
        if hello.get("isreplicaset"):
            raise Unavailable(
                "MongoDB's replica set is not initiated yet.", code="mongo_not_initiated",
                hint="Run replSetInitiate on one of its members.",
            )  # fmt: skip
        if "setName" not in hello:
            raise ConfigError(
                "MongoDB runs as a standalone server.",
                code="mongo_standalone",
                hint="Start it with --replSet and run replSetInitiate; a single node is enough.",
            )
        await self.sync_clock()
        await self._answer(self.runs.create_indexes(RUN_INDEXES))
        await self.batches.open()
        await self.deliveries.open()
        await self.jobs.open()
        await self._answer(self._beats.create_indexes(BEAT_INDEXES))

    async def _hello(self, within_s: float | None) -> Doc:
        try:
            with timeout(within_s):
                return await self._answer(self._db.command("hello"))
        except Unavailable:
            if self._client.topology_description.server_descriptions():
                raise
            raise ConfigError(  # the driver forgets a server that answers and does not belong to the set
                "No server of the MongoDB URL is a member of the replica set that it names.", code="mongo_wrong_set",
                hint="Check replicaSet in the URL, and that the server was started with --replSet.",
            ) from None  # fmt: skip

    async def close(self) -> None:
        await self._client.close()

    async def sync_clock(self) -> None:
        """Measure MongoDB's clock; between two measurements ``now`` follows a clock that nobody can set."""
        before = elapsed_s()
        hello = await self._answer(self._db.command("hello"))
        server_s = hello["localTime"].replace(tzinfo=UTC).timestamp()
        self._server_ahead_s = server_s - (before + elapsed_s()) / 2

    def now(self) -> datetime:
        milliseconds = int((elapsed_s() + self._server_ahead_s) * 1000)
        return datetime.fromtimestamp(milliseconds / 1000, UTC)

    # -- the protocol -----------------------------------------------------------------------------------------------

    async def claim(self, hint: Hint, grant: Grant) -> RunDoc | None:
        return await self._claims((hint, grant))

    async def _claim_group(self, claims: list[tuple[Hint, Grant]]) -> list[RunDoc | Exception | None]:
        try:
            if len(claims) == 1:
                condition, update = documents.claim(*claims[0], self.now())
                found = self.runs.find_one_and_update(
                    condition, update, projection=WITHOUT_JOURNAL, return_document=ReturnDocument.AFTER
                )
                return [cast("RunDoc | None", await self._answer(found))]
            return await self._claim_and_look(claims)
        except Unavailable:  # if it was applied all the same, our tokens are in the documents
            return await self._claim_and_look(claims)

    async def _claim_and_look(self, claims: list[tuple[Hint, Grant]]) -> list[RunDoc | Exception | None]:
        writes = [UpdateOne(*documents.claim(hint, grant, self.now())) for hint, grant in claims]
        await self._answer(self.runs.bulk_write(writes, ordered=False))
        ids = list({hint.run_id for hint, _ in claims})
        found = self.runs.find({"_id": {"$in": ids}}, WITHOUT_JOURNAL)
        docs = {doc["_id"]: doc for doc in await self._answer(found.to_list())}
        holding = [documents.holds(docs.get(hint.run_id), hint.step_id, grant.token) for hint, grant in claims]
        return [
            cast("RunDoc", docs[hint.run_id]) if held else None for (hint, _), held in zip(claims, holding, strict=True)
        ]

    async def commit(self, commit: Commit) -> Verdict:
        return await self._commits(commit)

    async def _commit_group(self, commits: list[Commit]) -> list[Verdict | Exception]:
        writes = [UpdateOne(*documents.commit(commit)) for commit in commits]
        written = await self._answer(self.runs.bulk_write(writes, ordered=False))
        if written.matched_count == len(writes):
            return [Verdict.APPLIED] * len(writes)
        ids = list({commit.run_id for commit in commits})
        fields = {"rev": 1, "receipts": 1, "leases": 1, "audit": 1, "steps": 1}
        docs = {doc["_id"]: doc for doc in await self._answer(self.runs.find({"_id": {"$in": ids}}, fields).to_list())}
        return [documents.verdict(docs.get(commit.run_id), commit) for commit in commits]

    async def renew(self, leases: Sequence[Held], ms: int) -> set[Held]:
        if not leases:
            return set()
        writes = [UpdateOne(*documents.renewal(lease, ms)) for lease in leases]
        written = await self._answer(self.runs.bulk_write(writes, ordered=False))
        if written.matched_count == len(writes):
            return set()
        ids = list({lease.run_id for lease in leases})
        docs = {
            doc["_id"]: doc
            for doc in await self._answer(self.runs.find({"_id": {"$in": ids}}, {"leases": 1}).to_list())
        }
        return {lease for lease in leases if not documents.holds(docs.get(lease.run_id), lease.step_id, lease.token)}

    async def load(self, run_id: str, *, journal: bool = False) -> RunDoc | None:
        fields = None if journal else WITHOUT_JOURNAL
        return cast("RunDoc | None", await self._answer(self.runs.find_one({"_id": run_id}, fields)))

    async def record(self, run: RunDoc) -> None:
        try:
            await self.runs.insert_one(cast("Doc", run))
        except DuplicateKeyError:
            return
        except PyMongoError as error:
            raise _translate(error) from error

    async def copy_audit(self, events: Sequence[Event]) -> None:
        if events:
            await self._copies(events)

    async def _copy_group(self, groups: list[Sequence[Event]]) -> list[None]:
        records = [documents.audit_record(event) for events in groups for event in events]
        try:
            await self._answer(self._audit_copies.insert_many(records, ordered=False))
        except BulkWriteError as error:
            others = [one for one in error.details["writeErrors"] if one["code"] != DUPLICATE_KEY]
            if others:
                raise Unavailable(f"MongoDB refused an audit record: {others[0].get('errmsg', '')}") from error
        return [None] * len(groups)

    async def audit_events(self, run_id: str) -> AsyncIterator[Event]:
        cursor = self.audit.find(documents.audit_range(run_id)).sort("_id", ASCENDING)
        async for doc in self._stream(cursor):
            yield documents.audit_event(doc)

    async def settle(self, run: RunDoc) -> None:
        await self._settles(run)

    async def _settle_group(self, runs: list[RunDoc]) -> list[None]:
        ended = {
            "_id": {"$in": [run["_id"] for run in runs]},
            "status": {"$in": sorted(TERMINAL)},
            "audit.hash": {"$in": [run["audit"]["hash"] for run in runs]},  # no event has come since they were copied
        }
        done: Doc = {"$set": {"events": [], "next_due": None}}
        if any(documents.tells(run) for run in runs):
            done = [{"$set": {**done["$set"], "told_at": "$ended_at"}}]  # type: ignore[assignment]
        await self._answer(self._unhurried_runs.update_many(ended, done))
        return [None] * len(runs)

    async def pass_turn(self, run: RunDoc) -> None:
        where = {"tenant": run["tenant"], "conversation": run["conversation"]}
        alone = {"_id": where, "active": run["_id"], "alone": True}  # no turn of it has ever had to wait
        if (await self._answer(self._turns.update_one(alone, {"$set": {"active": None}}))).matched_count:
            return
        for holder in (run["_id"], None):  # the second time for one that came between the two writes
            waiting = await self._answer(
                self.runs.find_one({**where, "backlog.hold": "turn"}, {"_id": 1}, sort=documents.NEXT_TURN)
            )
            following: str | None = waiting["_id"] if waiting else None
            if holder is None and following is None:
                return
            slot: Doc = {"_id": where, "active": holder}
            passed = await self._answer(self._turns.update_one(slot, {"$set": {"active": following}}))
            if passed.matched_count == 0:
                return
            if following is not None:
                await self._answer(self.runs.update_one(*documents.release(following, "turn")))
                return

    async def notify(self, run: RunDoc) -> None:
        await self.deliveries.add(of_run(run))

    async def book_waste(self, run_id: str, token: str, waste: dict[str, int]) -> None:
        once: Doc = {"_id": run_id, "late": {"$ne": token}}
        counted: Doc = {"$inc": {f"waste.{name}": amount for name, amount in waste.items()}, "$push": {"late": token}}
        of_batch = {"$exists": True}  # then there is something to count; one of the two matches
        writes = [
            UpdateOne({**once, "batch": {"$not": of_batch}}, counted),
            UpdateOne({**once, "batch": of_batch}, {**counted, "$set": {"tally": True}}),
        ]
        await self._answer(self.runs.bulk_write(writes, ordered=False))

    # -- the scheduler ----------------------------------------------------------------------------------------------

    async def due(self, limit: int) -> list[RunDoc]:
        # The type is for MongoDB, which otherwise does not use an index of dates and reads all runs there are.
        due = {"next_due": {"$lte": self.now(), "$type": "date"}, "v": {"$lte": RUN_FORMAT}}
        found = self.runs.find(due, WITHOUT_JOURNAL).sort("next_due", ASCENDING).limit(limit)
        return cast("list[RunDoc]", await self._answer(found.to_list()))

    async def set_due(self, run: RunDoc, due: datetime | None) -> None:
        await self._dues((run, due))

    async def _due_group(self, moved: list[tuple[RunDoc, datetime | None]]) -> list[None]:
        writes = [
            UpdateOne({"_id": run["_id"], "rev": run["rev"], **documents.unclaimed(run)}, {"$set": {"next_due": due}})
            for run, due in moved
        ]
        await self._answer(self._unhurried_runs.bulk_write(writes, ordered=False))
        return [None] * len(moved)

    async def live(self) -> AsyncIterator[RunDoc]:
        async for doc in self._stream(self.runs.find(documents.LIVE, WITHOUT_JOURNAL).hint("flight")):
            yield cast("RunDoc", doc)

    async def unended(self) -> AsyncIterator[RunDoc]:
        # The ids first: whoever walks through the runs may change when they are due, and would meet them again.
        condition = {"next_due": {"$type": "date"}, "status": {"$nin": sorted(TERMINAL)}}
        ids = [doc["_id"] async for doc in self._stream(self.runs.find(condition, {"_id": 1}).hint("due"))]
        for at in range(0, len(ids), 500):
            some = self.runs.find({"_id": {"$in": ids[at : at + 500]}}, WITHOUT_JOURNAL)
            for doc in await self._answer(some.to_list()):
                yield cast("RunDoc", doc)

    async def dead_letters(self, kind: Dead, which: Letters, limit: int) -> list[RunDoc]:
        condition = documents.dead_letters(kind, which)
        found = self.runs.find(condition, WITHOUT_JOURNAL).sort("ended_at", DESCENDING).limit(limit).hint(kind)
        return cast("list[RunDoc]", await self._answer(found.to_list()))

    async def current(self) -> list[Bundle]:
        hashes = await self._answer(self._db["workflow_names"].distinct("hash"))
        found = await self._answer(self._db["workflows"].find({"_id": {"$in": hashes}}).to_list())
        return [Bundle.model_validate(doc["bundle"]) for doc in found]

    async def alive(self, within: timedelta) -> list[str]:
        found = self._beats.find({"at": {"$gte": self.now() - within}}, {"_id": 1}).sort("_id", ASCENDING)
        return [doc["_id"] for doc in await self._answer(found.to_list())]

    async def queues(self) -> dict[Pool, Queue]:
        since = self.now() - documents.WORKER_HEARS
        return documents.queues(
            await self._answer(self._beats.find({"kind": "worker", "at": {"$gte": since}}).to_list())
        )

    async def stopped(self, run_ids: Collection[str]) -> set[str]:
        asked = [{"cancel": {"$ne": None}}, {"status": {"$in": sorted(TERMINAL)}}]
        found = self.runs.find({"_id": {"$in": list(run_ids)}, "$or": asked}, {"_id": 1})
        return {doc["_id"] for doc in await self._answer(found.to_list())}

    async def beat(self, name: str, facts: dict[str, Any]) -> None:
        await self._answer(
            self._beats.update_one({"_id": name}, {"$set": facts, "$currentDate": {"at": True}}, upsert=True)
        )

    # -- workflows and conversations --------------------------------------------------------------------------------

    async def bundle(self, bundle_hash: str) -> Bundle | None:
        doc = await self._answer(self._db["workflows"].find_one({"_id": bundle_hash}))
        return Bundle.model_validate(doc["bundle"]) if doc else None

    async def register(self, bundles: Sequence[Bundle]) -> None:
        for bundle in bundles:
            await self.keep_bundle(bundle)
            current = bundle.registered()
            await self._answer(
                self._db["workflow_names"].replace_one({"_id": bundle.workflow.name}, dict(current), upsert=True)
            )

    async def keep_bundle(self, bundle: Bundle) -> None:
        known = {"name": bundle.workflow.name, "bundle": bundle.model_dump(mode="json")}
        await self._answer(self._db["workflows"].update_one({"_id": bundle.hash}, {"$setOnInsert": known}, upsert=True))

    async def history(self, run: RunDoc, tokens: int) -> list[Message]:
        condition = documents.earlier_turns(run)
        fields = {"input": 1, "result.answer": 1}
        cursor = self.runs.find(condition, fields).sort("turn", -1).limit(200)
        return documents.window(await self._answer(cursor.to_list()), tokens)

    # -- reading for people -----------------------------------------------------------------------------------------

    async def latest(self, condition: Doc, limit: int) -> list[RunDoc]:
        """The newest runs that fit a condition on tenant, status, conversation or workflow, newest first."""
        found = self.runs.find(condition, WITHOUT_JOURNAL).sort("_id", -1).limit(limit)
        return cast("list[RunDoc]", await self._answer(found.to_list()))

    async def conversation(self, tenant: str, conversation: str) -> list[RunDoc]:
        """The runs of a conversation in the order of their turns."""
        condition = documents.of_conversation(tenant, conversation)
        found = self.runs.find(condition, WITHOUT_JOURNAL).sort("turn", ASCENDING)
        return cast("list[RunDoc]", await self._answer(found.to_list()))

    async def chains(self) -> AsyncIterator[tuple[str, AuditHead | None, list[Event]]]:
        """Every run's audit head (None where the run is gone) with its events, copied out or not, in order of seq.

        Streams: two cursors over the same order, so memory does not grow with the number of runs.
        """
        fields = {"audit": 1, "events": 1}
        runs = self._stream(self.runs.find({}, fields).sort("_id", ASCENDING))
        records = self._stream(self.audit.find({}).sort("_id", ASCENDING))
        run, record = await anext(runs, None), await anext(records, None)
        while run is not None or record is not None:
            run_id = min(doc for doc in (run and run["_id"], record and record["_id"].split(":")[0]) if doc)
            events: list[Event] = []
            while record is not None and record["_id"].startswith(f"{run_id}:"):
                events.append(documents.audit_event(record))
                record = await anext(records, None)
            if run is not None and run["_id"] == run_id:
                copied = {event["seq"] for event in events}
                events += [event for event in run["events"] if event["seq"] not in copied]
                yield run_id, run["audit"], events
                run = await anext(runs, None)
            else:
                yield run_id, None, events

    async def _answer(self, call: Awaitable[T]) -> T:
        """Await a call to MongoDB; a failure that may pass becomes ``Unavailable``, its outcome unknown."""
        try:
            return await call
        except BulkWriteError as error:
            if error.details.get("writeErrors"):
                raise
            raise _translate(error) from error
        except PyMongoError as error:
            raise _translate(error) from error

    async def _stream(self, cursor: AsyncCursor[Doc]) -> AsyncIterator[Doc]:
        try:
            async for doc in cursor:
                yield doc
        except PyMongoError as error:
            raise _translate(error) from error


def _translate(error: PyMongoError) -> AgentqError:
    passing = (ConnectionFailure, WriteConcernError, ExecutionTimeout, BulkWriteError)
    if isinstance(error, passing) or error.has_error_label("RetryableWriteError"):
        return Unavailable(
            "MongoDB does not answer.", code="mongo_unavailable", hint="Check that it runs: agentq doctor.",
            cause=type(error).__name__,
        )  # fmt: skip
    if isinstance(error, OperationFailure) and error.code in NOT_ALLOWED:
        return ConfigError(
            "MongoDB refuses these credentials.", code="mongo_refused", hint="Check user, password and roles."
        )
    return AgentqError(f"MongoDB refused a command: {type(error).__name__}.", code="mongo_error")
