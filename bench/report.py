"""The table for people, the JSON for comparison, and the facts about the machine that both need."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from agentq.embedded.binaries import find_mongod, find_redis_server
from bench.load import Alone, Burst

# Our bar, and what Restate took for the same workload (measured on 20 Nov 2026).
CPU_MS, P50_MS, MAKESPAN_S = (4.0, 6.0), (11.4, 11.4), (7.0, 18.0)
_LIBRARIES = ("celery", "kombu", "redis", "hiredis", "pymongo", "aiohttp", "uvloop")
_NOISY = 0.5  # cores that others use before a figure of ours counts as noisy


@dataclass
class Report:
    """Everything that one ``python -m bench`` measured. ``bursts`` holds the repeats of each size together."""

    topology: str
    machine: dict[str, Any]
    settings: dict[str, str]
    alone: Alone | None = None
    bursts: list[list[Burst]] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        measured: list[Alone | Burst] = [burst for repeats in self.bursts for burst in repeats]
        if self.alone:
            measured.insert(0, self.alone)
        return [f"{_name(one)}: {problem}" for one in measured for problem in one.problems]

    def as_json(self) -> dict[str, Any]:
        return {
            "topology": self.topology,
            "machine": self.machine,
            "settings": self.settings,
            "alone": self.alone and _as_json(self.alone),
            "bursts": [
                [_as_json(burst) | {"runs_per_s": burst.runs_per_s} for burst in repeats] for repeats in self.bursts
            ],
            "problems": self.problems,
        }


def _as_json(one: Alone | Burst) -> dict[str, Any]:
    return asdict(one) | {"total_ms": one.cost.total_ms, "paced_ms": one.cost.paced_ms}


def _name(one: Alone | Burst) -> str:
    return "one at a time" if isinstance(one, Alone) else f"{one.runs:,} at once, {one.delay_ms} ms a call"


# -- the table ---------------------------------------------------------------------------------------------------------


def table(report: Report) -> str:
    """What was measured, against its targets, as text of at most 120 columns."""
    blocks = [_facts(report)]
    if report.alone:
        blocks.append(_alone(report.alone))
    if report.bursts:
        blocks += [_bursts(report.bursts), _by_process(report.bursts), _by_command(report.bursts)]
    blocks.append(_targets(report))
    return "\n\n".join(blocks)


def _facts(report: Report) -> str:
    machine = report.machine
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    changed = ", ".join(f"{name}={value}" for name, value in report.settings.items()) or "defaults"
    hardware = (
        f"{machine['date']}, {machine['cores']} cores, {machine['cpu']}, Linux {machine['kernel']}, "
        f"fsync {machine['fsync_ms']:.1f} ms"
    )
    return _filled(f"{hardware}\n{versions}\ntopology: {report.topology}; settings: {changed}")


def _filled(text: str) -> str:
    return "\n".join(textwrap.fill(line, 120, subsequent_indent="  ") for line in text.splitlines())


def _alone(one: Alone) -> str:
    def row(name: str, values: Sequence[float]) -> str:
        return f"  {name:<34}{statistics.median(values):>8.1f}{_percentile(values, 99):>8.1f}{min(values):>8.1f}"

    return "\n".join(
        [
            f"One run at a time (n={one.runs}), model server answers at once",
            f"  {'latency, ms':<34}{'p50':>8}{'p99':>8}{'min':>8}",
            row("accepted to ended, as stored", one.stored_ms),
            row("submit to wait's return", one.seen_ms),
            f"  CPU ms a run: {one.cost.total_ms:.1f}, {one.cost.paced_ms:.1f} at pace 1; pace {one.cost.pace:.2f}, "
            f"others' cores {_noise([one])}",
            _filled(f"  by process: {_parts(one.cost.cpu_ms)}"),
        ]
    )


def _bursts(bursts: Sequence[Sequence[Burst]]) -> str:
    lines = [
        "Many at once: medians [min-max] of the repeats",
        f"  {'runs x repeats':<14}{'ms/call':>8}{'CPU ms a run':>18}{'at pace 1':>11}{'pace':>6}{'runs/s':>8}"
        f"{'makespan s':>12}{'in flight':>10}{'calls/run':>10}{'key twice':>10}  others",
    ]
    for repeats in bursts:
        first, costs = repeats[0], [one.cost.total_ms for one in repeats]
        cpu = f"{statistics.median(costs):.2f} [{min(costs):.2f}-{max(costs):.2f}]"
        lines.append(
            f"  {f'{first.runs} x {len(repeats)}':<14}{first.delay_ms:>8}{cpu:>18}"
            f"{_median(repeats, lambda one: one.cost.paced_ms):>11.2f}"
            f"{_median(repeats, lambda one: one.cost.pace):>6.2f}"
            f"{_median(repeats, lambda one: one.runs_per_s):>8.0f}{_median(repeats, lambda one: one.makespan_s):>12.2f}"
            f"{max(one.max_in_flight for one in repeats):>10}"
            f"{sum(one.calls for one in repeats) / sum(one.runs for one in repeats):>10.2f}"
            f"{sum(one.repeated for one in repeats):>10}  {_noise(repeats)}"
        )
    return "\n".join(lines)


def _by_process(bursts: Sequence[Sequence[Burst]]) -> str:
    names = list(bursts[0][0].cost.cpu_ms)
    lines = ["CPU ms a run by process (client and model server are no part of the sum above)"]
    lines.append("  " + " " * 16 + "".join(f"{name:>14}" for name in names))
    for repeats in bursts:
        cells = [_median(repeats, lambda one, name=name: one.cost.cpu_ms[name]) for name in names]  # type: ignore[misc]
        label = f"{repeats[0].runs} at {repeats[0].delay_ms} ms"
        lines.append(f"  {label:<16}" + "".join(f"{cell:>14.3f}" for cell in cells))
    peaks = bursts[-1][-1].cost.peak_mb
    lines.append(f"  {'peak MB':<16}" + "".join(f"{peaks[name]:>14.0f}" for name in names))
    return "\n".join(lines)


def _by_command(bursts: Sequence[Sequence[Burst]]) -> str:
    first = bursts[0][-1].cost.commands
    mongo = {name.removeprefix("mongo "): count for name, count in first.items() if name.startswith("mongo ")}
    redis = {name.removeprefix("redis "): count for name, count in first.items() if name.startswith("redis ")}
    most = sorted(redis.items(), key=lambda item: -item[1])[:8]
    return _filled(
        f"Commands a run ({bursts[0][0].runs} at {bursts[0][0].delay_ms} ms)\n  MongoDB: "
        + ", ".join(f"{name} {count:.2f}" for name, count in mongo.items())
        + "\n  Redis: "
        + ", ".join(f"{name} {count:.2f}" for name, count in most)
    )


def _targets(report: Report) -> str:
    lines = [f"{'Targets':<40}{'measured':>10}{'at pace 1':>11}{'bar':>7}{'Restate*':>10}"]

    def line(name: str, value: float, paced: float | None, bar: float, restate: float) -> None:
        compared = "" if paced is None else f"{paced:.2f}"
        verdict = "met" if (value if paced is None else paced) <= bar else "MISSED"
        lines.append(f"  {name:<38}{value:>10.2f}{compared:>11}{bar:>7.1f}{restate:>10.1f}   {verdict}")

    if report.alone:
        line("one at a time: p50 ms, as stored", statistics.median(report.alone.stored_ms), None, *P50_MS)
    for repeats in report.bursts:
        if repeats[0].delay_ms == 0:
            paced = _median(repeats, lambda one: one.cost.paced_ms)
            line("CPU ms a run (goal: 3.0)", _median(repeats, lambda one: one.cost.total_ms), paced, *CPU_MS)
        elif repeats[0].runs == 5000:
            line("5,000 in flight, 1 s a call: s", _median(repeats, lambda one: one.makespan_s), None, *MAKESPAN_S)
    lines.append("  * measured on this kind of machine on another day, not here; its pace then is not known")
    wrong = "\n".join(f"  WRONG: {problem}" for problem in report.problems)
    every = "Every run succeeded with 4 model calls exactly, none repeated."
    return "\n".join(lines) + f"\n{wrong or every}"


def _parts(cpu_ms: Any) -> str:
    return ", ".join(f"{name} {ms:.2f}" for name, ms in cpu_ms.items())


def _noise(measured: Sequence[Alone | Burst]) -> str:
    cores = max(one.cost.others_cores for one in measured)
    return f"{cores:.1f}" + (" (noisy)" if cores > _NOISY else "")


def _median(repeats: Sequence[Burst], of: Callable[[Burst], float]) -> float:
    return statistics.median(of(one) for one in repeats)


def _percentile(values: Sequence[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


# -- the machine -------------------------------------------------------------------------------------------------------


def machine(directory: Path) -> dict[str, Any]:
    """What the figures depend on. ``directory`` is on the disk that MongoDB writes to."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cores": os.cpu_count(),
        "cpu": _cpu(),
        "kernel": platform.release(),
        "fsync_ms": _fsync_ms(directory),
        "versions": {
            "Python": platform.python_version(),
            **{name: version(name) for name in _LIBRARIES},
            "redis-server": _first_number(find_redis_server()),
            "mongod": _first_number(find_mongod()),
        },
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _first_number(binary: Path) -> str:
    """``v=7.0.15`` or ``db version v6.0.5`` without the words."""
    words = subprocess.check_output([binary, "--version"], text=True).replace("=", " ").split()
    numbers = [word.removeprefix("v") for word in words if word.removeprefix("v")[:1].isdigit()]
    return numbers[0] if numbers else "unknown"


def _fsync_ms(directory: Path) -> float:
    """The median of 20 appends of 4 KiB with fdatasync, as a journal does them."""
    file = directory / "fsync-probe"
    took = []
    with file.open("wb", buffering=0) as probe:
        for _ in range(20):
            began = time.perf_counter()
            probe.write(b"x" * 4096)
            os.fdatasync(probe.fileno())
            took.append((time.perf_counter() - began) * 1000)
    file.unlink()
    return statistics.median(took)
