"""Limits of tenants and their keys: read, changed at run time, and every change kept in a chain of its own.

The chain is like a run's: each event holds the hash of the one before it, and the head lies apart. Change, event and
head are one transaction, so no change is without its event.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pymongo import ASCENDING
from pymongo.asynchronous.client_session import AsyncClientSession

from agentq.engine.audit import check
from agentq.errors import InvalidRequest, NotFound
from agentq.event import AuditHead, Event, NewEvent, chain, genesis
from agentq.store.backlog import Limit, limit_of
from agentq.store.mongo import MongoStore

Doc = dict[str, Any]
CHAIN = "limits"
MOST = 2**63 - 1  # the largest integer that MongoDB holds


class Limits:
    """The limits in one database. ``by``: who asks, for the chain."""

    def __init__(self, store: MongoStore, by: str) -> None:
        self._store = store
        self._db = store.runs.database
        self._by = by

    async def all(self) -> dict[str, Limit]:
        """By tenant, or ``tenant|key``."""
        found = await self._store._answer(self._db["limits"].find({}).sort("_id", ASCENDING).to_list())
        return {doc["_id"]: limit_of(doc) for doc in found}

    async def set(self, name: str, changes: Mapping[str, Any]) -> tuple[Limit, bool]:
        """Change some limits of a tenant or key; the others stay. Gives what is then in force, and whether that is
        anything new; where it is not, there is no event.

        Raises ``InvalidRequest`` (code ``invalid_limit``) for a value that means nothing.
        """
        for field, value in changes.items():
            least = 0.001 if field == "weight" else 0
            if value is not None and not least <= value <= MOST:  # what is no number at all (nan) as well
                raise InvalidRequest(
                    f"{field} cannot be {value}.",
                    code="invalid_limit",
                    hint="A weight is 0.001 at least, a cap 0, and both are less than 2^63.",
                )
        return await self._change(name, changes)

    async def clear(self, name: str) -> None:
        """Take all limits away. Raises ``NotFound``."""
        if name not in await self.all():
            raise NotFound(f"{name!r} has no limits.", hint="'agentq limits show' lists those that have.")
        await self._change(name, None)

    async def _change(self, name: str, changes: Mapping[str, Any] | None) -> tuple[Limit, bool]:
        async def together(session: AsyncClientSession) -> tuple[Limit, bool]:
            limits, events = self._db["limits"], self._db["limits_audit"]
            found = await limits.find_one({"_id": name}, session=session)
            before: Doc | None = None if found is None else {key: found[key] for key in found if key != "_id"}
            after: Doc | None = None
            if changes is not None:
                merged = {**(before or {}), **changes}
                after = {field: value for field, value in merged.items() if value is not None}
                if after == (before or {}):
                    return limit_of(after), False
            head = await events.find_one({"_id": "head"}, session=session)
            start: AuditHead = genesis(CHAIN) if head is None else {"seq": head["seq"], "hash": head["hash"]}
            news: NewEvent = {
                "type": "limits.cleared" if after is None else "limits.set",
                "at_ms": int(self._store.now().timestamp() * 1000),
                "step": None,
                "data": {"name": name, "by": self._by, "after": after, "before": before},
            }
            chained, end = chain(CHAIN, start, [news])
            await events.insert_one({"_id": f"{CHAIN}:{end['seq']:06d}", **chained[0]}, session=session)
            await events.replace_one({"_id": "head"}, dict(end), upsert=True, session=session)
            if after is None:
                await limits.delete_one({"_id": name}, session=session)
            else:
                await limits.replace_one({"_id": name}, after, upsert=True, session=session)
            return limit_of(after or {}), True

        async with self._db.client.start_session() as session:
            return await self._store._answer(session.with_transaction(together))

    async def history(self) -> tuple[list[Event], list[str]]:
        """All changes, oldest first, and what is wrong with their chain (empty: it is whole and untouched)."""
        records = await self._store._answer(self._db["limits_audit"].find({}).sort("_id", ASCENDING).to_list())
        heads = [doc for doc in records if doc["_id"] == "head"]
        events: list[Any] = [
            {key: value for key, value in doc.items() if key != "_id"} for doc in records if doc["_id"] != "head"
        ]
        head: AuditHead = {"seq": heads[0]["seq"], "hash": heads[0]["hash"]} if heads else genesis(CHAIN)
        return events, check(CHAIN, head, events)
