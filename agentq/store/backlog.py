"""The backlog in MongoDB: what waits, what is in flight, who may have how much. Used by the admission alone.

What waits is read by the index only as far as it is needed: the flows that have something, and the heads of their
lines. What is in flight is a covered query. So nothing here grows with the length of the backlog.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple, Protocol, TypeVar, cast

from bson.son import SON
from pymongo import ASCENDING, WriteConcern
from pymongo.asynchronous.database import AsyncDatabase

from agentq.engine.admission import Waiting
from agentq.protocol import TERMINAL, Pool, Priority
from agentq.store.backlog_queries import IN_FLIGHT, RELEASE, admission, first_of_line, first_runs, joining, look_again
from schemas.catalog import NODE_POOL, Bundle

T = TypeVar("T")
Doc = dict[str, Any]
Answer = Callable[[Awaitable[Any]], Awaitable[Any]]
GHOST = timedelta(seconds=30)  # a turn's place that belongs to a run which was never stored is free after that
MANY = 10_000  # documents that one answer may bring: each question less is half a millisecond of ours
TURNS_AT_ONCE = 16  # conversations whose next turn is let go at the same time


class Flying(NamedTuple):
    """Runs in flight that entered by ``pool``: those that a worker has ``taken``, or whose hint still waits. ``flows``:
    how many of each flow, and their estimated cost. Those that rest, paused or until a person answers, are left out:
    they may do so for weeks. They come back without being asked for, so a cap is exceeded by those that go on."""

    pool: Pool
    priority: Priority
    taken: bool
    runs: int
    flows: Mapping[str, tuple[int, int]]


class Ended(NamedTuple):
    """What a run that has ended did cost, in nano-dollars."""

    workflow: str
    cost: int


class Limit(NamedTuple):
    """What a tenant, or one of its keys, may have. None: no limit. Money in nano-dollars."""

    weight: float = 1.0
    in_flight: int | None = None
    spend: int | None = None
    per_minute: int | None = None
    waiting: int | None = None

    @property
    def caps(self) -> bool:
        """Does it limit what is in flight, so that its runs must go through the backlog?"""
        return (self.in_flight, self.spend, self.per_minute) != (None, None, None)


class Backlog(Protocol):
    """What the admission needs of a store. Every method may raise ``Unavailable`` and may be repeated."""

    def now(self) -> datetime:
        """The store's time."""

    async def lead(self, name: str, ms: int) -> bool:
        """Take or prolong the leader's lease by the server's clock; False: somebody else has it."""

    async def waits(self, classes: Collection[Priority]) -> set[Priority]:
        """Those of these classes of which any run waits to be admitted."""

    async def waiting(self, priority: Priority) -> dict[Pool, dict[str, str]]:
        """The flows of a class that have a run to admit, by pool, and the first run of each: that may be one which
        ``heads`` leaves out."""

    async def heads(self, priority: Priority, pool: Pool, flows: Sequence[str], limit: int) -> dict[str, list[Waiting]]:
        """The first runs, up to ``limit``, of each of these flows' lines that may be let in now."""

    async def admit(self, run_ids: Sequence[str]) -> set[str]:
        """Let runs in, each once: those of them that were waiting and are now in flight."""

    async def flight(self) -> list[Flying]:
        """What is in flight and does not rest, counted."""

    async def joining(self, tenants: Collection[str]) -> dict[str, int]:
        """The estimated cost of these tenants' runs that wait for a provider's job, by flow. They take no place in a
        pool and are no part of ``flight``, but what they cost is as good as spent."""

    async def flying(self) -> dict[str, tuple[Pool, Priority, str, int]]:
        """All runs in flight: where they entered, class, flow, estimated cost."""

    async def ended(self, run_ids: Collection[str]) -> dict[str, Ended]:
        """Of these runs, those that have ended."""

    async def release(self, limit: int) -> int:
        """Runs whose time has come and turns that nothing is before any more may be admitted. Gives how many of those
        that are held were looked at; a turn that must go on waiting is looked at again later, the longer it waits."""

    async def limits(self) -> dict[str, Limit]:
        """The limits in force, by flow (a tenant, or ``tenant|key``)."""

    async def routes(self) -> dict[Pool, frozenset[Pool]]:
        """The pools to which runs that enter by a pool may come, by the current workflows."""

    async def remember(self, name: str, doc: Doc) -> None:
        """Keep a small document of the admission's under a name."""

    async def remembered(self, name: str) -> Doc | None:
        """What was kept under a name."""

    async def schedules(self, limit: int) -> list[Doc]:
        """Recurring requests that are due, see ``agentq.schedule``."""


