"""Requests that meet another: the next turn of a conversation, one that joins a waiting turn, one that replaces it.

A conversation's document names the run whose turn it is. Who gives birth to a run takes that place in the same write as
the turn's number; the end of the run passes it on. A place whose run has ended or never came to be is free.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from pymongo import ReturnDocument
from pymongo.database import Database

from agentq.errors import Conflict
from agentq.protocol import MAX_INPUT_BYTES, TERMINAL, Request, chain, starts_at

Doc = dict[str, Any]
GHOST = timedelta(seconds=30)  # a place that belongs to a run which was never stored is free after that
DEBOUNCES = 10  # how many times ``debounce_s`` a run may be put off in all
_LIVES = {"status": "queued", "cancel": None, "backlog": {"$exists": True}}


class Turn(NamedTuple):
    """``number``: the request's place in its conversation. ``before``: the run that it must wait for, None if none."""

    number: int
    before: str | None


class Turns:
    """The part of the client that looks at other requests. Raises what pymongo raises."""

    def __init__(self, db: Database[Doc], now: Callable[[], datetime]) -> None:
        self._runs = db["runs"]
        self._conversations = db["conversations"]
        self._now = now

    def take(self, request: Request, run_id: str) -> Turn:
        """The next turn of the request's conversation, with the place if it is free.

        Raises ``Conflict`` (code ``conversation_busy``) where it is not and the request's policy is ``reject``.
        """
        name = {"tenant": request.tenant, "conversation": request.conversation}
        free = {"$eq": [{"$ifNull": ["$active", None]}, None]}
        doc = self._conversations.find_one_and_update(
            {"_id": name},
            [{"$set": {
                "turns": {"$add": [{"$ifNull": ["$turns", 0]}, 1]},
                "since": {"$cond": [free, self._now(), {"$ifNull": ["$since", self._now()]}]},
                "active": {"$cond": [free, run_id, "$active"]},
            }}],
            upsert=True,
            return_document=ReturnDocument.AFTER,
        )  # fmt: skip
        assert doc is not None  # an upsert that returns the document after it finds one
        active = doc["active"]
        if active == run_id or self._take_over(name, doc, run_id):
            return Turn(doc["turns"], None)
        if request.conversation_policy == "reject":
            raise Conflict(
                f"A run of the conversation {request.conversation!r} is under way ({active}).",
                code="conversation_busy",
                hint="Wait for it, or use the conversation policy enqueue, merge or interrupt.",
                run_id=active,
            )
        return Turn(doc["turns"], active)

    def _take_over(self, name: Doc, doc: Doc, run_id: str) -> bool:
        """Is the place free though it has a name on it, and does nobody else wait for it? Then it is ours."""
        run = self._runs.find_one({"_id": doc["active"]}, {"status": 1})
        if run is None and self._now() - doc["since"] < GHOST:
            return False
        if run is not None and run["status"] not in TERMINAL:
            return False
        if self._runs.find_one({**name, "backlog.hold": "turn"}, {"_id": 1}) is not None:
            return False
        place = {"$set": {"active": run_id, "since": self._now()}}
        return self._conversations.update_one({"_id": name, "active": doc["active"]}, place).matched_count > 0

    def give_back(self, tenant: str, conversation: str, run_id: str) -> None:
        """The run that took the place was not stored."""
        name = {"tenant": tenant, "conversation": conversation}
        self._conversations.update_one({"_id": name, "active": run_id}, {"$set": {"active": None}})

    def joined(self, request: Request) -> Doc | None:
        """The run that a request with this idempotency key joined or replaced: ``{_id, fingerprint}``."""
        if request.idempotency_key is None:
            return None
        where = {"tenant": request.tenant, "merged.idempotency_key": request.idempotency_key}
        doc = self._runs.find_one(where, {"merged": 1})
        if doc is None:
            return None
        same = [one for one in doc["merged"] if one.get("idempotency_key") == request.idempotency_key]
        return {"_id": doc["_id"], "fingerprint": same[0]["fingerprint"]}

    def merge(self, request: Request) -> str | None:
        """Append the request's input to the newest turn of its conversation that still waits; None if none does, or
        the two are too long together."""

        def joins(doc: Doc) -> Doc | None:
            both = f"{doc['input']}\n\n{request.input}"
            return None if len(both.encode()) > MAX_INPUT_BYTES else {"input": both}

        where = {"tenant": request.tenant, "conversation": request.conversation}
        return self._amend(where, request, "run.merged", joins)

    def replace(self, request: Request) -> str | None:
        """Put the request in the place of one with the same debounce key that still waits; None if none does.

        The time until it may go begins anew, but it is put off ``DEBOUNCES`` times as long at the most.
        """

        def replaces(doc: Doc) -> Doc | None:
            at = starts_at(request, self._now())
            last = doc["created_at"] + (at - self._now()) * DEBOUNCES
            backlog = {name: value for name, value in doc["backlog"].items() if name != "class"}
            return {
                "input": request.input,
                "metadata": request.metadata,
                "user": request.user,
                "notify": request.notify,
                "backlog": {**backlog, "hold": "time", "at": min(at, last), "rank": 9 - request.urgency},
            }

        where = {"tenant": request.tenant, "backlog.debounce": request.debounce_key}
        return self._amend(where, request, "run.replaced", replaces)

    def _amend(self, where: Doc, request: Request, what: str, change: Callable[[Doc], Doc | None]) -> str | None:
        """Change a run that waits, with an event in its chain; by its ``rev``, so never one that was just admitted."""
        while True:
            doc = self._runs.find_one({**where, **_LIVES}, sort=[("turn", -1)])
            changed = None if doc is None else change(doc)
            if doc is None or changed is None:
                return None
            told = {"type": what, "at_ms": int(self._now().timestamp() * 1000), "step": None,
                    "data": {"fingerprint": request.fingerprint}}  # fmt: skip
            events, head = chain(doc["_id"], doc["audit"], [told])  # type: ignore[list-item]
            joined = {"fingerprint": request.fingerprint}
            if request.idempotency_key is not None:
                joined["idempotency_key"] = request.idempotency_key
            update = {
                "$set": {**changed, "audit": head},
                "$push": {"events": {"$each": events}, "merged": joined},
                "$inc": {"rev": 1},
            }
            if self._runs.update_one({"_id": doc["_id"], "rev": doc["rev"], **_LIVES}, update).matched_count:
                return str(doc["_id"])
