"""What the admission costs: ``python -m bench.admission``, and with ``--mongod`` the leader's whole look, too.

The decision alone: a thousand tenants with a million runs waiting, of which it sees only the heads of each line, as in
production (there MongoDB's index gives them; here a counter does). Microseconds of CPU a run admitted, for small and
large rooms, raw and divided by the machine's pace (``bench/pace.py``). The exit code is 1 if a room of 16 or more is
above the bar, raw.

``--mongod``: the same million as documents in a mongod of its own, about three minutes of inserting and as much disk as
a gigabyte; then ``bench/admission_tick.py`` measures whole ticks on it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import uvloop

from agentq.embedded.servers import start_mongod
from agentq.engine.admission import Books, Line, Quota, Waiting, decide
from bench.admission_tick import fill, report
from bench.pace import Pace

TENANTS = 1_000
RUNS = 1_000_000
HEADS = 16
ROOMS = (16, 64, 256, 500)
BAR_US = 50.0


class Spent(NamedTuple):
    """Microseconds of CPU: a run, and by the machine's pace meanwhile."""

    us: float
    pace: float


def measure(room: int, runs: int, pace: Pace, cap: int | None = None) -> Spent:
    """``runs`` admissions in decisions of ``room`` each; fetching the heads is not counted. ``cap``: each tenant may
    have so many in a decision."""
    left = {f"tenant-{index:04d}": RUNS // TENANTS for index in range(TENANTS)}
    weights = {tenant: 1.0 + index % 5 for index, tenant in enumerate(left)}
    quotas = {} if cap is None else {tenant: Quota(cap) for tenant in left}
    lines = {tenant: _line(tenant, left[tenant]) for tenant in left}
    books, admitted, spent, began = Books(), 0, 0, time.monotonic()
    while admitted < runs:
        before = time.thread_time_ns()
        decision = decide(
            books, {"batch": lines}, window=room, flight={}, weights=weights, quotas=quotas, limit=room
        )  # fmt: skip
        spent += time.thread_time_ns() - before
        books, admitted = decision.books, admitted + len(decision.admitted)
        for one in decision.admitted:
            left[one.flow] -= 1
        for flow in {one.flow for one in decision.admitted} | {flow for _, flow in decision.wanted}:
            lines[flow] = _line(flow, left[flow])
    return Spent(spent / admitted / 1e3, pace.between(began, time.monotonic()))


def _line(tenant: str, left: int) -> Line:
    heads = [Waiting(f"{tenant}-{left - index:06d}", 4, 1_000 + index * 37) for index in range(min(HEADS, left))]
    return Line(heads, more=left > HEADS)


def decisions() -> bool:
    """Print what decisions cost; is every one of them below the bar?"""
    print(f"the decision alone: {TENANTS:,} tenants, {RUNS:,} runs waiting, {HEADS} heads a tenant known")
    worst = 0.0
    with Pace() as pace:
        for room in ROOMS:
            free, capped = measure(room, 20_000, pace), measure(room, 20_000, pace, cap=5)
            worst = max(worst, free.us)
            print(
                f"  {room:4d} runs a decision: {free.us:6.1f} us a run, {free.us / free.pace:5.1f} at pace 1 "
                f"({free.pace:.2f}), {free.us * room / 1000:5.2f} ms a decision; every tenant capped: {capped.us:5.1f} "
                f"us a run, {capped.us / capped.pace:5.1f} at pace 1",
                flush=True,
            )
    print(f"bar: {BAR_US:g} us a run, raw, from {ROOMS[0]} runs a decision on: {'met' if worst < BAR_US else 'MISSED'}")
    return worst < BAR_US


def ticks(directory: Path, runs: int) -> None:
    """Print what whole ticks cost on a mongod with its data in ``directory``."""
    tenants = [f"tenant-{index:04d}" for index in range(TENANTS)]
    with start_mongod(directory / "mongodb", cache_gb=1.0) as mongod:
        began = time.monotonic()
        uvloop.run(fill(mongod.url, tenants, runs))
        print(f"the whole tick: {len(tenants):,} tenants, {runs:,} runs waiting, inserted in "
              f"{time.monotonic() - began:.0f} s", flush=True)  # fmt: skip
        uvloop.run(report(mongod.url, mongod.pid, (16, 64, 256)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.admission", description="What does the admission cost?")
    parser.add_argument("--mongod", action="store_true", help="whole ticks on a real mongod, too")
    parser.add_argument("--runs", type=int, default=RUNS, help="how many wait in MongoDB; default a million")
    parser.add_argument("--dir", type=Path, help="where mongod keeps its data meanwhile; default the temp dir")
    options = parser.parse_args(argv)
    met = decisions()
    if options.mongod:
        with tempfile.TemporaryDirectory(prefix="agentq-admission-", dir=options.dir) as directory:
            ticks(Path(directory), options.runs)
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
