"""What a caller has of a run that was accepted: its handle, and its outcome."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, cast

from agentq.connection import Connection, Connections, mongo_errors
from agentq.errors import Conflict, NotFound, Unavailable
from agentq.event import Event
from agentq.protocol import TERMINAL

Doc = dict[str, Any]


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
    """An accepted run. Cheap: holds an id and where to ask. ``straight``: it went to its pool without waiting."""

    def __init__(self, runs: Runs, run_id: str, *, straight: bool = False) -> None:
        self._runs = runs
        self._straight = straight
        self.run_id = run_id

    def __repr__(self) -> str:
        return f"Handle({self.run_id!r})"

    @property
    def position(self) -> int | None:
        """How many runs are before it in its own line now; 0: none, or it has been admitted; None: over a thousand."""
        return 0 if self._straight else self._runs.place(self.run_id)[0]

    @property
    def estimated_start_s(self) -> float | None:
        """Seconds until it is admitted, by what ended lately; 0.0: it has been; None: nobody knows."""
        return 0.0 if self._straight else self._runs.place(self.run_id)[1]

    def status(self) -> str:
        """One of agentq.protocol.RunStatus. Raises ``NotFound``."""
        return cast("str", self._runs.document(self.run_id, {"status": 1})["status"])

    def outcome(self) -> Outcome:
        """The run as it is now; its answer once it has ended."""
        return _outcome(self._runs.document(self.run_id, _OUTCOME_FIELDS))

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
        return self._runs.events(self.run_id)

    def cancel(self, reason: str = "") -> bool:
        """Ask for the run's end; it is cancelled within about a second. Safe to repeat: False if that was asked
        before. Raises ``Conflict`` if it has ended otherwise."""
        return self._runs.cancel(self.run_id, reason)


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


class Runs:
    """What handles ask of MongoDB, for all runs of a client. Each raises ``NotFound`` and ``Unavailable``."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def document(self, run_id: str, fields: Doc) -> Doc:
        """These fields of a run."""
        with mongo_errors():
            doc = self._here().db["runs"].find_one({"_id": str(run_id)}, fields)
        if doc is None:
            raise NotFound(f"There is no run {run_id!r}.", hint="'agentq runs' lists the latest.")
        return doc

    def events(self, run_id: str) -> list[Event]:
        """The run's audit events so far, in order. Raises ``NotFound``."""
        pending = {event["seq"]: event for event in self.document(run_id, {"events": 1})["events"]}
        of_run = {"_id": {"$gte": f"{run_id}:", "$lt": f"{run_id};"}}
        with mongo_errors():
            copied = list(self._here().db["audit"].find(of_run, {"_id": 0}))
        found = {event["seq"]: cast("Event", event) for event in copied} | pending
        return [found[seq] for seq in sorted(found)]

    def place(self, run_id: str) -> tuple[int | None, float | None]:
        """Its position in its line, and the seconds until it is admitted: see ``Handle``."""
        run = self.document(run_id, {"backlog": 1, "pool": 1, "flow": 1, "tenant": 1})
        connected = self._here()
        with mongo_errors():
            connected.gate.refresh(connected.now())
            return connected.gate.place(run, connected.now())

    def cancel(self, run_id: str, reason: str, *, not_of: str | None = None) -> bool:
        """Ask for its end; False if that was asked before. ``not_of``: an idempotency key whose run is left alone."""
        now = self._here().now()
        wish = {"reason": str(reason)[:500], "at": now}
        spared = {} if not_of is None else {"idempotency_key": {"$ne": not_of}}
        with mongo_errors():
            asked = (
                self._here()
                .db["runs"]
                .update_one(
                    {"_id": str(run_id), "status": {"$nin": sorted(TERMINAL)}, "cancel": None, **spared},
                    {
                        "$set": {"cancel": wish, "next_due": now},
                        "$inc": {"rev": 1},
                        "$unset": {"backlog.debounce": ""},
                    },
                )
            )
        if asked.modified_count == 0:
            doc = self.document(run_id, {"status": 1, "cancel": 1})
            if doc["status"] in TERMINAL - {"cancelled"}:
                raise Conflict(f"Run {run_id} has already {doc['status']}.", hint="There is nothing to cancel.")
        return asked.modified_count > 0

    def _here(self) -> Connection:
        return self._connections.here()
