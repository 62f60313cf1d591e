"""A large batch with one interactive request a second beside it: ``python -m bench.batch_beside [--lines 20000]``.

Starts what ``agentq up --app examples/support_desk`` starts (but Flower) in a temporary directory, writes a file of the
support desk's own requests over and over, hands it in by ``agentq batch submit``, and waits for its end. Meanwhile
phases without and with an interactive request a second alternate, in the order that a steady drift cancels out of.

Judged: every line succeeded; the batch's cost is the sum of its lines'; the p99 of the interactive requests' wait in
the queue; the throughput that the batch loses to them. The wait is from a request's ``created_at`` to the start of its
first model call: its storing, its admission, the broker, the claim. A phase's throughput is the lines that ended in it
by their ``ended_at``. The time before the first phase and the one in which the batch ends count for nothing. Exit code
1 if a verdict is missed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pymongo import MongoClient

from agentq.client import Client, Handle
from agentq.embedded.plan import CHECKOUT
from agentq.embedded.stack import Stack
from bench import accounting
from bench.pace import Pace
from config.settings import load_settings
from examples.support_desk.demo import WORKFLOW
from examples.support_desk.desk import database
from examples.support_desk.scorecard import DeskRequest, load_requests
from examples.support_desk.seed import seed

APP = CHECKOUT / "examples" / "support_desk"
WAIT_S, LOSS = 1.0, 0.10  # the bars: p99 of the wait, part of the throughput
WARM_UP_S = 10.0  # the window is found, connections are open
STALL_S = 120.0  # without a line that ends
ORDER = (False, True, True, False)  # phases without and with: a steady drift hits both alike


@dataclass(frozen=True)
class Phase:
    """A stretch of the batch's life; times are epoch seconds. ``pace`` as in ``bench.pace``."""

    beside: bool
    began: float
    ended: float
    pace: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass(frozen=True)
class Request:
    """An interactive request that has ended. Seconds from its ``created_at``; ``admitted_s`` is None where it went
    straight to its pool."""

    status: str
    admitted_s: float | None
    wait_s: float
    answered_s: float


@dataclass
class Show:
    """What one run of this gave."""

    batch: dict[str, Any]
    phases: list[Phase]
    requests: list[Request]
    ended: list[float] = field(repr=False)  # epoch seconds of every line's end, in order
    lines_cost: int = 0
    seconds: float = 0.0
    cpu: Mapping[str, float] = field(default_factory=dict)
    others_cores: float = 0.0

    def rate(self, beside: bool, *, paced: bool = False) -> float:
        """Lines a second over all phases of a kind; ``paced``: as they would be at pace 1."""
        phases = [phase for phase in self.phases if phase.beside is beside]
        seconds = sum(phase.seconds / (phase.pace if paced else 1) for phase in phases)
        return sum(self.lines_in(phase) for phase in phases) / seconds if seconds else float("nan")

    def lines_in(self, phase: Phase) -> int:
        return sum(phase.began <= at < phase.ended for at in self.ended)

    def loss(self, *, paced: bool = False) -> float:
        return 1 - self.rate(True, paced=paced) / self.rate(False, paced=paced)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.batch_beside", description="A batch and urgent requests.")
    parser.add_argument("--lines", type=int, default=20_000, help="default 20000")
    parser.add_argument("--phase", type=float, default=60.0, help="seconds of a phase; default 60")
    parser.add_argument("--dir", type=Path, help="for data and logs, which stay there; default a temporary one")
    options = parser.parse_args(argv)
    with ExitStack() as stack:
        home = options.dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="agentq-beside-")))
        show = _run(home, options.lines, options.phase)
    print(table(show))
    missed = [name for name, _, met in verdicts(show, options.lines) if not met]
    return 1 if missed else 0


