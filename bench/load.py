"""The measurements: one run at a time, and many at once. Each gives the figures and what was wrong with them."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from agentq.errors import AgentqError
from bench import accounting
from bench.system import WORKFLOW, System

CALLS_A_RUN = 4
STALL_S = 45.0  # without a new model call or ended run; longer than a hint's grace, so that a lost hint shows as slow
_REQUEST = {
    "input": "Where is my order A-10017? It should have been here on Monday, and I need it for the weekend.",
    "workflow": WORKFLOW,
    "user": "C-7",
}
_APART = ("client", "model server")  # not what agentq costs


@dataclass(frozen=True)
class Cost:
    """CPU milliseconds a run by process, and server commands a run; ``pace`` as in ``bench.pace``."""

    cpu_ms: Mapping[str, float]
    pace: float
    others_cores: float
    commands: Mapping[str, float]
    peak_mb: Mapping[str, float]

    @property
    def total_ms(self) -> float:
        """Workers, scheduler, Redis and MongoDB: what the bar in the design is about."""
        return sum(ms for name, ms in self.cpu_ms.items() if name not in _APART)

    @property
    def paced_ms(self) -> float:
        """``total_ms`` as it would be at pace 1: what days and machines can be compared by."""
        return self.total_ms / self.pace


@dataclass(frozen=True)
class Alone:
    """One run at a time. Milliseconds; ``stored`` by the run's own times, ``seen`` from submit to wait's return."""

    runs: int
    stored_ms: Sequence[float] = field(repr=False)
    seen_ms: Sequence[float] = field(repr=False)
    cost: Cost
    problems: Sequence[str]


@dataclass(frozen=True)
class Burst:
    """Many runs submitted at once. ``makespan_s`` from the first submit to the last run's end."""

    runs: int
    delay_ms: int
    makespan_s: float
    submit_s: float
    max_in_flight: int
    calls: int
    repeated: int
    cost: Cost
    problems: Sequence[str]

    @property
    def runs_per_s(self) -> float:
        return self.runs / self.makespan_s


def alone(system: System, runs: int) -> Alone:
    """``runs`` runs, each submitted when the one before it has ended."""
    system.servers.model.reset(0)
    meter = _Meter(system)
    stored, seen, ids = [], [], []
    for _ in range(runs):
        began = time.perf_counter()
        handle = system.client.submit(_REQUEST["input"], workflow=WORKFLOW, user=_REQUEST["user"])
        outcome = handle.wait(timeout_s=STALL_S)
        seen.append((time.perf_counter() - began) * 1000)
        stored.append(outcome.latency_s * 1000)
        ids.append(handle.run_id)
    wait_until_settled(system, runs)
    cost = meter.cost(runs)
    ended = _ended(system, ids)
    return Alone(runs, stored, seen, cost, problems(runs, ended, system.servers.model.calls()))


def burst(system: System, runs: int, delay_ms: int) -> Burst:
    """``runs`` runs submitted as fast as the client can; the model server takes ``delay_ms`` for each call."""
    system.servers.model.reset(delay_ms)
    meter = _Meter(system)
    began, began_at = time.perf_counter(), datetime.now(UTC)  # one machine, one clock
    ids = []
    for handle in system.client.submit_many(dict(_REQUEST) for _ in range(runs)):
        if isinstance(handle, AgentqError):
            raise handle
        ids.append(handle.run_id)
    submitted = time.perf_counter() - began
    wait_until_settled(system, runs)
    cost = meter.cost(runs)
    ended, model = _ended(system, ids), system.servers.model.calls()
    last: datetime = max((run["ended_at"] for run in ended if run["ended_at"]), default=began_at)
    return Burst(
        runs, delay_ms, (last - began_at).total_seconds(), submitted, model["max_in_flight"], model["calls"],
        model["repeated"], cost, problems(runs, ended, model),
    )  # fmt: skip


class _Meter:
    """Reads all counters when it is made, and what was added since when asked."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._commands = self._count()
        self._cpu = accounting.read_cpu(system.pids)

    def _count(self) -> dict[str, int]:
        return accounting.commands(self._system.servers.mongo, self._system.servers.redis)

    def cost(self, runs: int) -> Cost:
        after = accounting.read_cpu(self._system.pids)
        spent = accounting.spent(self._cpu, after)
        commands = accounting.difference(self._commands, self._count())
        return Cost(
            {name: seconds * 1000 / runs for name, seconds in spent.processes.items()},
            self._system.servers.pace.between(self._cpu.at, after.at),
            spent.others_cores,
            {name: count / runs for name, count in commands.items()},
            {name: accounting.resident_mb(pid) for name, pid in self._system.pids.items()},
        )


def wait_until_settled(system: System, runs: int) -> None:
    """Until every run has ended and its audit events are copied out, or nothing has moved for ``STALL_S``.

    Asks the model server while calls are outstanding, because asking MongoDB would be part of the measurement.
    """
    pause = threading.Event()
    seen, moved = -1, time.monotonic()
    while time.monotonic() - moved < STALL_S:
        calls = system.servers.model.calls()["calls"]
        if calls >= runs * CALLS_A_RUN and _settled(system):
            return
        if calls != seen:
            seen, moved = calls, time.monotonic()
        pause.wait(0.02)


def _settled(system: System) -> bool:
    return system.runs.find_one({"next_due": {"$type": "date"}}, {"_id": 1}, hint="due") is None


def _ended(system: System, ids: list[str]) -> list[dict[str, Any]]:
    fields = {"status": 1, "ended_at": 1, "result.acceptance": 1, "usage": 1, "waste": 1, "audit.seq": 1}
    return list(system.runs.find({"_id": {"$in": ids}}, fields))


def problems(runs: int, ended: list[dict[str, Any]], model: Mapping[str, int]) -> list[str]:
    """What makes the figures worthless: runs that did not go the way of the workload, calls too many or too few."""
    found = []
    statuses = Counter(run["status"] for run in ended)
    if statuses != {"succeeded": runs}:
        found.append(f"not all of {runs} runs succeeded: {dict(statuses)}")
    astray = sum(run["usage"].get("steps") != 5 or run["audit"]["seq"] != 7 for run in ended)
    if astray:
        found.append(f"{astray} runs did not take the workload's steps")
    wasteful = sum(bool(run["waste"]) for run in ended)
    if wasteful:
        found.append(f"{wasteful} runs book waste: leases were lost")
    if model["calls"] != runs * CALLS_A_RUN or model["repeated"]:
        expected = runs * CALLS_A_RUN
        found.append(f"{model['calls']} model calls instead of {expected}, {model['repeated']} with a key twice")
    return found
