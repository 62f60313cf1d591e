"""The client other back ends import: hand in a request, ask about it, wait for it, cancel it.

    client = Client("mongodb://...", "redis://...")
    run = client.submit("Where is my order 10023?", workflow="support_desk", user="C-7", idempotency_key="mail-8812")
    print(run.wait(timeout_s=60).answer)

When ``submit`` returns, the request is on disk in MongoDB (majority, journaled): it will end visibly, whatever
crashes. The text goes to MongoDB only; the broker carries the run's id. Without a broker URL, or while the broker is
down, the scheduler dispatches the run a moment later.

Self-contained: imports nothing of agentq but the protocol and the errors, reads no environment, configures no
logging, never becomes the host's current Celery app. Thread-safe, and safe to use after a fork (connections are made
anew in the child).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, cast

from bson.codec_options import CodecOptions
from celery import Celery
from pymongo import MongoClient, ReturnDocument
from pymongo.database import Database
from pymongo.errors import BulkWriteError, ConfigurationError, DuplicateKeyError, InvalidURI, PyMongoError

from agentq.errors import (
    AgentqError,
    Conflict,
    IdempotencyConflict,
    InvalidRequest,
    NotFound,
    Unavailable,
    UnknownWorkflow,
)
from agentq.protocol import (
    START_STEP,
    TERMINAL,
    Event,
    Hint,
    NewRun,
    Pool,
    Registered,
    Reply,
    Request,
    new_run,
    new_run_id,
    parse_request,
    task_name,
)

__all__ = ["Client", "Handle", "Outcome"]

Doc = dict[str, Any]
WORKFLOW_CACHE_S = 5.0  # how long a client may go on pinning new runs to the version it knows
BROKER_TIMEOUT_S = 3.0
HINTS_A_MESSAGE = 64


@dataclass(frozen=True)
class Outcome:
    """A run as its caller sees it. Money in US dollars; ``latency_s`` from acceptance to the end (or until now)."""

    run_id: str
    status: str
    answer: str | None = None
    agent: str | None = None
    acceptance: str | None = None
    tools: list[str] = field(default_factory=list)
    citations: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    cost_usd: float = 0.0
    latency_s: float = 0.0
    error: Doc | None = None

    @property
    def ended(self) -> bool:
        return self.status in TERMINAL


class Handle:
    """An accepted run. Cheap: holds an id and its client."""

    def __init__(self, client: Client, run_id: str) -> None:
        self._client = client
        self.run_id = run_id

    def __repr__(self) -> str:
        return f"Handle({self.run_id!r})"

    def status(self) -> str:
        """One of agentq.protocol.RunStatus. Raises ``NotFound``."""
        return cast("str", self._client._run(self.run_id, {"status": 1})["status"])

    def outcome(self) -> Outcome:
        """The run as it is now; its answer once it has ended."""
        return _outcome(self._client._run(self.run_id, _OUTCOME_FIELDS))

    def wait(self, timeout_s: float | None = None) -> Outcome:
        """Block until the run has ended. Raises ``Unavailable`` (code ``wait_timeout``) when time is up; the run
        goes on, so waiting again is fine."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        pause = threading.Event()
        delay = 0.005
        while True:
            if (outcome := self.outcome()).ended:
                return outcome
            if deadline is not None and time.monotonic() >= deadline:
                raise Unavailable(
                    f"Run {self.run_id} is still {outcome.status} after {timeout_s} s.",
                    code="wait_timeout",
                    hint="It goes on; wait again, or look at it with 'agentq show'.",
                )
            pause.wait(delay)
            delay = min(delay * 1.5, 0.25)

    def events(self) -> list[Event]:
        """The run's audit events so far, in order."""
        return self._client.events(self.run_id)

    def cancel(self, reason: str = "") -> None:
        """Ask for the run's end; it is cancelled within about a second. Safe to repeat. Raises ``Conflict`` if it
        has ended otherwise."""
        self._client._cancel(self.run_id, reason)


_OUTCOME_FIELDS = {
    "status": 1,
    "result": 1,
    "error": 1,
    "usage": 1,
    "waste": 1,
    "created_at": 1,
    "ended_at": 1,
}


def _outcome(doc: Doc) -> Outcome:
    result = doc["result"] or {}
    ended = doc["ended_at"] or datetime.now(UTC)
    return Outcome(
        run_id=doc["_id"],
        status=doc["status"],
        answer=result.get("answer"),
        agent=result.get("agent"),
        acceptance=result.get("acceptance"),
        tools=result.get("tools", []),
        citations=result.get("citations", []),
        problems=result.get("problems", []),
        cost_usd=(doc["usage"].get("cost_nano_usd", 0) + doc["waste"].get("cost_nano_usd", 0)) / 1e9,
        latency_s=(ended - doc["created_at"]).total_seconds(),
        error=doc["error"],
    )