def _run(home: Path, lines: int, phase_s: float) -> Show:
    home.mkdir(parents=True, exist_ok=True)
    file = home / "requests.jsonl"
    write_file(file, lines)
    settings = load_settings(environ={}, cwd=home, data_dir=home / "data", app_dir=APP, flower=False)
    with Stack(settings, report=_say) as stack, MongoClient[dict[str, Any]](
        stack.settings["mongo_url"], tz_aware=True
    ) as mongo:  # fmt: skip
        seed(database(stack.settings["mongo_url"]))
        pids = {one["name"]: one["pid"] for one in stack.components()} | {"this": os.getpid()}
        with Pace() as pace, Client(stack.settings["mongo_url"], stack.settings["broker_url"]) as client:
            before, began = accounting.read_cpu(pids), time.monotonic()
            batch_id = _submit(stack.settings, file)
            _say(f"{lines:,} lines are on disk after {time.monotonic() - began:.1f} s: {batch_id}")
            watch = _Watch(mongo["agentq"], batch_id)
            phases, handles = _phases(watch, client, pace, phase_s)
            batch, seconds = watch.batch(), time.monotonic() - began
            spent = accounting.spent(before, accounting.read_cpu(pids))
            requests = [look(handle, mongo["agentq"]["runs"]) for handle in handles]
        show = Show(batch, phases, requests, watch.ended(), watch.lines_cost(), seconds)
        show.cpu, show.others_cores = spent.processes, spent.others_cores
        return show


def write_file(path: Path, lines: int) -> None:
    """The desk's requests over and over, each line with an id of its own; batches have no conversations."""
    requests = itertools.cycle(load_requests())
    with path.open("w", encoding="utf-8") as file:
        for number, request in zip(range(1, lines + 1), requests, strict=False):
            line = {"id": f"{request.id}-{number}", "input": request.text}
            file.write(json.dumps(line | ({"user": request.user} if request.user else {})) + "\n")


