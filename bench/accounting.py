"""What processes and servers spend: CPU from /proc, commands from Redis and MongoDB. Read twice, subtract."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymongo import MongoClient
from redis import Redis

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Reading:
    """CPU seconds so far: by name of a process of ours, and of the whole machine (steal included)."""

    at: float
    processes: Mapping[str, float]
    machine: float


@dataclass(frozen=True, slots=True)
class Spent:
    """What passed between two readings. ``others_cores``: how many cores everybody else kept busy meanwhile."""

    wall_s: float
    processes: Mapping[str, float]
    others_cores: float


def read_cpu(pids: Mapping[str, int]) -> Reading:
    """All threads, those that have ended too, and children that were waited for. Raises OSError if one is gone."""
    return Reading(time.monotonic(), {name: _process_s(pid) for name, pid in pids.items()}, _machine_s())


def spent(before: Reading, after: Reading) -> Spent:
    wall = after.at - before.at
    ours = {name: after.processes[name] - before.processes[name] for name in after.processes}
    others = (after.machine - before.machine - sum(ours.values())) / wall
    return Spent(wall, ours, max(0.0, others))


def _process_s(pid: int) -> float:
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    fields = text[text.rindex(")") + 2 :].split()  # the name before may hold spaces; utime is the 14th field of all
    return sum(int(ticks) for ticks in fields[11:15]) * _TICK_S


def _machine_s() -> float:
    fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(ticks) for ticks in fields[:8])
    return (user + nice + system + irq + softirq + steal) * _TICK_S


def resident_mb(pid: int) -> float:
    """The most memory that the process has had resident so far."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


def commands(mongo: MongoClient[dict[str, Any]], redis: Redis) -> dict[str, int]:
    """Counters of both servers so far, e.g. ``mongo commands update`` and ``redis lpush``.

    MongoDB counts a bulk write of 50 updates as one command and 50 updates; we list both, the ratio is the batch size.
    """
    status = mongo.admin.command("serverStatus")
    found = {f"mongo command {name}": status["metrics"]["commands"][name]["total"] for name in _MONGO_COMMANDS}
    found["mongo update statements"] = status["opcounters"]["update"]
    found["mongo documents inserted"] = status["metrics"]["document"]["inserted"]
    found["mongo journal syncs"] = status["wiredTiger"]["log"]["log sync operations"]
    stats: Mapping[str, Any] = redis.info("commandstats")
    for name, of in stats.items():
        found[f"redis {name.removeprefix('cmdstat_')}"] = of["calls"]
    found["redis commands"] = sum(of["calls"] for of in stats.values())
    return found


_MONGO_COMMANDS = ("update", "insert", "find", "findAndModify", "aggregate")


def difference(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    return {name: count - before.get(name, 0) for name, count in after.items() if count != before.get(name, 0)}
