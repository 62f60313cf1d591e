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
from pymongo import ASCENDING, DESCENDING, IndexModel, WriteConcern
from pymongo.asynchronous.database import AsyncDatabase

from agentq.engine.admission import CLASSES, Waiting
from agentq.protocol import TERMINAL, Pool, Priority
from agentq.run import HINT_GRACE
from schemas.catalog import NODE_POOL, Bundle

T = TypeVar("T")
Doc = dict[str, Any]
Answer = Callable[[Awaitable[Any]], Awaitable[Any]]
GHOST = timedelta(seconds=30)  # a turn's place that belongs to a run which was never stored is free after that
ACTIVE = ("queued", "running")  # a run in flight that rests, paused or for a person, keeps nobody from a place
TURNS_AT_ONCE = 16  # conversations whose next turn is let go at the same time

BACKLOG_INDEXES = [
    IndexModel(
        [("backlog.class", ASCENDING), ("pool", ASCENDING), ("flow", ASCENDING), ("backlog.rank", ASCENDING),
         ("_id", ASCENDING)],
        name="backlog",
        partialFilterExpression={"backlog.class": {"$exists": True}},
    ),
    IndexModel([("backlog.at", ASCENDING)], name="held", partialFilterExpression={"backlog.hold": {"$exists": True}}),
    IndexModel(
        [("backlog.hold", ASCENDING), ("flow", ASCENDING)],
        name="held_flow",
        partialFilterExpression={"backlog.hold": {"$exists": True}},
    ),
    IndexModel(
        [("tenant", ASCENDING), ("conversation", ASCENDING), ("backlog.front", DESCENDING), ("turn", ASCENDING)],
        name="next_turn",
        partialFilterExpression={"backlog.hold": "turn"},
    ),
    IndexModel(
        [("in_flight", ASCENDING), ("pool", ASCENDING), ("priority", ASCENDING), ("flow", ASCENDING),
         ("status", ASCENDING), ("cost", ASCENDING), ("_id", ASCENDING)],
        name="flight",
        partialFilterExpression={"in_flight": True},
    ),
    IndexModel(
        [("tenant", ASCENDING), ("backlog.debounce", ASCENDING)],
        name="debounce",
        unique=True,
        partialFilterExpression={"backlog.debounce": {"$exists": True}},
    ),
    IndexModel(
        [("tenant", ASCENDING), ("singleton", ASCENDING)],
        name="singleton",
        unique=True,
        partialFilterExpression={"singleton": {"$exists": True}},
    ),
    IndexModel(
        [("tenant", ASCENDING), ("merged.idempotency_key", ASCENDING)],
        name="merged",
        partialFilterExpression={"merged": {"$exists": True}},
    ),
]  # fmt: skip


