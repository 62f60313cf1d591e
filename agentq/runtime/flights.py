"""What the admission learns from runs in flight: how fast the pools are, what runs did cost, how many went a minute."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from agentq.protocol import Pool, Priority
from agentq.run import LEAST_COST, UNKNOWN_COST
from agentq.store.backlog import Backlog

SMOOTH_S = 5.0  # throughput is an average over about so many seconds
LEARN = 0.05  # how much one run moves what its workflow is taken to cost
MINUTE_S = 60

Flight = tuple[Pool, Priority, str, int]


class Flights:
    """Runs in flight as last seen; those that are gone have ended. ``charged``: those that were charged to our books;
    what went straight to its pool, or was let in by a leader before, was not."""

    def __init__(self, backlog: Backlog) -> None:
        self._backlog = backlog
        self._seen: dict[str, Flight] = {}
        self._charged: set[str] = set()
        self._rates: dict[Pool, float] = {}
        self._class_rates: dict[Priority, float] = {}
        self._paces: dict[Priority, float] = {}
        self._costs: dict[str, int] = {}
        self._looked: float | None = None

    def load(self, told: dict[str, Any]) -> None:
        """Go on from what a leader before has told."""
        self._costs = {one["workflow"]: one["cost"] for one in told.get("costs", [])}

    def admitted(self, run_id: str, pool: Pool, priority: Priority, flow: str, cost: int) -> None:
        self._seen[run_id] = pool, priority, flow, cost
        self._charged.add(run_id)

    def rate(self, pool: Pool) -> float:
        """Runs that ended a second, of those that entered here."""
        return self._rates.get(pool, 0.0)

    async def look(self, now: float) -> list[tuple[Pool, Priority, str, int]]:
        """See what has ended: pool, class, flow and the actual less the estimated cost of each that was charged."""
        flying = await self._backlog.flying()
        gone = [run_id for run_id in self._seen if run_id not in flying]
        ended = await self._backlog.ended(gone) if gone else {}
        before, self._seen = self._seen, flying
        self._measure([before[run_id] for run_id in ended], now, {one[1] for one in before.values()})
        found = []
        for run_id, one in ended.items():
            actual = max(LEAST_COST, one.cost)
            known = self._costs.get(one.workflow)
            self._costs[one.workflow] = actual if known is None else round(known + LEARN * (actual - known))
            pool, priority, flow, estimate = before[run_id]
            if run_id in self._charged:
                found.append((pool, priority, flow, actual - max(1, estimate)))
        self._charged &= flying.keys()
        return found

    def _measure(self, ended: list[Flight], now: float, busy: set[Priority]) -> None:
        """``busy``: the classes of which runs were in flight. A class that has nothing to do gets no slower by that."""
        if self._looked is not None and now > self._looked:
            passed = now - self._looked
            part = 1 - math.exp(-passed / SMOOTH_S)
            for pool in {*self._rates, *(one[0] for one in ended)}:
                count = sum(one[0] == pool for one in ended) / passed
                known = self._rates.get(pool)
                self._rates[pool] = count if not known else known + part * (count - known)
            for priority in {*self._class_rates, *(one[1] for one in ended)}:
                count = sum(one[1] == priority for one in ended) / passed
                average = self._class_rates.get(priority, count)
                self._class_rates[priority] = average + part * (count - average)
                if priority in busy:
                    pace = self._paces.get(priority) or count
                    self._paces[priority] = pace + part * (count - pace)
        self._looked = now

    def ending(self) -> float:
        """Runs that will end in the next second, if it goes on as lately."""
        return sum(self._class_rates.values())

    def told(self) -> dict[str, Any]:
        """What clients estimate by: the cost of a workflow's run, and how many runs of a class end a second while it
        has work."""
        costs = [{"workflow": name, "cost": cost} for name, cost in self._costs.items()]
        return {"costs": costs, "unknown_cost": UNKNOWN_COST, "rates": dict(self._paces)}


class Rates:
    """Admissions in the last minute by tenant or flow, in whole seconds: counted before they happen, so that a crash
    leaves too many counted, never too few."""

    def __init__(self) -> None:
        self._counts: dict[str, dict[int, int]] = {}

    def count(self, names: Iterable[str], second: int) -> bool:
        """Count one admission for each name; False if there was none."""
        counted = False
        for name in names:
            seconds = self._counts.setdefault(name, {})
            seconds[second] = seconds.get(second, 0) + 1
            counted = True
        return counted

    def recent(self, name: str, second: int) -> int:
        """Admissions in the last minute."""
        seconds = {then: count for then, count in self._counts.get(name, {}).items() if second - then <= MINUTE_S}
        self._counts[name] = seconds
        return sum(seconds.values())

    def load(self, doc: dict[str, Any]) -> None:
        self._counts = {one["name"]: dict(one["seconds"]) for one in doc.get("counts", [])}

    def dump(self) -> dict[str, Any]:
        """Names may hold dots and dollar signs, so they are values."""
        return {
            "counts": [
                {"name": name, "seconds": [*map(list, seconds.items())]} for name, seconds in self._counts.items()
            ]
        }
