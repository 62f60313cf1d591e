"""The client other back ends import: hand in a request, ask about it, wait for it, cancel it.

    client = Client("mongodb://...", "redis://...")
    run = client.submit("Where is my order 10023?", workflow="support_desk", user="C-7", idempotency_key="mail-8812")
    print(run.wait(timeout_s=60).answer)

When ``submit`` returns, the request is on disk in MongoDB (majority, journaled): it will end visibly, whatever
crashes. The text goes to MongoDB only; the broker carries the run's id. Without a broker URL, or while the broker is
down, the scheduler dispatches the run a moment later.

Self-contained: imports nothing of agentq but what its wheel holds, reads no environment, configures no
logging, never becomes the host's current Celery app. Thread-safe, and safe to use after a fork (connections are made
anew in the child).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import islice
from typing import Any, cast

from pymongo.database import Database
from pymongo.errors import BulkWriteError, DuplicateKeyError, PyMongoError

from agentq.connection import Connection, Connections, mongo_errors
from agentq.errors import (
    AgentqError,
    Conflict,
    IdempotencyConflict,
    InvalidRequest,
    NotFound,
    QueueFull,
    Unavailable,
    UnknownWorkflow,
)
from agentq.event import Event
from agentq.handle import Handle, Outcome, Runs
from agentq.protocol import Hint, Pool, Request, parse_request
from agentq.run import START_STEP, NewRun, Registered, Reply, check_times, new_run, new_run_id, starts_at
from agentq.schedule import Schedules

__all__ = ["Client", "Handle", "Outcome"]

log = logging.getLogger(__name__)
Doc = dict[str, Any]
WORKFLOW_CACHE_S = 5.0  # how long a client may go on pinning new runs to the version it knows
HINTS_A_MESSAGE = 64
DUPLICATE_KEY = 11000
ROUNDS = 10  # how often a request is tried that finds another in its way, and that gone when it wants to join it


class Client:
    """A connection to one agentq. Connects at first use; ``close`` when done, or use it in a ``with``."""

    def __init__(self, mongo_url: str, broker_url: str | None = None, database: str = "agentq") -> None:
        self._broker_url = broker_url
        self._connections = Connections(mongo_url, broker_url, database)
        self._runs = Runs(self._connections)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close this process's connections; the next call makes new ones."""
        self._connections.close()

    def submit(
        self,
        input: str,  # noqa: A002 - the word of the API
        *,
        workflow: str = "default",
        tenant: str = "default",
        user: str | None = None,
        conversation: str | None = None,
        priority: str = "standard",
        budget_usd: float | None = None,
        deadline_s: float | None = None,
        idempotency_key: str | None = None,
        metadata: Doc | None = None,
        key: str | None = None,
        urgency: int = 5,
        conversation_policy: str = "enqueue",
        at: datetime | str | None = None,
        delay_s: float | None = None,
        expires_at: datetime | str | None = None,
        debounce_key: str | None = None,
        debounce_s: float | None = None,
        singleton_key: str | None = None,
        webhook: Doc | None = None,
        follow_up: Doc | None = None,
    ) -> Handle:
        """Hand in one request; returns once it is durable. See ``agentq.protocol.Request`` for its fields.

        A request in a ``conversation`` sees the turns before it. While one of them is under way, its
        ``conversation_policy`` says what becomes of it.

        Raises ``InvalidRequest`` (see ``agentq.protocol.parse_request`` for its codes; ``expires_before_start``: it
        would expire before it may start), ``UnknownWorkflow``, ``IdempotencyConflict`` (the key is known with another
        body), ``Conflict`` (code ``conversation_busy``: the policy is ``reject``; ``debounce_differs``: the waiting run
        has another workflow, class, key or budget), ``QueueFull`` (too many requests of the tenant wait; it says when
        to come back), ``Unavailable`` (MongoDB does not answer: it is unknown whether the request was stored; repeat
        with the same idempotency key).
        """
        body = {
            "input": input, "workflow": workflow, "tenant": tenant, "user": user, "conversation": conversation,
            "priority": priority, "budget_usd": budget_usd, "deadline_s": deadline_s,
            "idempotency_key": idempotency_key, "metadata": {} if metadata is None else metadata,
            "key": key, "urgency": urgency, "conversation_policy": conversation_policy, "at": at, "delay_s": delay_s,
            "expires_at": expires_at, "debounce_key": debounce_key, "debounce_s": debounce_s,
            "singleton_key": singleton_key, "webhook": webhook, "follow_up": follow_up,
        }  # fmt: skip
        return self.accept(parse_request(body))

    def accept(self, request: Request, reply: Reply | None = None) -> Handle:
        """``submit`` for a request that has been validated; ``reply``: who waits for it in a Celery result backend."""
        if reply is not None and (request.merges or request.debounce_key or request.singleton_key):
            raise InvalidRequest(
                "A request that may join another has no answer of its own.",
                code="not_for_ask",
                hint="Use agentq.submit for requests with a debounce or singleton key or the policy merge.",
            )
        registered = self._workflow(request.workflow)
        for _ in range(ROUNDS):
            doc = self._born(request, registered, reply)
            if isinstance(doc, Handle):
                return doc
            if (duplicate := self._store(doc)) is None:
                if doc["in_flight"]:
                    self._publish({registered["start_pool"]: [Hint(doc["_id"], START_STEP, 1)]})
                return Handle(self._runs, doc["_id"], straight=doc["in_flight"])
            if (known := self._instead(duplicate, request, doc)) is not None:
                return known
        raise Unavailable(
            "Another run is in the way of the request, and it could not join it.",
            code="contended",
            hint="Submit it again.",
        )

    def submit_many(self, requests: Iterable[Doc], *, chunk: int = 500) -> Iterator[Handle | AgentqError]:
        """Hand in many requests (dicts as for ``parse_request``); yields one handle or one error each, in order.

        Streams: ``chunk`` requests are stored with one write, and are durable when their handles come out.
        """
        if chunk < 1:
            raise InvalidRequest(
                "chunk is less than 1.", code="invalid_value", hint="Leave it out, or use a few hundred."
            )
        stream = iter(requests)
        while bodies := list(islice(stream, chunk)):
            yield from self._submit_chunk(bodies)

    def _submit_chunk(self, bodies: Sequence[Doc]) -> list[Handle | AgentqError]:
        results: list[Handle | AgentqError] = []
        born: list[tuple[int, Request, NewRun]] = []
        for body in bodies:
            try:
                request = parse_request(body)
                doc = self._born(request, self._workflow(request.workflow), None)
            except (InvalidRequest, Conflict, QueueFull) as error:
                results.append(error)
                continue
            if isinstance(doc, Handle):
                results.append(doc)
                continue
            born.append((len(results), request, doc))
            results.append(Handle(self._runs, doc["_id"], straight=doc["in_flight"]))
        refused = self._insert([doc for _, _, doc in born])
        hints: dict[Pool, list[Hint]] = {}
        for index, (place, request, doc) in enumerate(born):
            if index not in refused:
                if not doc["in_flight"]:
                    continue
                hints.setdefault(doc["steps"][START_STEP]["pool"], []).append(Hint(doc["_id"], START_STEP, 1))
                continue
            try:
                results[place] = self._instead(refused[index], request, doc) or self.accept(request)
            except AgentqError as known_error:
                results[place] = known_error
        self._publish(hints)
        return results

    def _store(self, doc: NewRun) -> str | None:
        """Store a run; what is not unique about it where it is refused as a duplicate: see ``_duplicate``."""
        with mongo_errors():
            try:
                self._db()["runs"].insert_one(cast("Doc", doc))
            except DuplicateKeyError as error:
                return _duplicate(error.details)
        return None

    def _insert(self, docs: Sequence[NewRun]) -> dict[int, str]:
        """Store runs with one write. The places of those that were refused as duplicates, and what was not unique
        about them: see ``_duplicate``. Raises ``Unavailable`` where it is unknown what was stored."""
        with mongo_errors():
            try:
                if docs:
                    self._db()["runs"].insert_many([cast("Doc", doc) for doc in docs], ordered=False)
            except BulkWriteError as error:
                wrong = error.details["writeErrors"]
                if error.details.get("writeConcernErrors") or any(one["code"] != DUPLICATE_KEY for one in wrong):
                    raise
                return {one["index"]: _duplicate(one) for one in wrong}
        return {}

    def _born(self, request: Request, registered: Registered, reply: Reply | None) -> NewRun | Handle:
        """The document of a request, or the run that it joins."""
        connected, run_id = self._connect(), new_run_id()
        try:
            check_times(request, self._now())
        except InvalidRequest:
            if (known := self._known(request)) is not None:  # it was in time when it came first
                return known
            raise
        with mongo_errors():
            connected.gate.refresh(self._now())
            if self._looks_first(request) and (known := self._known(request)) is not None:
                return known
            connected.gate.check_room(request)
            if (joined := self._join(request)) is not None:
                return joined
            try:
                turn, hold = self._turn(request, run_id)
            except Conflict:
                if (known := self._known(request)) is not None:  # it is busy with this very request
                    return known
                raise
        return new_run(
            request,
            registered,
            run_id=run_id,
            now=self._now(),
            turn=turn,
            hinted=connected.publishes(),
            reply=reply,
            waits=hold is not None or not connected.gate.straight(request),
            hold=hold,
            cost=connected.gate.cost(request),
        )

    def _looks_first(self, request: Request) -> bool:
        """Is something done for the request before it is stored, which must not be done for its repetition? In all
        other cases the unique index finds out, without a read."""
        meets = request.conversation or request.debounce_key or request.singleton_key
        return request.idempotency_key is not None and (bool(meets) or self._connect().gate.limited(request))

    def _join(self, request: Request) -> Handle | None:
        """The waiting run that the request becomes a part of, if it wishes so and there is one."""
        turns = self._connect().turns
        if request.merges:
            joined = turns.merge(request)
        elif request.debounce_key is not None:
            joined = turns.replace(request)
        else:
            return None
        return None if joined is None else self._same(joined, request)

    def _turn(self, request: Request, run_id: str) -> tuple[int | None, str | None]:
        """The request's turn in its conversation, and what it waits for if another is under way."""
        if request.conversation is None:
            return None, None
        turns = self._connect().turns
        if starts_at(request, self._now()) > self._now():
            return turns.number(request), "time"
        turn = turns.take(request, run_id)
        if turn.before is None:
            return turn.number, None
        if request.conversation_policy == "interrupt":
            with suppress(Conflict, NotFound):  # it has ended, or is not there yet
                self._runs.cancel(turn.before, "interrupted by a newer request", not_of=request.idempotency_key)
        return turn.number, "turn"

    def _instead(self, duplicate: str, request: Request, doc: NewRun) -> Handle | None:
        """The run that is there already in place of ``doc``; None where ``doc`` has to be made anew."""
        if doc["conversation"] is not None:
            with mongo_errors():
                self._connect().turns.give_back(doc["tenant"], doc["conversation"], doc["_id"])
        if duplicate == "idempotency_key":
            return self._known(request)  # None: it was removed in the meantime
        if duplicate == "singleton":
            with mongo_errors():
                live = self._db()["runs"].find_one(
                    {"tenant": request.tenant, "singleton": request.singleton_key}, {"_id": 1}
                )
            return None if live is None else Handle(self._runs, live["_id"])
        return None

    def schedule(self, request: Doc, cron: str, timezone: str = "UTC") -> str:
        """Hand in a request (a dict as for ``parse_request``) again and again, whenever ``cron`` fits in a time zone;
        gives the schedule's id. Times that were missed while no scheduler ran are made up for once.

        Raises ``InvalidRequest`` and ``UnknownWorkflow`` as ``submit`` does, ``bad_cron`` and ``bad_timezone``.
        """
        self._workflow(parse_request(request).workflow)
        with mongo_errors():
            return Schedules(self._db(), self._now).add(request, cron, timezone)

    def schedules(self) -> list[Doc]:
        """All recurring requests: ``{_id, cron, timezone, request, due, last_run, last_error}``, by ``due``."""
        with mongo_errors():
            return Schedules(self._db(), self._now).all()

    def drop_schedule(self, schedule_id: str) -> None:
        """Hand it in no more. Runs that were handed in go on. Raises ``NotFound``."""
        with mongo_errors():
            Schedules(self._db(), self._now).drop(schedule_id)

    def hand_in(self, schedule: Doc) -> None:
        """Hand in a recurring request that is due, once a due time however often this is called, and set when it is due
        next. A request that is refused is noted and tried again the next time. The scheduler calls this."""
        body = {**schedule["request"], "idempotency_key": f"{schedule['_id']}:{schedule['due']:%Y-%m-%dT%H:%M:%SZ}"}
        run_id, fault = None, None
        try:
            run_id = self.accept(parse_request(body)).run_id
        except Unavailable:
            raise
        except AgentqError as error:
            fault = error.as_dict()
        with mongo_errors():
            Schedules(self._db(), self._now).handed_in(schedule, run_id, fault)

    def run(self, run_id: str) -> Handle:
        """A handle for a run that somebody handed in. Raises ``NotFound``."""
        self._runs.document(run_id, {"_id": 1})
        return Handle(self._runs, run_id)

    def events(self, run_id: str) -> list[Event]:
        """The run's audit events so far, in order. Raises ``NotFound``."""
        return self._runs.events(run_id)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _workflow(self, name: str) -> Registered:
        connected = self._connect()
        known = connected.workflows.get(name)
        if known is not None and time.monotonic() - known[0] < WORKFLOW_CACHE_S:
            return known[1]
        with mongo_errors():
            doc = self._db()["workflow_names"].find_one({"_id": name}, {"_id": 0})
            if doc is None:
                names = sorted(str(other) for other in self._db()["workflow_names"].distinct("_id"))
                raise UnknownWorkflow(
                    f"There is no workflow {name!r}.",
                    hint=f"Known are {', '.join(names)}." if names else "None is registered: is a worker running?",
                )
        registered = cast("Registered", doc)
        connected.workflows[name] = (time.monotonic(), registered)
        return registered

    def _known(self, request: Request) -> Handle | None:
        """The run that the idempotency key belongs to, if it was the same request."""
        with mongo_errors():
            doc = self._connect().turns.known(request)
        return None if doc is None else self._same(doc, request)

    def _same(self, doc: Doc, request: Request) -> Handle:
        if doc["fingerprint"] != request.fingerprint:
            raise IdempotencyConflict(
                f"The idempotency key belongs to another request (run {doc['_id']}).",
                hint="Use a new key for a new request, or send the same body.",
                run_id=doc["_id"],
            )
        return Handle(self._runs, doc["_id"])

    def _publish(self, hints: dict[Pool, list[Hint]]) -> None:
        """Tell the pools, at best. What does not get through is made due at once, for the scheduler to dispatch."""
        connected = self._connect()
        unheard: list[str] = []
        for pool, some in hints.items():
            for start in range(0, len(some), HINTS_A_MESSAGE):
                message = some[start : start + HINTS_A_MESSAGE]
                if not connected.send(pool, message):
                    unheard += [hint.run_id for hint in message]
        if unheard and self._broker_url is not None:
            condition = {"_id": {"$in": unheard}, "rev": 0, "leases": {}}
            update = {"$set": {"next_due": self._now(), f"steps.{START_STEP}.hints": 0}}
            try:
                self._db()["runs"].update_many(condition, update)
            except PyMongoError as error:  # they are accepted all the same, and dispatched ten seconds later
                log.warning("%d runs wait for the scheduler: %s", len(unheard), type(error).__name__)

    def _now(self) -> datetime:
        return self._connect().now()

    def _db(self) -> Database[Doc]:
        return self._connect().db

    def _connect(self) -> Connection:
        return self._connections.here()


def _duplicate(details: Any) -> str:
    """What was not unique about a document: ``idempotency_key``, ``singleton``, or something that a new one mends."""
    pattern = (details or {}).get("keyPattern", {})
    return next((name for name in ("idempotency_key", "singleton") if name in pattern), "")