def _submit(settings: Mapping[str, str], file: Path) -> str:
    env = {**os.environ, **{f"AGENTQ_{name.upper()}": value for name, value in settings.items()}, "AGENTQ_CONFIG": ""}
    argv = [sys.executable, "-m", "agentq.cli", "batch", "submit", str(file), "--workflow", WORKFLOW]
    return subprocess.run(argv, cwd=CHECKOUT, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


class _Watch:
    """A batch, read from MongoDB."""

    def __init__(self, db: Any, batch_id: str) -> None:
        self._db, self._id = db, batch_id

    def batch(self) -> dict[str, Any]:
        return dict(self._db["batches"].find_one({"_id": self._id}))

    def backlog(self) -> bool:
        """Does a line still wait for its admission? When none does, the workers are no longer full."""
        return self._db["runs"].find_one({"backlog.class": "batch"}, {"_id": 1}, hint="backlog") is not None

    def ended(self) -> list[float]:
        found = self._db["runs"].find({"batch.id": self._id, "ended_at": {"$ne": None}}, {"ended_at": 1})
        return sorted(run["ended_at"].timestamp() for run in found)

    def lines_cost(self) -> int:
        fields = {"usage.cost_nano_usd": 1, "waste.cost_nano_usd": 1}
        return sum(
            run["usage"].get("cost_nano_usd", 0) + run["waste"].get("cost_nano_usd", 0)
            for run in self._db["runs"].find({"batch.id": self._id}, fields)
        )


def _phases(watch: _Watch, client: Client, pace: Pace, phase_s: float) -> tuple[list[Phase], list[Handle]]:
    """Phases until the batch has ended; those in which it was being worked on from the first second to the last."""
    pause, phases, handles = threading.Event(), [], []
    desk = itertools.cycle(load_requests())
    pause.wait(WARM_UP_S)
    for beside in itertools.cycle(ORDER):
        began, since = time.time(), time.monotonic()
        if beside:
            handles += list(_one_a_second(client, desk, phase_s))
        pause.wait(max(0.0, since + phase_s - time.monotonic()))
        if not watch.backlog():
            break
        phases.append(Phase(beside, began, time.time(), pace.between(since, time.monotonic())))
        told = watch.batch()
        _say(f"{'with' if beside else 'without':7} {told['entries']:,} of {told['total']:,} lines")
    _wait_for_the_end(watch, pause)
    return phases, handles


def _one_a_second(client: Client, desk: Iterator[DeskRequest], seconds: float) -> Iterator[Handle]:
    """At the full seconds, however long the one before takes."""
    pause, began = threading.Event(), time.monotonic()
    for number in range(int(seconds)):
        pause.wait(max(0.0, began + number - time.monotonic()))
        request = next(desk)
        yield client.submit(request.text, workflow=WORKFLOW, user=request.user, priority="interactive")


def _wait_for_the_end(watch: _Watch, pause: threading.Event) -> None:
    entries, moved = -1, time.monotonic()
    while (told := watch.batch())["live"]:
        if told["entries"] != entries:
            entries, moved = told["entries"], time.monotonic()
        if time.monotonic() - moved > STALL_S:
            _say(f"nothing has ended for {STALL_S:g} s")
            return
        pause.wait(0.5)


def look(handle: Handle, runs: Any) -> Request:
    """What became of an interactive request."""
    outcome, events = handle.wait(STALL_S), handle.events()
    run = runs.find_one({"_id": handle.run_id}, {"created_at": 1, "admitted_at": 1})
    admitted_s = (run["admitted_at"] - run["created_at"]).total_seconds() if "admitted_at" in run else None
    first = next((one for one in events if "latency_ms" in one["data"]), None)
    began_ms = float("inf") if first is None else first["at_ms"] - first["data"]["latency_ms"]
    wait_s = (began_ms - run["created_at"].timestamp() * 1000) / 1000
    return Request(outcome.status, admitted_s, wait_s, outcome.latency_s)


def percentile(values: Sequence[float], part: float) -> float:
    """The smallest value that is not exceeded by ``part`` of them."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)] if ordered else float("nan")


def verdicts(show: Show, lines: int) -> list[tuple[str, str, bool]]:
    """Name, figure, met."""
    succeeded, cost = show.batch["counts"]["succeeded"], show.batch["cost_nano_usd"]
    p99 = percentile([one.wait_s for one in show.requests], 0.99)
    answered = sum(one.status == "succeeded" for one in show.requests)
    return [
        ("every line succeeded", f"{succeeded:,} of {lines:,}", succeeded == lines == len(show.ended)),
        ("every interactive request succeeded", f"{answered} of {len(show.requests)}", answered == len(show.requests)),
        ("cost of the batch = sum of its lines", f"${cost / 1e9:.9f}", cost == show.lines_cost),
        (f"p99 of the wait in the queue <= {WAIT_S:g} s", f"{p99:.3f} s", p99 <= WAIT_S),
        (f"throughput lost <= {LOSS:.0%}", f"{show.loss():.1%}", show.loss() <= LOSS),
    ]


def table(show: Show) -> str:
    waits, answers = [one.wait_s for one in show.requests], [one.answered_s for one in show.requests]
    admitted = [one.admitted_s for one in show.requests if one.admitted_s is not None]
    counts = show.batch["counts"]
    blocks = [
        f"batch         {show.batch['status']}, {show.batch['total']:,} lines: {counts['succeeded']:,} succeeded, "
        f"{show.batch['entries'] - counts['succeeded']:,} not; {show.seconds:.1f} s, "
        f"{show.batch['entries'] / show.seconds:.1f} lines/s in all, submission and end included",
        *(_kind(show, beside) for beside in (False, True)),
        f"loss          {show.loss():.1%}, at pace 1 {show.loss(paced=True):.1%}",
        f"interactive   {len(waits)} requests, one a second; from created_at to the start of the first model call: "
        f"p50 {percentile(waits, 0.5):.3f} s, p99 {percentile(waits, 0.99):.3f} s, max {max(waits, default=0):.3f} s",
        f"              {len(admitted)} of them had to be admitted, the slowest after {max(admitted, default=0):.3f} s",
        f"              answered after p50 {percentile(answers, 0.5):.2f} s, p99 {percentile(answers, 0.99):.2f} s",
        "CPU           " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in show.cpu.items())
        + f"; others kept {show.others_cores:.2f} cores busy",
    ]  # fmt: skip
    return "\n".join(
        [*blocks, *(f"{'met' if met else 'MISSED':13} {name}: {figure}" for name, figure, met in _judged(show))]
    )


def _judged(show: Show) -> list[tuple[str, str, bool]]:
    return verdicts(show, show.batch["submitted"]["good"])


def _kind(show: Show, beside: bool) -> str:
    phases = [phase for phase in show.phases if phase.beside is beside]
    rates = ", ".join(f"{show.lines_in(phase) / phase.seconds:.1f}" for phase in phases)
    pace = statistics.fmean([phase.pace for phase in phases]) if phases else float("nan")
    name = "with" if beside else "without"
    return f"{name:13} {show.rate(beside):.1f} lines/s over {len(phases)} phases ({rates}), pace {pace:.2f}"


def _say(what: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
