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
from agentq.event import chain
from agentq.protocol import MAX_INPUT_BYTES, TERMINAL, Request
from agentq.run import BACKLOG_LIFE, ends_at, starts_at

Doc = dict[str, Any]
GHOST = timedelta(seconds=30)  # a place that belongs to a run which was never stored is free after that
DEBOUNCES = 10  # how many times ``debounce_s`` a run may be put off in all
ROUNDS = 10  # how often a change is tried on a run that others change at the same time
_LIVES: Doc = {"status": {"$in": ["queued", "paused"]}, "cancel": None, "backlog": {"$exists": True}}


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
        name = _conversation(request)
        free = {"$eq": [{"$ifNull": ["$active", None]}, None]}
        doc = self._conversations.find_one_and_update(
            {"_id": name},
            [{"$set": {
                "turns": {"$add": [{"$ifNull": ["$turns", 0]}, 1]},
                "since": {"$cond": [free, self._now(), {"$ifNull": ["$since", self._now()]}]},
                "active": {"$cond": [free, run_id, "$active"]},
                "alone": {"$and": [free, {"$ifNull": ["$alone", {"$eq": [{"$ifNull": ["$turns", 0]}, 0]}]}]},
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
                f"A run of this conversation is under way ({active}).",
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

    def number(self, request: Request) -> int:
        """The next turn of the request's conversation, without its place: the request is for later."""
        doc = self._conversations.find_one_and_update(
            {"_id": _conversation(request)},
            {"$inc": {"turns": 1}, "$set": {"alone": False}},
            upsert=True,
            return_document=ReturnDocument.AFTER,
        )
        assert doc is not None  # an upsert that returns the document after it finds one
        return int(doc["turns"])

    def known(self, request: Request) -> Doc | None:
        """The run that was made for the request's idempotency key, or that took its request in: ``{_id, fingerprint}``
        with the fingerprint of that request."""
        if request.idempotency_key is None:
            return None
        # Both conditions repeat what their index is limited to: else MongoDB reads the whole collection instead.
        made = {"tenant": request.tenant, "idempotency_key": {"$eq": request.idempotency_key, "$type": "string"}}
        took = {
            "tenant": request.tenant,
            "merged.idempotency_key": request.idempotency_key,
            "merged": {"$exists": True},
        }
        doc = self._runs.find_one(made, _OWNS)
        if doc is None and (request.merges or request.debounce_key is not None):
            doc = self._runs.find_one(took, _OWNS)
        return None if doc is None else _owned(doc, request)

    def merge(self, request: Request) -> Doc | None:
        """Append the request's input to the newest turn of its conversation that still waits; None if none does, or
        the two are too long together. Gives what ``known`` gives from then on."""

        def joins(doc: Doc) -> Doc | None:
            both = f"{doc['input']}\n\n{request.input}"
            return None if len(both.encode()) > MAX_INPUT_BYTES else {"input": both}

        return self._amend(lambda: self._waiting_turn(request), request, "run.merged", joins)

    def _waiting_turn(self, request: Request) -> Doc | None:
        """The last to go of those that wait for their turn, else the one whose turn it is while it waits in a line."""
        name = _conversation(request)
        last = self._runs.find_one(
            {**name, "backlog.hold": "turn", **_LIVES}, sort=[("backlog.front", 1), ("turn", -1)]
        )
        if last is not None:
            return last
        active = (self._conversations.find_one({"_id": name}) or {}).get("active")
        return None if active is None else self._runs.find_one({"_id": active, **_LIVES})

    def replace(self, request: Request) -> Doc | None:
        """Put the request in the place of one with the same debounce key that still waits; None if none does. Gives
        what ``known`` gives from then on.

        The time until it may go begins anew, but it is put off ``DEBOUNCES`` times as long at the most. Raises
        ``Conflict`` (code ``debounce_differs``) where it would have another workflow, class, key or budget.
        """

        def replaces(doc: Doc) -> Doc | None:
            _check_same(doc, request)
            now = self._now()
            at = starts_at(request, now)
            at = min(at, doc["created_at"] + (at - now) * DEBOUNCES)
            ends = ends_at(request, at, at + BACKLOG_LIFE)
            backlog = {name: value for name, value in doc["backlog"].items() if name != "class"}
            return {
                "input": request.input,
                "metadata": request.metadata,
                "user": request.user,
                "notify": request.notify,
                "deadline_at": ends,
                "next_due": ends if doc["status"] == "queued" else min(doc["next_due"], ends),
                "backlog": {**backlog, "hold": "time", "at": at, "rank": 9 - request.urgency},
            }

        where = {"tenant": request.tenant, "backlog.debounce": request.debounce_key, **_LIVES}
        return self._amend(lambda: self._runs.find_one(where), request, "run.replaced", replaces)

    def _amend(
        self, find: Callable[[], Doc | None], request: Request, what: str, change: Callable[[Doc], Doc | None]
    ) -> Doc | None:
        """Change a run that waits, with an event in its chain; by its ``rev``, so never one that was just admitted,
        and never twice for one idempotency key. None as well where others change it all the time."""
        for _ in range(ROUNDS):
            if (doc := find()) is None:
                return None
            if (owned := _owned(doc, request)) is not None:
                return owned
            if (changed := change(doc)) is None:
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
                return {"_id": doc["_id"], "fingerprint": request.fingerprint}
        return None


_OWNS = {"fingerprint": 1, "idempotency_key": 1, "merged": 1}


def _owned(doc: Doc, request: Request) -> Doc | None:
    """Which request with this idempotency key is a part of a run: ``{_id, fingerprint}``, None if none is."""
    if request.idempotency_key is not None:
        for one in (doc, *doc.get("merged", [])):
            if one.get("idempotency_key") == request.idempotency_key:
                return {"_id": doc["_id"], "fingerprint": one["fingerprint"]}
    return None


def _conversation(request: Request) -> Doc:
    return {"tenant": request.tenant, "conversation": request.conversation}


def _check_same(doc: Doc, request: Request) -> None:
    budget = None if request.budget_usd is None else round(request.budget_usd * 1e9)
    had_and_wants = {
        "workflow": (doc["workflow"]["name"], request.workflow),
        "priority": (doc["priority"], request.priority),
        "key": (doc["flow"], request.flow),
        "budget_usd": (doc["budget_nano_usd"], budget),
    }
    if differs := [name for name, (had, wants) in had_and_wants.items() if had != wants]:
        raise Conflict(
            f"A run with this debounce key waits ({doc['_id']}); the request differs in {' and '.join(differs)}.",
            code="debounce_differs",
            hint="Send the same workflow, priority, key and budget, or use another debounce key.",
            run_id=doc["_id"],
        )