class Flying(NamedTuple):
    """Runs in flight that entered by ``pool``: those that a worker has ``taken``, or whose hint still waits. Those that
    rest, paused or until a person answers, are left out: they may do so for weeks. They come back without being asked
    for, so a cap is exceeded by those that go on."""

    pool: Pool
    priority: Priority
    flow: str
    taken: bool
    runs: int
    cost: int


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

    async def waits(self, classes: Collection[Priority]) -> bool:
        """Does any run of these classes wait to be admitted?"""

    async def waiting(self) -> dict[Priority, dict[Pool, list[str]]]:
        """The flows that have a run to admit, by class and pool; empty ones are left out."""

    async def heads(self, priority: Priority, pool: Pool, flow: str, limit: int) -> list[Waiting]:
        """The first runs of a flow's line."""

    async def admit(self, run_ids: Sequence[str]) -> set[str]:
        """Let runs in, each once: those of them that were waiting and are now in flight."""

    async def flight(self) -> list[Flying]:
        """What is in flight and does not rest, counted."""

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

    async def waits(self, classes: Collection[Priority]) -> bool:
        where: Doc = {"backlog.class": {"$in": [*classes]}}
        return await self._answer(self._runs.find_one(where, {"_id": 1}, hint="backlog")) is not None

    async def waiting(self) -> dict[Priority, dict[Pool, list[str]]]:
        any_class = {"backlog.class": {"$in": [*CLASSES]}}  # lets MongoDB leap from class to class in the index
        classes = cast("list[Priority]", await self._answer(self._runs.distinct("backlog.class", any_class)))
        pools = await asyncio.gather(*(self._pools_of(priority) for priority in classes))
        return dict(zip(classes, pools, strict=True))

    async def _pools_of(self, priority: Priority) -> dict[Pool, list[str]]:
        where: Doc = {"backlog.class": priority}
        pools = cast("list[Pool]", await self._answer(self._runs.distinct("pool", where)))
        flows = (self._answer(self._runs.distinct("flow", {**where, "pool": pool})) for pool in pools)
        return dict(zip(pools, await asyncio.gather(*flows), strict=True))

    async def heads(self, priority: Priority, pool: Pool, flow: str, limit: int) -> list[Waiting]:
        where = {"backlog.class": priority, "pool": pool, "flow": flow, "status": "queued", "cancel": None}
        cursor = (
            self._runs.find(where, {"backlog.rank": 1, "backlog.cost": 1})
            .sort([("backlog.rank", ASCENDING), ("_id", ASCENDING)])
            .limit(limit)
        )
        return [
            Waiting(doc["_id"], doc["backlog"]["rank"], max(1, doc["backlog"]["cost"]))
            for doc in await self._answer(cursor.to_list())
        ]

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
        untaken = {"$eq": ["$status", "queued"]}
        grouped = await self._answer(
            self._runs.aggregate(
                [
                    {"$match": {"in_flight": True, "status": {"$in": [*ACTIVE]}}},
                    {"$group": {
                        "_id": {"pool": "$pool", "priority": "$priority", "flow": "$flow", "untaken": untaken},
                        "runs": {"$sum": 1},
                        "cost": {"$sum": "$cost"},
                    }},
                ],
                hint="flight",
            )
        )  # fmt: skip
        return [
            Flying(one["_id"]["pool"], one["_id"]["priority"], one["_id"]["flow"], not one["_id"]["untaken"],
                   one["runs"], one["cost"])
            for one in await self._answer(grouped.to_list())
            if {"pool", "priority", "flow"} <= one["_id"].keys()
        ]  # fmt: skip

    async def flying(self) -> dict[str, tuple[Pool, Priority, str, int]]:
        fields = {"pool": 1, "priority": 1, "flow": 1, "cost": 1}
        found = await self._answer(self._runs.find({"in_flight": True}, fields).hint("flight").to_list())
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
        found = await self._answer(self._limits.find({}).to_list())
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


RELEASE: list[Doc] = [{"$set": {"backlog.class": "$priority"}}, {"$unset": "backlog.hold"}]


def look_again(now: datetime) -> list[Doc]:
    """The update after which a held turn is due when it is older by a quarter: after 1 second at least, 30 at most."""
    quarter = {"$divide": [{"$subtract": [now, "$created_at"]}, 4]}
    return [{"$set": {"backlog.at": {"$add": [now, {"$min": [{"$max": [quarter, 1_000]}, 30_000]}]}}}]


def admission(now: datetime) -> list[Doc]:
    """The update that lets a waiting run in: from now on it is in flight, and its first step has been hinted."""
    ends = {"$add": [now, {"$multiply": ["$backlog.wall_s", 1000]}]}
    return [
        {"$set": {
            "in_flight": True,
            "admitted_at": now,
            "cost": "$backlog.cost",
            "rev": {"$add": ["$rev", 1]},
            "steps.s1.hints": 1,
            "steps.s1.hinted_at": now,
            "deadline_at": {"$min": ["$deadline_at", ends]},
            "next_due": now + HINT_GRACE,
        }},
        {"$unset": "backlog"},
    ]  # fmt: skip


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
