"""The backlog in memory, for unit tests: the same promises as MongoDB's, checked by the same contract suite."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import Any

from agentq.engine.admission import Waiting
from agentq.protocol import TERMINAL, Pool, Priority
from agentq.run import HINT_GRACE, START_STEP
from agentq.store import documents
from agentq.store.backlog import Ended, Flying, Limit, routes_of
from agentq.store.backlog_queries import ACTIVE
from agentq.store.memory import MemoryStore
from schemas.run import RunDoc

Doc = dict[str, Any]


class MemoryBacklog:
    """``agentq.store.backlog.Backlog`` beside a store in memory. Recurring requests need the real one."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self._leader: tuple[str, datetime] | None = None
        self._notes: dict[str, Doc] = {}
        self.known_limits: dict[str, Limit] = {}

    def now(self) -> datetime:
        return self._store.now()

    async def lead(self, name: str, ms: int) -> bool:
        if self._leader is not None and self._leader[0] != name and self._leader[1] > self.now():
            return False
        self._leader = name, self.now() + timedelta(milliseconds=ms)
        return True

    def _line(self) -> list[RunDoc]:
        """All that may be admitted, in order of rank and age."""
        found = [run for run in self._store.runs.values() if "backlog" in run and "class" in run["backlog"]]
        return sorted(found, key=lambda run: (run["backlog"]["rank"], run["_id"]))

    async def waits(self, classes: Collection[Priority]) -> set[Priority]:
        return {
            priority for priority in classes if any(run["backlog"].get("class") == priority for run in self._line())
        }

    async def waiting(self, priority: Priority) -> dict[Pool, dict[str, str]]:
        found: dict[Pool, dict[str, str]] = {}
        for run in self._line():
            if run["backlog"].get("class") == priority:
                found.setdefault(run["pool"], {}).setdefault(run["flow"], run["_id"])
        return found

    async def heads(self, priority: Priority, pool: Pool, flows: Sequence[str], limit: int) -> dict[str, list[Waiting]]:
        found: dict[str, list[Waiting]] = defaultdict(list)
        for run in self._line():
            line = run["backlog"].get("class"), run["pool"]
            if line == (priority, pool) and run["flow"] in flows and run["status"] == "queued" and not run["cancel"]:
                found[run["flow"]].append(Waiting(run["_id"], run["backlog"]["rank"], max(1, run["backlog"]["cost"])))
        return {flow: runs[:limit] for flow, runs in found.items()}

    async def admit(self, run_ids: Sequence[str]) -> set[str]:
        for run_id in run_ids:
            run = self._store.runs.get(run_id)
            if run is None or run["status"] != "queued" or run["cancel"] is not None:
                continue
            if "class" not in run.get("backlog", {}):
                continue
            now, backlog = self.now(), run["backlog"]
            run["in_flight"], run["admitted_at"], run["cost"] = True, now, backlog["cost"]
            run["rev"] += 1
            run["steps"][START_STEP]["hints"], run["steps"][START_STEP]["hinted_at"] = 1, now
            run["deadline_at"] = min(run["deadline_at"], now + timedelta(seconds=backlog["wall_s"]))
            run["next_due"] = now + HINT_GRACE
            del run["backlog"]
        found = [run for run_id in run_ids if (run := self._store.runs.get(run_id)) is not None]
        return {
            run["_id"]
            for run in found
            if run["status"] == "queued" and run["cancel"] is None and run["in_flight"] and "backlog" not in run
        }

    async def flight(self) -> list[Flying]:
        counts: dict[tuple[Pool, Priority, bool], dict[str, tuple[int, int]]] = defaultdict(dict)
        for run in self._store.runs.values():
            if run.get("in_flight") and "flow" in run and run["status"] in ACTIVE:
                flows = counts[run["pool"], run["priority"], run["status"] != "queued"]  # type: ignore[index]
                runs, cost = flows.get(run["flow"], (0, 0))
                flows[run["flow"]] = runs + 1, cost + run["cost"]
        return [
            Flying(pool, priority, taken, sum(runs for runs, _ in flows.values()), flows)
            for (pool, priority, taken), flows in counts.items()
        ]

    async def joining(self, tenants: Collection[str]) -> dict[str, int]:
        costs: dict[str, int] = defaultdict(int)
        for run in self._store.runs.values():
            if "joins" in run and run["tenant"] in tenants:
                costs[run["flow"]] += run["cost"]
        return {**costs}

    async def flying(self) -> dict[str, tuple[Pool, Priority, str, int]]:
        return {
            run["_id"]: (run["pool"], run["priority"], run["flow"], run["cost"])  # type: ignore[misc]
            for run in self._store.runs.values()
            if run.get("in_flight") and "flow" in run
        }

    async def ended(self, run_ids: Collection[str]) -> dict[str, Ended]:
        found = [run for run_id in run_ids if (run := self._store.runs.get(run_id)) is not None]
        return {
            run["_id"]: Ended(
                run["workflow"].get("name", ""),
                run["usage"].get("cost_nano_usd", 0) + run["waste"].get("cost_nano_usd", 0),
            )
            for run in found
            if run.get("in_flight") is False
        }

    async def release(self, limit: int) -> int:
        held = [run for run in self._store.runs.values() if "hold" in run.get("backlog", {})]
        due = sorted((run for run in held if run["backlog"]["at"] <= self.now()), key=lambda run: run["backlog"]["at"])
        for run in due[:limit]:
            if run["conversation"] is None:
                documents.let_go(run)
            else:
                run["backlog"]["hold"] = "turn"
        turns = [run for run in due[:limit] if run["conversation"] is not None]
        for tenant, conversation in {(run["tenant"], run["conversation"] or "") for run in turns}:
            self._release_turn(tenant, conversation)
        for run in turns:
            if "hold" in run.get("backlog", {}):
                run["backlog"]["at"] = self.now() + timedelta(seconds=1)
        return len(due[:limit])

    def _release_turn(self, tenant: str, conversation: str) -> None:
        name = tenant, conversation
        following = self._store.next_turn(*name)
        active = self._store.runs.get(self._store.turns.get(name) or "")
        if active is not None and active.get("backlog", {}).get("hold") == "turn":
            following = active["_id"]
        elif active is not None and active["status"] not in TERMINAL:
            return
        if following is not None:
            self._store.turns[name] = following
            documents.let_go(self._store.runs[following])

    async def limits(self) -> dict[str, Limit]:
        return dict(self.known_limits)

    async def routes(self) -> dict[Pool, frozenset[Pool]]:
        return routes_of(list(self._store.bundles.values()))

    async def remember(self, name: str, doc: Doc) -> None:
        self._notes[name] = doc

    async def remembered(self, name: str) -> Doc | None:
        return self._notes.get(name)

    async def schedules(self, limit: int) -> list[Doc]:  # noqa: ARG002 - as the protocol has it
        return []