class Client:
    """A connection to one agentq. Connects at first use; ``close`` when done, or use it in a ``with``."""

    def __init__(self, mongo_url: str, broker_url: str | None = None, database: str = "agentq") -> None:
        self._mongo_url = mongo_url
        self._broker_url = broker_url
        self._database = database
        self._lock = threading.Lock()
        self._connected: _Connected | None = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            if self._connected is not None and self._connected.pid == os.getpid():
                self._connected.mongo.close()
                if self._connected.celery is not None:
                    self._connected.celery.close()
            self._connected = None

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
    ) -> Handle:
        """Hand in one request; returns once it is durable.

        Raises ``InvalidRequest`` (see ``agentq.protocol.parse_request`` for its codes), ``UnknownWorkflow``,
        ``IdempotencyConflict`` (the key is known with another body), ``Unavailable`` (MongoDB does not answer: it is
        unknown whether the request was stored; repeat with the same idempotency key).
        """
        body = {
            "input": input, "workflow": workflow, "tenant": tenant, "user": user, "conversation": conversation,
            "priority": priority, "budget_usd": budget_usd, "deadline_s": deadline_s,
            "idempotency_key": idempotency_key, "metadata": {} if metadata is None else metadata,
        }  # fmt: skip
        return self.accept(parse_request(body))

    def accept(self, request: Request, reply: Reply | None = None) -> Handle:
        """``submit`` for a request that has been validated; ``reply``: who waits for it in a Celery result backend."""
        registered = self._workflow(request.workflow)
        run_id = new_run_id()
        with self._mongo_errors():
            doc = self._born(request, registered, run_id, reply)
            try:
                self._db()["runs"].insert_one(cast("Doc", doc))
            except DuplicateKeyError:
                return self._known(request)
        self._publish({registered["start_pool"]: [Hint(run_id, START_STEP, 1)]})
        return Handle(self, run_id)

    def submit_many(self, requests: Iterable[Doc], *, chunk: int = 500) -> Iterator[Handle | AgentqError]:
        """Hand in many requests (dicts as for ``parse_request``); yields one handle or one error each, in order.

        Streams: ``chunk`` requests are stored with one write, and are durable when their handles come out.
        """
        stream = iter(requests)
        while bodies := list(islice(stream, chunk)):
            yield from self._submit_chunk(bodies)

    def _submit_chunk(self, bodies: Sequence[Doc]) -> list[Handle | AgentqError]:
        results: list[Handle | AgentqError] = []
        born: list[tuple[int, Request, NewRun]] = []
        hints: dict[Pool, list[Hint]] = {}
        for body in bodies:
            try:
                request = parse_request(body)
                registered = self._workflow(request.workflow)
            except InvalidRequest as error:
                results.append(error)
                continue
            doc = self._born(request, registered, new_run_id(), None)
            born.append((len(results), request, doc))
            results.append(Handle(self, doc["_id"]))
            hints.setdefault(registered["start_pool"], []).append(Hint(doc["_id"], START_STEP, 1))
        refused: set[int] = set()
        with self._mongo_errors():
            try:
                if born:
                    self._db()["runs"].insert_many([cast("Doc", doc) for _, _, doc in born], ordered=False)
            except BulkWriteError as error:
                refused = {one["index"] for one in error.details["writeErrors"]}
        for index in refused:
            place, request, doc = born[index]
            try:
                results[place] = self._known(request)
            except AgentqError as known_error:
                results[place] = known_error
        lost = {born[index][2]["_id"] for index in refused}
        self._publish({pool: [hint for hint in some if hint.run_id not in lost] for pool, some in hints.items()})
        return results

    def _born(self, request: Request, registered: Registered, run_id: str, reply: Reply | None) -> NewRun:
        turn = None if request.conversation is None else self._next_turn(request)
        return new_run(
            request, registered, run_id=run_id, now=self._now(), turn=turn, hinted=self._broker_url is not None,
            reply=reply,
        )  # fmt: skip

    def run(self, run_id: str) -> Handle:
        """A handle for a run that somebody handed in. Raises ``NotFound``."""
        self._run(run_id, {"_id": 1})
        return Handle(self, run_id)

    def events(self, run_id: str) -> list[Event]:
        """The run's audit events so far, in order. Raises ``NotFound``."""
        pending = {event["seq"]: event for event in self._run(run_id, {"events": 1})["events"]}
        with self._mongo_errors():
            copied = list(self._db()["audit"].find({"_id": {"$gte": f"{run_id}:", "$lt": f"{run_id};"}}, {"_id": 0}))
        found = {event["seq"]: cast("Event", event) for event in copied} | pending
        return [found[seq] for seq in sorted(found)]

    # -- inside -----------------------------------------------------------------------------------------------------

    def _workflow(self, name: str) -> Registered:
        connected = self._connect()
        known = connected.workflows.get(name)
        if known is not None and time.monotonic() - known[0] < WORKFLOW_CACHE_S:
            return known[1]
        with self._mongo_errors():
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

    def _known(self, request: Request) -> Handle:
        """The run that the idempotency key belongs to, if it was the same request."""
        doc = self._db()["runs"].find_one(
            {"tenant": request.tenant, "idempotency_key": request.idempotency_key}, {"fingerprint": 1}
        )
        if doc is None:
            raise Unavailable("The request was stored and removed at the same time.", hint="Submit it again.")
        if doc["fingerprint"] != request.fingerprint:
            raise IdempotencyConflict(
                f"The idempotency key {request.idempotency_key!r} belongs to another request (run {doc['_id']}).",
                hint="Use a new key for a new request, or send the same body.",
                run_id=doc["_id"],
            )
        return Handle(self, doc["_id"])

    def _next_turn(self, request: Request) -> int:
        """The request's place in its conversation: taken from a counter, so that no concurrency can disorder it."""
        with self._mongo_errors():
            doc = self._db()["conversations"].find_one_and_update(
                {"_id": f"{request.tenant}/{request.conversation}"},
                {
                    "$inc": {"turns": 1},
                    "$setOnInsert": {"tenant": request.tenant, "conversation": request.conversation},
                },
                upsert=True,
                return_document=ReturnDocument.AFTER,
            )
        assert doc is not None  # an upsert that returns the document after it finds one
        return cast("int", doc["turns"])

    def _run(self, run_id: str, fields: Doc) -> Doc:
        with self._mongo_errors():
            doc = self._db()["runs"].find_one({"_id": str(run_id)}, fields)
        if doc is None:
            raise NotFound(f"There is no run {run_id!r}.", hint="'agentq runs' lists the latest.")
        return doc

    def _cancel(self, run_id: str, reason: str) -> None:
        wish = {"reason": reason, "at": self._now()}
        with self._mongo_errors():
            asked = self._db()["runs"].update_one(
                {"_id": run_id, "status": {"$nin": sorted(TERMINAL)}, "cancel": None},
                {"$set": {"cancel": wish, "next_due": self._now()}, "$inc": {"rev": 1}},
            )
        if asked.modified_count == 0:
            doc = self._run(run_id, {"status": 1, "cancel": 1})
            if doc["status"] in TERMINAL - {"cancelled"}:
                raise Conflict(f"Run {run_id} has already {doc['status']}.", hint="There is nothing to cancel.")

    def _publish(self, hints: dict[Pool, list[Hint]]) -> None:
        """Tell the pools, at best: what does not get through is dispatched by the scheduler."""
        celery = self._connect().celery
        if celery is None:
            return
        for pool, some in hints.items():
            for start in range(0, len(some), HINTS_A_MESSAGE):
                message = [list(hint) for hint in some[start : start + HINTS_A_MESSAGE]]
                try:
                    celery.send_task(
                        task_name(pool), kwargs={"hints": message}, queue=pool, retry=False, ignore_result=True,
                        argsrepr="()", kwargsrepr="{}",
                    )  # fmt: skip
                except Exception:  # noqa: BLE001 - whatever a broker's library raises, the request is accepted
                    return

    def _now(self) -> datetime:
        return datetime.now(UTC) + self._connect().offset

    def _db(self) -> Database[Doc]:
        return self._connect().db

    def _connect(self) -> _Connected:
        connected = self._connected
        if connected is not None and connected.pid == os.getpid():
            return connected
        with self._lock:
            if self._connected is None or self._connected.pid != os.getpid():
                with self._mongo_errors():
                    self._connected = _Connected.make(self._mongo_url, self._broker_url, self._database)
            assert self._connected is not None
            return self._connected

    @contextmanager
    def _mongo_errors(self) -> Iterator[None]:
        try:
            yield
        except (InvalidURI, ConfigurationError) as error:
            raise AgentqError("The MongoDB URL is not valid.", code="bad_mongo_url", hint=str(error)) from error
        except PyMongoError as error:
            raise Unavailable(
                "MongoDB does not answer.", code="mongo_unavailable", hint="Check the URL and that it runs.",
                cause=type(error).__name__,
            ) from error  # fmt: skip


