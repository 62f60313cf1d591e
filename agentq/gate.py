"""What a client knows of the admission: may a request go straight to its pool, its cost, is there room to wait.

The admission's leader writes it into one document, which a client reads at most once a second. A missing or old one
(no scheduler runs) counts as an open gate: then nothing waits, as before there was an admission.
"""

from __future__ import annotations

import threading
import time
from datetime import datetime, timedelta
from typing import Any, get_args

from pymongo.database import Database

from agentq.errors import QueueFull
from agentq.protocol import POOLS, Priority, Request
from agentq.run import UNKNOWN_COST

Doc = dict[str, Any]
FRESH_S = 1.0
STALE = timedelta(seconds=10)
_IN_LINE: Doc = {"backlog.class": {"$in": [*get_args(Priority)]}, "pool": {"$in": [*POOLS]}}
_HELD: Doc = {"backlog.hold": {"$in": ["time", "turn"]}}
FORESEEN_S = 24 * 3600.0  # an estimate of more is none
DEEPEST = 1_000  # how far a position is counted; behind it, a run is "somewhere behind"


class Gate:
    """Thread-safe; one a connection."""

    def __init__(self, db: Database[Doc]) -> None:
        self._db = db
        self._doc: Doc = {}
        self._read = -FRESH_S
        self._room = 0
        self._reserved: dict[str, int] = {}
        self._waiting: dict[str, int] = {}
        self._lock = threading.Lock()

    def refresh(self, now: datetime) -> None:
        """Read what the leader says, at most once in ``FRESH_S``. May raise what pymongo raises."""
        with self._lock:
            if time.monotonic() - self._read < FRESH_S:
                return
            self._read = time.monotonic()
        doc = self._db["admission"].find_one({"_id": "gate"}) or {}
        with self._lock:
            self._doc = doc if doc and now - doc["at"] < STALE else {}
            self._room = self._doc.get("room", 0)
            self._reserved = dict(self._doc.get("reserved", {}))
            self._waiting = {}

    def cost(self, request: Request) -> int:
        """What the run is taken to cost, in nano-dollars."""
        known = {one["workflow"]: one["cost"] for one in self._doc.get("costs", [])}
        cost: int = known.get(request.workflow, UNKNOWN_COST)
        return cost if request.budget_usd is None else max(1, min(cost, round(request.budget_usd * 1e9)))

    def straight(self, request: Request) -> bool:
        """May the request go straight to its pool? Batches never do, nor who has caps, nor while others of its class
        wait. Those of less urgent classes do not matter: what is reserved for a class is free beside a full window."""
        if request.priority == "batch":
            return False
        doc = self._doc
        if not doc:
            return True
        if request.priority in doc["waiting"] or {request.tenant, request.flow} & {*doc["capped"]}:
            return False
        with self._lock:
            reserved = self._reserved.get(request.priority, 0)
            if self._room <= 0 and reserved <= 0:
                return False
            self._room -= 1
            self._reserved[request.priority] = reserved - 1
            return True

    def limited(self, request: Request) -> bool:
        """May so much wait already that ``check_room`` refuses the request?"""
        return not self._doc.get("lines", {}).keys().isdisjoint((request.tenant, request.flow))

    def check_room(self, request: Request) -> None:
        """Refuse a request whose tenant (or key) has too many waiting. Raises ``QueueFull``."""
        for name in {request.tenant, request.flow} & self._doc.get("lines", {}).keys():
            most: int = self._doc["lines"][name]
            with self._lock:
                waiting = self._waiting.get(name)
            if waiting is None:
                waiting = self._count(name, most)
            with self._lock:
                self._waiting[name] = waiting + 1
            if waiting >= most:
                wait_s = self._wait_s(request, max(1, most // 10)) or 5.0
                raise QueueFull(
                    f"{name.replace('|', ', key ')} has {most} requests waiting, which is its limit.",
                    retry_after_s=round(min(60.0, max(1.0, wait_s)), 1),
                )

    def _count(self, name: str, most: int) -> int:
        """How many runs of a flow wait, of a tenant with all its keys: in a line, for their time or for their turn.
        By indexes alone, and no further than to one more than ``most``."""
        flows: list[Any] = [name] if "|" in name else [name, {"$gte": f"{name}|", "$lt": f"{name}}}"}]
        waiting = 0
        for where in (_IN_LINE, _HELD):
            for flow in flows:
                if waiting <= most:
                    found = {**where, "flow": flow}
                    waiting += self._db["runs"].count_documents(found, limit=most + 1 - waiting)
        return waiting

    def place(self, run: Doc, now: datetime) -> tuple[int | None, float | None]:
        """Where a run stands and when it may start: runs before it in its own line (None: more than ``DEEPEST``),
        seconds (None: nobody knows). ``run`` with its ``backlog``, ``flow``, ``pool``, ``priority``, ``tenant``."""
        backlog = run.get("backlog")
        if backlog is None:
            return 0, 0.0
        wait_s = max(0.0, (backlog["at"] - now).total_seconds())
        if "class" not in backlog:
            return 0, wait_s if backlog["hold"] == "time" else None
        line = {"backlog.class": backlog["class"], "pool": run["pool"], "flow": run["flow"]}
        before = self._db["runs"].count_documents(
            {**line, "backlog.rank": {"$lt": backlog["rank"]}}, limit=DEEPEST
        ) + self._db["runs"].count_documents(
            {**line, "backlog.rank": backlog["rank"], "_id": {"$lt": run["_id"]}}, limit=DEEPEST
        )
        if before >= DEEPEST:
            return None, None
        return before, self._estimate(str(backlog["class"]), run["tenant"], run["flow"], before + 1)

    def _wait_s(self, request: Request, runs: int) -> float | None:
        return self._estimate(request.priority, request.tenant, request.flow, runs)

    def _estimate(self, priority: str, tenant: str, flow: str, runs: int) -> float | None:
        """How long until ``runs`` more of the tenant's have been let in, by how many end a second while there is work,
        and by its share. Where it has caps these decide, and nobody knows."""
        rate = self._doc.get("rates", {}).get(priority)
        if not rate or {tenant, flow} & {*self._doc["capped"]}:
            return None
        weights = self._doc.get("weights", {})
        others = max(0, self._doc.get("active", {}).get(priority, 1) - 1)
        mine = weights.get(tenant, 1.0)
        average = sum(weights.values()) / len(weights) if weights else 1.0
        wait_s = float(runs / (rate * mine / (mine + others * average)))
        return round(wait_s, 1) if wait_s < FORESEEN_S else None