class MongoBacklog:
    """``Backlog`` on MongoDB."""

    def __init__(self, db: AsyncDatabase[Doc], now: Callable[[], datetime], answer: Answer) -> None:
        self._runs = db["runs"]
        self._admission = db["admission"]
        self._notes = db.get_collection("admission", write_concern=WriteConcern(w=1, j=False))
        self._limits = db["limits"]
        self._conversations = db["conversations"]
        self._schedules = db["schedules"]
        self._workflows = db["workflows"]
        self._workflow_names = db["workflow_names"]
        self._answer = answer
        self.now = now

    async def lead(self, name: str, ms: int) -> bool:
        free_or_mine = {"$or": [{"holder": name}, {"$expr": {"$lt": ["$until", "$$NOW"]}}]}
        until = [{"$set": {"holder": name, "until": {"$add": ["$$NOW", ms]}}}]
        for _ in range(2):
            taken = await self._answer(self._admission.update_one({"_id": "leader", **free_or_mine}, until))
            if taken.matched_count:
                return True
            nobody: Doc = {"$setOnInsert": {"holder": None, "until": None}}  # the first time: None is before any time
            await self._answer(self._notes.update_one({"_id": "leader"}, nobody, upsert=True))
        return False

    async def waits(self, classes: Collection[Priority]) -> set[Priority]:
        if not classes:
            return set()
        where: Doc = {"backlog.class": {"$in": [*classes]}}
        return set(await self._answer(self._runs.distinct("backlog.class", where)))

    async def waiting(self, priority: Priority) -> dict[Pool, dict[str, str]]:
        found: dict[Pool, dict[str, str]] = {}
        for pool in await self._answer(self._runs.distinct("pool", {"backlog.class": priority})):
            firsts = await self._answer(self._runs.aggregate(first_runs(priority, pool), batchSize=MANY))
            found[pool] = {doc["_id"]: doc["first"] for doc in await self._answer(firsts.to_list())}
        return found

    async def heads(self, priority: Priority, pool: Pool, flows: Sequence[str], limit: int) -> dict[str, list[Waiting]]:
        found: dict[str, list[Waiting]] = {}
        first, *others = [first_of_line(priority, pool, flow, limit) for flow in flows]
        together = [{"$unionWith": {"coll": "runs", "pipeline": other}} for other in others]
        cursor = await self._answer(self._runs.aggregate([*first, *together], batchSize=MANY))
        for doc in await self._answer(cursor.to_list()):
            run = Waiting(doc["_id"], doc["rank"], max(1, doc["cost"]))
            found.setdefault(doc["flow"], []).append(run)
        return found

    async def admit(self, run_ids: Sequence[str]) -> set[str]:
        now = self.now()
        where = {"_id": {"$in": list(run_ids)}, "status": "queued", "cancel": None}
        updated = await self._answer(
            self._runs.update_many({**where, "backlog.class": {"$exists": True}}, admission(now))
        )
        if updated.modified_count == len(run_ids):
            return set(run_ids)
        found = self._runs.find({**where, "in_flight": True, "backlog": None}, {"_id": 1})
        return {doc["_id"] for doc in await self._answer(found.to_list())}

    async def flight(self) -> list[Flying]:
        grouped = await self._answer(self._runs.aggregate(IN_FLIGHT, hint="flight"))
        return [
            Flying(one["pool"], one["priority"], not one["untaken"], sum(doc["runs"]),
                   dict(zip(doc["flows"], zip(doc["runs"], doc["costs"], strict=True), strict=True)))
            for doc in await self._answer(grouped.to_list())
            if {"pool", "priority"} <= (one := doc["_id"]).keys() and doc["flows"]
        ]  # fmt: skip

    async def joining(self, tenants: Collection[str]) -> dict[str, int]:
        grouped = await self._answer(self._runs.aggregate(joining(tenants), hint="joining"))
        return {doc["_id"]: doc["cost"] for doc in await self._answer(grouped.to_list())}

    async def flying(self) -> dict[str, tuple[Pool, Priority, str, int]]:
        fields = {"pool": 1, "priority": 1, "flow": 1, "cost": 1}
        cursor = self._runs.find({"in_flight": True}, fields).hint("flight").batch_size(MANY)
        found = await self._answer(cursor.to_list())
        return {doc["_id"]: (doc["pool"], doc["priority"], doc["flow"], doc["cost"]) for doc in found if "flow" in doc}

    async def ended(self, run_ids: Collection[str]) -> dict[str, Ended]:
        fields = {"workflow.name": 1, "usage.cost_nano_usd": 1, "waste.cost_nano_usd": 1}
        where = {"_id": {"$in": list(run_ids)}, "in_flight": False}
        return {
            doc["_id"]: Ended(
                doc["workflow"].get("name", ""),
                doc["usage"].get("cost_nano_usd", 0) + doc["waste"].get("cost_nano_usd", 0),
            )
            for doc in await self._answer(self._runs.find(where, fields).to_list())
        }

    async def release(self, limit: int) -> int:
        due: Doc = {"backlog.hold": {"$in": ["time", "turn"]}, "backlog.at": {"$lte": self.now()}}
        fields = {"backlog.hold": 1, "tenant": 1, "conversation": 1}
        docs = await self._answer(self._runs.find(due, fields).sort("backlog.at", ASCENDING).limit(limit).to_list())
        come = {"backlog.hold": "time", "backlog.at": {"$lte": self.now()}}  # it may have been put off meanwhile
        if plain := [doc["_id"] for doc in docs if doc["conversation"] is None]:
            await self._answer(self._runs.update_many({"_id": {"$in": plain}, **come}, RELEASE))
        turns = [doc for doc in docs if doc["conversation"] is not None]
        if timed := [doc["_id"] for doc in turns if doc["backlog"]["hold"] == "time"]:
            in_turn = {"$set": {"backlog.hold": "turn"}}
            await self._answer(self._runs.update_many({"_id": {"$in": timed}, **come}, in_turn))
        if turns:
            await self._release_turns(turns)
        return len(docs)

    async def _release_turns(self, docs: list[Doc]) -> None:
        """The next turn of each of these runs' conversations goes if nobody's turn it is; the others are looked at
        again later. Usually the end of the one before lets it go at once, and this is the net below that: so what
        it costs depends on the conversations where something is to be done, not on how many turns wait."""
        names = {(doc["tenant"], doc["conversation"]) for doc in docs}
        limit = asyncio.Semaphore(TURNS_AT_ONCE)

        async def one(place: Doc) -> None:
            async with limit:
                await self._next_turn(place)

        await asyncio.gather(*(one(place) for place in await self._free_places(names)))
        still = {"_id": {"$in": [doc["_id"] for doc in docs]}, "backlog.hold": "turn"}
        await self._answer(self._runs.update_many(still, look_again(self.now())))

    async def _free_places(self, names: Collection[tuple[str, str]]) -> list[Doc]:
        """The conversations of these in which it is nobody's turn, or that of a run that still waits for it."""
        keys = [SON([("tenant", tenant), ("conversation", conversation)]) for tenant, conversation in names]
        known = {
            (doc["_id"]["tenant"], doc["_id"]["conversation"]): doc
            for doc in await self._answer(self._conversations.find({"_id": {"$in": keys}}).to_list())
        }
        active = [doc["active"] for doc in known.values() if doc.get("active") is not None]
        found = self._runs.find({"_id": {"$in": active}}, {"status": 1, "backlog.hold": 1})
        runs = {run["_id"]: run for run in await self._answer(found.to_list())}
        places: list[Doc] = [known.get((key["tenant"], key["conversation"]), {"_id": key, "new": True}) for key in keys]
        return [place for place in places if self._free(place, runs.get(place.get("active")))]

    def _free(self, place: Doc, run: Doc | None) -> bool:
        if place.get("active") is None:
            return True
        if run is None:
            since = place.get("since")
            return since is None or self.now() - since >= GHOST
        return run["status"] in TERMINAL or run.get("backlog", {}).get("hold") == "turn"

    async def _next_turn(self, place: Doc) -> None:
        """Give a free place to the turn that is next, and let that go. Who had the place and waits keeps it."""
        tenant, conversation, active = place["_id"]["tenant"], place["_id"]["conversation"], place.get("active")
        waiting = {"tenant": tenant, "conversation": conversation, "backlog.hold": "turn"}
        keeps = active and await self._answer(self._runs.find_one({**waiting, "_id": active}, {"_id": 1}))
        first = keeps or await self._answer(
            self._runs.find_one(waiting, {"_id": 1}, sort=[("backlog.front", -1), ("turn", 1)])
        )
        if first is None:
            return
        name = SON([("tenant", tenant), ("conversation", conversation)])
        taken = await self._answer(
            self._conversations.update_one(
                {"_id": name, "active": active},
                {"$set": {"active": first["_id"], "since": self.now()}},
                upsert=place.get("new", False),
            )
        )
        if taken.matched_count or taken.upserted_id:
            await self._answer(self._runs.update_one({"_id": first["_id"], "backlog.hold": "turn"}, RELEASE))

    async def limits(self) -> dict[str, Limit]:
        found = await self._answer(self._limits.find({}).batch_size(MANY).to_list())
        return {doc["_id"]: limit_of(doc) for doc in found}

    async def routes(self) -> dict[Pool, frozenset[Pool]]:
        names = await self._answer(self._workflow_names.find({}, {"hash": 1}).to_list())
        hashes = [doc["hash"] for doc in names]
        docs = await self._answer(self._workflows.find({"_id": {"$in": hashes}}, {"bundle": 1}).to_list())
        return routes_of([Bundle.model_validate(doc["bundle"]) for doc in docs])

    async def remember(self, name: str, doc: Doc) -> None:
        await self._answer(self._notes.replace_one({"_id": name}, doc, upsert=True))

    async def remembered(self, name: str) -> Doc | None:
        return cast("Doc | None", await self._answer(self._admission.find_one({"_id": name})))

    async def schedules(self, limit: int) -> list[Doc]:
        found = self._schedules.find({"due": {"$lte": self.now()}}).sort("due", ASCENDING).limit(limit)
        return cast("list[Doc]", await self._answer(found.to_list()))


def limit_of(doc: Mapping[str, Any]) -> Limit:
    """The limit that a document of the collection ``limits`` holds."""
    return Limit(**{name: doc[name] for name in Limit._fields if doc.get(name) is not None})


def routes_of(bundles: Sequence[Bundle]) -> dict[Pool, frozenset[Pool]]:
    """By the pool in which workflows start, the pools they may use."""
    found: dict[Pool, set[Pool]] = {}
    for bundle in bundles:
        nodes = bundle.workflow.nodes
        used = {NODE_POOL[node.type] for node in nodes.values()}
        if any(agent.tools for agent in bundle.agents.values()):
            used.add("tools")
        found.setdefault(NODE_POOL[nodes[bundle.workflow.start].type], set()).update(used)
    return {pool: frozenset(used) for pool, used in found.items()}