@dataclass
class _Connected:
    """What belongs to one process."""

    pid: int
    mongo: MongoClient[Doc]
    db: Database[Doc]
    celery: Celery | None
    offset: timedelta
    workflows: dict[str, tuple[float, Registered]]

    @classmethod
    def make(cls, mongo_url: str, broker_url: str | None, database: str) -> _Connected:
        mongo: MongoClient[Doc] = MongoClient(
            mongo_url, w="majority", journal=True, retryWrites=True, serverSelectionTimeoutMS=20_000,
            connectTimeoutMS=3_000, appname="agentq-client",
        )  # fmt: skip
        db = mongo.get_database(database, codec_options=CodecOptions(tz_aware=True, tzinfo=UTC))
        offset = db.command("hello")["localTime"].replace(tzinfo=UTC) - datetime.now(UTC)
        return cls(os.getpid(), mongo, db, _celery(broker_url), offset, {})


def _celery(broker_url: str | None) -> Celery | None:
    if broker_url is None:
        return None
    app = Celery("agentq-client", broker=broker_url, set_as_current=False)
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        broker_connection_timeout=BROKER_TIMEOUT_S,
    )
    if broker_url.startswith(("redis", "rediss", "unix")):
        app.conf.broker_transport_options = {
            "socket_timeout": BROKER_TIMEOUT_S,
            "socket_connect_timeout": BROKER_TIMEOUT_S,
            "max_retries": 1,
        }
    else:
        app.conf.broker_transport_options = {"confirm_publish": True, "max_retries": 1}
    return app
