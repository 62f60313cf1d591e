"""What the backlog says to MongoDB: its indexes, the pipelines that read them, the updates that let a run in or go."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any

from bson.son import SON
from pymongo import ASCENDING, DESCENDING, IndexModel

from agentq.protocol import Pool, Priority
from agentq.run import HINT_GRACE

Doc = dict[str, Any]
ACTIVE = ("queued", "running")  # a run in flight that rests, paused or for a person, keeps nobody from a place

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
        [("tenant", ASCENDING), ("joins.endpoint", ASCENDING), ("flow", ASCENDING), ("cost", ASCENDING)],
        name="joining",
        partialFilterExpression={"joins.endpoint": {"$exists": True}},
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

IN_FLIGHT: list[Doc] = [
    {"$match": {"in_flight": True, "status": {"$in": [*ACTIVE]}, "flow": {"$gt": ""}}},
    {"$group": {
        "_id": {"pool": "$pool", "priority": "$priority", "flow": "$flow", "untaken": {"$eq": ["$status", "queued"]}},
        "runs": {"$sum": 1},
        "cost": {"$sum": "$cost"},
    }},
    # Many small documents are dear to read: one a class and pool, in which the flows are columns.
    {"$group": {
        "_id": {"pool": "$_id.pool", "priority": "$_id.priority", "untaken": "$_id.untaken"},
        "flows": {"$push": "$_id.flow"},
        "runs": {"$push": "$runs"},
        "costs": {"$push": "$cost"},
    }},
]  # fmt: skip


def joining(tenants: Collection[str]) -> list[Doc]:
    """The cost of what waits for a provider's job, by flow; from the index alone."""
    return [
        {"$match": {"tenant": {"$in": [*tenants]}, "joins.endpoint": {"$gt": ""}}},
        {"$group": {"_id": "$flow", "cost": {"$sum": "$cost"}}},
    ]


def first_runs(priority: Priority, pool: Pool) -> list[Doc]:
    """The flows that wait and the first run of each. The index is read at one place a flow, however long its line: for
    that, MongoDB needs exactly this order (``tests/integration/test_backlog_plans.py``)."""
    return [
        {"$match": {"backlog.class": priority, "pool": pool}},
        {"$sort": SON([("backlog.class", 1), ("pool", 1), ("flow", 1), ("backlog.rank", 1), ("_id", 1)])},
        {"$group": {"_id": "$flow", "first": {"$first": "$_id"}}},
    ]


def first_of_line(priority: Priority, pool: Pool, flow: str, limit: int) -> list[Doc]:
    """The first runs of one line that may be let in."""
    return [
        {"$match": {"backlog.class": priority, "pool": pool, "flow": flow, "status": "queued", "cancel": None}},
        {"$sort": SON([("backlog.rank", ASCENDING), ("_id", ASCENDING)])},
        {"$limit": limit},
        {"$project": {"flow": 1, "rank": "$backlog.rank", "cost": "$backlog.cost"}},
    ]


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
