"""Does anything grow? ``python -m bench.soak --minutes 60``: a steady stream of runs at half of the machine's pace.

Every ten seconds it reads, of each process, resident memory and open files, and of the servers Redis's keys and
MongoDB's connections. The first third of the time is for warming up. Then the median of the last third may exceed that
of the middle one by no more than the tolerance below. Exit code 1 if something grew or a run did not succeed.

MongoDB's own memory is shown and not judged: it caches the runs that the soak leaves behind, up to its limit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from agentq.client import Handle
from bench import load
from bench.system import WORKFLOW, System, serving, working

SAMPLE_S = 10.0
CALL_MS = 200
_REQUEST = {"input": "Where is my order A-10017?", "workflow": WORKFLOW, "user": "C-7"}
# How much more the last third may have than the middle one: a part of it, and so many units besides.
TOLERANCE = {"rss_mb": (0.03, 3.0), "files": (0.0, 8.0), "redis_keys": (0.0, 4.0), "connections": (0.0, 8.0)}
_NOT_JUDGED = ("mongod rss_mb", "client rss_mb", "model server rss_mb")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description="Does anything grow?")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rate", type=float, help="runs a second; default: half of what is measured first")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all samples")
    parser.add_argument("--dir", type=Path, help="where the servers keep their data meanwhile; default the temp dir")
    options = parser.parse_args(argv)
    with (
        tempfile.TemporaryDirectory(prefix="agentq-soak-", dir=options.dir) as directory,
        serving(Path(directory)) as servers,
        working(servers, "combined", {}) as system,
    ):
        rate = options.rate or load.burst(system, 1000, 0).runs_per_s / 2
        print(f"{rate:.0f} runs a second for {options.minutes:g} minutes, {CALL_MS} ms a model call", flush=True)
        servers.model.reset(CALL_MS)
        samples, handed_in = _soak(system, rate, options.minutes * 60)
        unended = system.runs.count_documents({"status": {"$ne": "succeeded"}})
    if options.json:
        options.json.write_text(json.dumps(samples, indent=1) + "\n", encoding="utf-8")
    grown = growth(samples)
    print(_table(samples, grown))
    print(f"{handed_in} runs, {unended} did not succeed; grown: {', '.join(grown) or 'nothing'}")
    return 1 if grown or unended else 0


def _soak(system: System, rate: float, seconds: float) -> tuple[list[dict[str, float]], int]:
    """The samples, and how many runs were handed in. Hands in a tenth of a second's runs at a time."""
    pause, samples, handed_in = threading.Event(), [], 0
    began = time.monotonic()
    next_sample = began
    while (now := time.monotonic()) - began < seconds:
        due = int((now - began) * rate) - handed_in
        for accepted in system.client.submit_many(dict(_REQUEST) for _ in range(due)):
            if not isinstance(accepted, Handle):
                raise accepted
        handed_in += due
        if now >= next_sample:
            samples.append(sample(system))
            next_sample += SAMPLE_S
        pause.wait(0.1)
    load.wait_until_settled(system, handed_in)
    return samples, handed_in


def sample(system: System) -> dict[str, float]:
    """What is there now, by name."""
    found: dict[str, float] = {}
    for name, pid in system.pids.items():
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        found[f"{name} rss_mb"] = int(status.split("VmRSS:")[1].split()[0]) / 1024
        found[f"{name} files"] = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    found["redis_keys"] = int(system.servers.redis.dbsize())
    found["connections"] = system.servers.mongo.admin.command("serverStatus")["connections"]["current"]
    return found


def growth(samples: Sequence[Mapping[str, float]]) -> list[str]:
    """The names of what grew from the middle third to the last."""
    third = len(samples) // 3
    grown = []
    for name in samples[0]:
        part, units = TOLERANCE[name.split()[-1]]
        middle, last = _median(samples[third : 2 * third], name), _median(samples[2 * third :], name)
        if name not in _NOT_JUDGED and last > middle * (1 + part) + units:
            grown.append(name)
    return grown


def _median(samples: Sequence[Mapping[str, float]], name: str) -> float:
    return statistics.median(sample[name] for sample in samples)


def _table(samples: Sequence[Mapping[str, float]], grown: Sequence[str]) -> str:
    third = len(samples) // 3
    lines = [f"{'':28}{'first':>10}{'middle third':>14}{'last third':>12}"]
    for name in samples[0]:
        middle, last = _median(samples[third : 2 * third], name), _median(samples[2 * third :], name)
        mark = "  GROWN" if name in grown else ""
        lines.append(f"{name:28}{samples[0][name]:10.1f}{middle:14.1f}{last:12.1f}{mark}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
