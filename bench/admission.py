"""What the admission's decision costs: ``python -m bench.admission``.

A thousand tenants with a million runs waiting, of which the decision sees only the heads of each line, as in production
(there MongoDB's index gives them; here a counter does). Prints microseconds a run admitted, for small and large rooms.
"""

from __future__ import annotations

import time

from agentq.engine.admission import Books, Line, Waiting, decide

TENANTS = 1_000
RUNS = 1_000_000
HEADS = 16
BAR_US = 50.0


def measure(room: int, runs: int) -> float:
    """Microseconds a run: ``runs`` admissions in decisions of ``room`` each; fetching the heads is not counted."""
    left = {f"tenant-{index:04d}": RUNS // TENANTS for index in range(TENANTS)}
    weights = {tenant: 1.0 + index % 5 for index, tenant in enumerate(left)}
    lines = {tenant: _line(tenant, left[tenant]) for tenant in left}
    books, admitted, spent = Books(), 0, 0.0
    while admitted < runs:
        began = time.perf_counter()
        decision = decide(books, {"batch": lines}, window=room, flight={}, weights=weights, limit=room)
        spent += time.perf_counter() - began
        books, admitted = decision.books, admitted + len(decision.admitted)
        for one in decision.admitted:
            left[one.flow] -= 1
        for flow in {one.flow for one in decision.admitted} | {flow for _, flow in decision.wanted}:
            lines[flow] = _line(flow, left[flow])
    return spent / admitted * 1e6


def _line(tenant: str, left: int) -> Line:
    heads = [Waiting(f"{tenant}-{left - index:06d}", 4, 1_000 + index * 37) for index in range(min(HEADS, left))]
    return Line(heads, more=left > HEADS)


def main() -> int:
    """0 if a decision in rooms of 64 stays below the bar."""
    print(f"{TENANTS:,} tenants, {RUNS:,} runs waiting, {HEADS} heads a tenant known")
    found = {}
    for room in (16, 64, 256, 500):
        found[room] = measure(room, 20_000)
        print(
            f"  {room:4d} runs a decision: {found[room]:6.1f} us a run, {found[room] * room / 1000:5.2f} ms a decision"
        )
    print(f"bar: {BAR_US:g} us a run from 64 runs a decision on: {'met' if found[64] < BAR_US else 'MISSED'}")
    return 0 if found[64] < BAR_US else 1


if __name__ == "__main__":
    raise SystemExit(main())
