"""The store in memory, for unit tests and simulation: the same promises, checked by the same contract suite.

One event loop, no concurrency inside a method: each is atomic, like a single-document write. The clock is an argument.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from datetime import datetime, timedelta
from typing import Any, cast

from agentq.engine.commit import Commit, Grant
from agentq.engine.delivery import of_run
from agentq.event import Event
from agentq.protocol import TERMINAL, Hint, Pool
from agentq.run import RUN_FORMAT, START_STEP
from agentq.store import documents
from agentq.store.api import Dead, Held, Letters, Queue, Verdict
from schemas.catalog import Bundle
from schemas.chat import Message
from schemas.delivery import Delivery
from schemas.run import RunDoc


class MemoryStore:
    """``agentq.store.api.Store`` in dicts. ``clock`` is the server's clock."""

    def __init__(self, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self.runs: dict[str, RunDoc] = {}
        self.audit: dict[str, Event] = {}
        self.bundles: dict[str, Bundle] = {}
        self.current_hashes: dict[str, str] = {}  # by name of workflow
        self.beats: dict[str, dict[str, Any]] = {}
        self.deliveries: dict[str, Delivery] = {}
        self.turns: dict[tuple[str, str], str | None] = {}  # (tenant, conversation) -> the run under way

    def now(self) -> datetime:
        return self._clock()

    async def sync_clock(self) -> None:
        """Nothing to measure: the clock is an argument."""

    def insert(self, doc: dict[str, Any]) -> None:
        """Give birth to a run, as a client's insert does."""
        self.runs[doc["_id"]] = cast("RunDoc", copy.deepcopy(doc))

    async def claim(self, hint: Hint, grant: Grant) -> RunDoc | None:
        run = self.runs.get(hint.run_id)
        if run is None or run["v"] > RUN_FORMAT or run["status"] not in documents.CLAIMABLE:
            return None
        if run["cancel"] is not None:
            return None
        step = run["steps"].get(hint.step_id)
        if step is None or step["attempt"] != hint.attempt or "not_before" in step or "held" in step:
            return None
        if hint.step_id in run["leases"] or "backlog" in run:
            return None
        run["leases"][hint.step_id] = {
            "token": grant.token,
            "worker": grant.worker,
            "ms": grant.ms,
            "at": self._clock(),
        }
        lease_end = self._clock() + timedelta(milliseconds=grant.ms)
        run["next_due"] = min(run["next_due"] or lease_end, lease_end)
        if hint.step_id == START_STEP:
            run["status"] = "running"
        return _read(run)

    async def commit(self, commit: Commit) -> Verdict:
        run = self.runs.get(commit.run_id)
        if run is None or not self._applies(run, commit):
            return documents.verdict(cast("dict[str, Any] | None", run), commit)
        waste = dict(run["waste"])
        after = copy.deepcopy(commit.after)
        if "cancel" not in commit.fields:
            after["cancel"] = run["cancel"]
        after["leases"] = self._leases(run, commit, after)
        if journal := [*run.get("journal", ()), *([commit.entry] if commit.entry else ())]:
            after["journal"] = copy.deepcopy(journal)
        self.runs[commit.run_id] = after
        for name, amount in commit.waste.items():
            waste[name] = cast("int", waste.get(name, 0)) + amount
        after["waste"] = cast("Any", waste)
        if "late" in run:
            after["late"] = run["late"]
        if "tally" in run:
            after["tally"] = run["tally"]
        return Verdict.APPLIED

    def _applies(self, run: RunDoc, commit: Commit) -> bool:
        if run["rev"] != commit.rev or any(step_id in run["leases"] for step_id in commit.unclaimed):
            return False
        if commit.token is None or commit.step_id is None:
            return True
        lease = run["leases"].get(commit.step_id)
        if lease is None or lease["token"] != commit.token:
            return False
        return not commit.lapsed or lease["at"] + timedelta(milliseconds=lease["ms"]) < self._clock()

    def _leases(self, run: RunDoc, commit: Commit, after: RunDoc) -> dict[str, Any]:
        """Stored leases win over the committer's picture of them, except for the steps the commit writes itself."""
        gone = {*commit.closed, *commit.opened}
        kept = {key: lease for key, lease in run["leases"].items() if key not in gone and key in after["steps"]}
        for key, grant in commit.grants.items():
            kept[key] = {"token": grant.token, "worker": grant.worker, "ms": grant.ms, "at": self._clock()}
        return kept

    async def renew(self, leases: Sequence[Held], ms: int) -> set[Held]:
        lost: set[Held] = set()
        for held in leases:
            run = self.runs.get(held.run_id)
            lease = run["leases"].get(held.step_id) if run else None
            if lease is None or lease["token"] != held.token:
                lost.add(held)
            else:
                lease["ms"], lease["at"] = ms, self._clock()
        return lost

    async def load(self, run_id: str, *, journal: bool = False) -> RunDoc | None:
        run = self.runs.get(run_id)
        return None if run is None else copy.deepcopy(run) if journal else _read(run)

    async def record(self, run: RunDoc) -> None:
        self.runs.setdefault(run["_id"], copy.deepcopy(run))

    async def due(self, limit: int) -> list[RunDoc]:
        now = self._clock()
        readable = [run for run in self.runs.values() if run["v"] <= RUN_FORMAT]
        found = [(run["next_due"], run) for run in readable if run["next_due"] is not None]
        ready = sorted(((due, run["_id"], run) for due, run in found if due <= now), key=lambda item: item[:2])
        return [_read(run) for _, _, run in ready[:limit]]

    async def set_due(self, run: RunDoc, due: datetime | None) -> None:
        stored = self.runs.get(run["_id"])
        if stored is not None and stored["rev"] == run["rev"] and stored["leases"].keys() <= run["leases"].keys():
            stored["next_due"] = due

    async def live(self) -> AsyncIterator[RunDoc]:
        for run_id in sorted(self.runs):
            if self.runs[run_id].get("in_flight"):
                yield _read(self.runs[run_id])

    async def copy_audit(self, events: Sequence[Event]) -> None:
        for event in events:
            self.audit.setdefault(documents.audit_record(event)["_id"], copy.deepcopy(event))

    async def audit_events(self, run_id: str) -> AsyncIterator[Event]:
        for key in sorted(self.audit):
            if self.audit[key]["run"] == run_id:
                yield copy.deepcopy(self.audit[key])

    async def settle(self, run: RunDoc) -> None:
        stored = self.runs.get(run["_id"])
        if stored is not None and stored["status"] in TERMINAL and stored["audit"] == run["audit"]:
            stored["events"], stored["next_due"] = [], None
            if stored["ended_at"] is not None and documents.tells(stored):
                stored["told_at"] = stored["ended_at"]

    async def pass_turn(self, run: RunDoc) -> None:
        name = (run["tenant"], run["conversation"] or "")
        if self.turns.get(name) != run["_id"]:
            return
        self.turns[name] = following = self.next_turn(*name)
        if following is not None:
            documents.let_go(self.runs[following])

    def next_turn(self, tenant: str, conversation: str) -> str | None:
        """Which waiting turn goes next."""
        held = [
            run for run in self.runs.values()
            if (run["tenant"], run["conversation"]) == (tenant, conversation)
            and "backlog" in run and run["backlog"].get("hold") == "turn"
        ]  # fmt: skip
        held.sort(key=lambda run: (not run["backlog"].get("front"), run["turn"] or 0))
        return held[0]["_id"] if held else None

    async def notify(self, run: RunDoc) -> None:
        for delivery in of_run(run):
            self.deliveries.setdefault(delivery["_id"], delivery)

    async def book_waste(self, run_id: str, token: str, waste: dict[str, int]) -> None:
        run = self.runs.get(run_id)
        if run is not None and token not in run.get("late", []):
            run["late"] = [*run.get("late", []), token]
            counted = cast("dict[str, int]", run["waste"])
            for name, amount in waste.items():
                counted[name] = counted.get(name, 0) + amount
            if "batch" in run:
                run["tally"] = True

    async def history(self, run: RunDoc, tokens: int) -> list[Message]:
        earlier = [
            cast("dict[str, Any]", other)
            for other in self.runs.values()
            if other["tenant"] == run["tenant"] and other["conversation"] == run["conversation"]
            and other["status"] == "succeeded" and (other["turn"] or 0) < (run["turn"] or 0)
        ]  # fmt: skip
        earlier.sort(key=lambda doc: cast("int", doc["turn"]), reverse=True)
        return documents.window(earlier, tokens)

    async def bundle(self, bundle_hash: str) -> Bundle | None:
        return self.bundles.get(bundle_hash)

    async def register(self, bundles: Sequence[Bundle]) -> None:
        self.bundles |= {bundle.hash: bundle for bundle in bundles}
        self.current_hashes |= {bundle.workflow.name: bundle.hash for bundle in bundles}

    async def keep_bundle(self, bundle: Bundle) -> None:
        self.bundles[bundle.hash] = bundle

    async def unended(self) -> AsyncIterator[RunDoc]:
        found = [run for run in self.runs.values() if run["status"] not in TERMINAL]
        for run in sorted(found, key=lambda run: run["next_due"] or self._clock()):
            yield _read(run)

    async def dead_letters(self, kind: Dead, which: Letters, limit: int) -> list[RunDoc]:
        found = [run for run in self.runs.values() if documents.is_dead_letter(run, kind, which)]
        found.sort(key=lambda run: run["ended_at"] or run["created_at"], reverse=True)
        return [_read(run) for run in found[:limit]]

    async def current(self) -> list[Bundle]:
        return [self.bundles[name] for name in self.current_hashes.values()]

    async def alive(self, within: timedelta) -> list[str]:
        return sorted(name for name, beat in self.beats.items() if beat["at"] >= self._clock() - within)

    async def queues(self) -> dict[Pool, Queue]:
        since = self._clock() - documents.WORKER_HEARS
        workers = [beat for beat in self.beats.values() if beat["kind"] == "worker" and beat["at"] >= since]
        return documents.queues(workers)

    async def stopped(self, run_ids: Collection[str]) -> set[str]:
        found = [self.runs[run_id] for run_id in run_ids if run_id in self.runs]
        return {run["_id"] for run in found if run["cancel"] is not None or run["status"] in TERMINAL}

    async def beat(self, name: str, facts: dict[str, Any]) -> None:
        self.beats[name] = {**facts, "at": self._clock()}


def _read(run: RunDoc) -> RunDoc:
    """A copy as reads give it."""
    return copy.deepcopy(cast("RunDoc", {name: value for name, value in run.items() if name != "journal"}))
