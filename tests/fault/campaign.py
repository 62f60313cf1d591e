"""The chaos campaign: a stream of runs on the real system under a seeded stream of faults, then every promise checked
over every run.

    python -m tests.fault.campaign --broker redis --runs 2500 --seconds 120 --seed 7

When the faults are over, everything is repaired, all runs must end, and ``tests.fault.verdict`` looks at each. Exit
code 1 with the list of violations and the folder of the logs if one is broken.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentq.errors import ConfigError
from tests.fault.chaos import Chaos
from tests.fault.fleet import Fleet, Member
from tests.fault.load import Load, unended
from tests.fault.model import ScriptedServer
from tests.fault.plant import Plant, app_variant
from tests.fault.recovery import Recovery, percentile
from tests.fault.system import LEASE_S, Broker
from tests.fault.verdict import Judge, Verdict

Doc = dict[str, Any]
MODEL_DELAY_S = 0.05  # so that calls are in flight when something dies
SETTLE_S = 150.0  # after the last fault every run has ended by then
AFTERMATH_S = 20.0  # after a fault on MongoDB a lease may still run out so much later


@dataclass
class Report:
    """What a campaign found."""

    broker: Broker
    seed: int
    replica_set: bool
    seconds: float = 0.0
    settle_s: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    verdict: Verdict = field(default_factory=Verdict)
    recovery: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def campaign(
    directory: Path, broker: Broker, runs: int, seconds: float, seed: int, *, replica_set: bool = False,
    every_s: float = 0.55,
) -> Report:  # fmt: skip
    """Play one campaign with its servers' data and logs in ``directory``."""
    report = Report(broker, seed, replica_set)
    rng = random.Random(seed)
    began = time.monotonic()
    app = app_variant(directory / "app", models=("read_timeout_s: 60", "read_timeout_s: 6"))
    with (
        ScriptedServer(MODEL_DELAY_S) as model,
        Plant(directory, model, broker, replica_set=replica_set, schedulers=0, app=app) as plant,
        Recovery(plant.mongo["agentq"]["runs"]) as recovery,
        Fleet(plant, rng, armed=0.5) as fleet,
    ):
        _until(fleet.ready, "the processes serve")
        with plant.client() as client:
            load = Load(client, rate=runs / seconds, limit=runs, key=f"campaign-{seed}")
            chaos = Chaos(plant, fleet, recovery, client, load.accepted)
            _under_fire(load, chaos, fleet, recovery, rng, seconds, every_s)
            calm = time.monotonic()
            live = unended(plant.mongo["agentq"]["runs"], SETTLE_S, lambda: recovery.outstanding() == 0)
            if live:
                report.problems.append(f"{live} runs had not ended {SETTLE_S:g} s after the last fault")
            report.settle_s = time.monotonic() - calm
        excused = _excuses(fleet, chaos.mongo_faults)
        judge = Judge(model, chaos.cancelled, excused)
        report.verdict = judge.judge_all(plant.mongo["agentq"], load.accepted)
        report.faults = chaos.done + _crashes(fleet)
        report.recovery = list(recovery.times)
        report.problems += chaos.errors + _misbehaved(fleet.everybody())
        report.problems += report.verdict.wrong
        if len(set(load.accepted)) != runs:
            report.problems.append(f"{len(set(load.accepted))} runs were accepted, {runs} were handed in")
    report.seconds = time.monotonic() - began
    return report


def _under_fire(
    load: Load, chaos: Chaos, fleet: Fleet, recovery: Recovery, rng: random.Random, seconds: float, every_s: float
) -> None:
    """The stream and the faults side by side; every death is told to ``recovery``."""
    over = threading.Event()
    telling = threading.Thread(target=_tell_deaths, args=(fleet, recovery, over), name="deaths", daemon=True)
    telling.start()
    with load:
        chaos.run(rng, seconds, every_s)
        load.wait()
    _until(fleet.disarm, "every place is filled and nobody is to die")
    over.set()
    telling.join(10)


def _tell_deaths(fleet: Fleet, recovery: Recovery, over: threading.Event) -> None:
    told = 0
    while not over.wait(0.05):
        for member in fleet.deaths(told):
            told += 1
            if member.died_at is not None and member.cause in ("killed", "crash point"):
                recovery.happened(member.process.pid, member.died_at)


def _excuses(fleet: Fleet, mongo_faults: list[tuple[float, float]]) -> Any:
    """Who may have lost a lease: a process that died or was frozen, and anybody while MongoDB was in trouble or the
    machine had so many other things to do that a lease of five seconds means little."""
    disturbed = {str(member.process.pid): member.disturbed for member in fleet.everybody()}

    def excused(worker: str, at: float) -> bool:
        if any(moment <= at + 1 for moment in disturbed.get(worker.split(":")[1], ())):
            return True
        if any(abs(moment - at) < AFTERMATH_S for moment in fleet.overloaded):
            return True
        return any(began <= at + 1 and at <= ended + AFTERMATH_S for began, ended in mongo_faults)

    return excused


def _crashes(fleet: Fleet) -> Counter[str]:
    return Counter(f"died at {member.point}" for member in fleet.everybody() if member.cause == "crash point")


def _misbehaved(members: list[Member]) -> list[str]:
    """Processes that ended though nobody killed them, or did not end well when they were asked to."""
    ended = [member for member in members if member.died_at is not None]
    return [
        f"{member.name} ended by itself with code {member.code}" for member in ended if member.cause == "by itself"
    ] + [
        f"{member.name} was asked to stop and ended with code {member.code}"
        for member in ended
        if member.cause == "asked" and member.code != 0
    ]


def _until(condition: Any, what: str, timeout_s: float = 90) -> None:
    pause, deadline = threading.Event(), time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s in vain until {what}")
        pause.wait(0.05)


# -------------------------------------------------------------------------------------------------------------- report


def rows(report: Report) -> list[tuple[str, str]]:
    """The table: what was measured, and its value."""
    verdict = report.verdict
    p50, p99 = (percentile(report.recovery, share) for share in (0.5, 0.99))
    mongo = "three mongods" if report.replica_set else "one mongod"
    return [
        ("date, machine", f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {mongo}, lease {LEASE_S} s"),
        ("runs accepted", f"{verdict.accepted}"),
        ("faults injected", f"{report.faults.total()}"),
        ("lost", f"{verdict.lost}"),
        ("doubled", f"{verdict.doubled}"),
        ("unexplained extra model calls", f"{verdict.unexplained}"),
        ("extra paid model calls", f"{verdict.extra_calls}"),
        ("steps whose worker was lost, failed attempts", f"{verdict.lost_steps}, {verdict.failed_attempts}"),
        ("ended as", ", ".join(f"{count} {status}" for status, count in sorted(verdict.statuses.items()))),
        ("of these waiting for a person (irreversible step, outcome unknown)", f"{verdict.held}"),
        ("recovery p50, p99", f"{p50:.1f} s, {p99:.1f} s over {len(report.recovery)} steps"),
        ("all runs ended after the last fault", f"{report.settle_s:.0f} s"),
        ("duration, seed", f"{report.seconds:.0f} s, {report.seed}"),
        ("faults by kind", "; ".join(f"{count} {kind}" for kind, count in sorted(report.faults.items()))),
    ]


def _table(report: Report) -> str:
    name = {"redis": "Redis", "rabbitmq": "RabbitMQ"}[report.broker]
    lines = [f"| {name} as broker | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows(report))]
    return "\n".join(lines)


def write_docs(file: Path, report: Report) -> None:
    """Put the table in the place of this broker's last one, between the markers of ``file``."""
    text = file.read_text(encoding="utf-8")
    begin, end = f"<!-- campaign:{report.broker} -->\n", f"<!-- /campaign:{report.broker} -->\n"
    block = f"{begin}{_table(report)}\n{end}"
    if begin in text:
        before, rest = text.split(begin, 1)
        text = before + block + rest.split(end, 1)[1]
    else:
        text = text.replace("<!-- campaign:end -->\n", f"{block}<!-- campaign:end -->\n")
    file.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fault.campaign", description=__doc__.split("\n\n")[0])
    parser.add_argument("--broker", choices=("redis", "rabbitmq"), default="redis")
    parser.add_argument("--runs", type=int, default=2500, help="requests to hand in; default 2500")
    parser.add_argument("--seconds", type=float, default=120, help="how long faults are injected; default 120")
    parser.add_argument("--every", type=float, default=0.55, help="seconds between faults on average; default 0.55")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--replica-set", action="store_true", help="three mongods whose primary is killed")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/reliability.md")
    given = parser.parse_args()
    logging.disable(logging.WARNING)  # the client tells of every hint that did not get through
    directory = Path(tempfile.mkdtemp(prefix="agentq-campaign-"))
    print(f"campaign: {given.runs} runs in {given.seconds:g} s on {given.broker}, seed {given.seed}", flush=True)
    try:
        report = campaign(
            directory, given.broker, given.runs, given.seconds, given.seed, replica_set=given.replica_set,
            every_s=given.every,
        )  # fmt: skip
    except ConfigError as error:  # a server's program is missing
        print(f"campaign: NOT RUN: {error}")
        return 1 if os.environ.get("CI") else 0
    for what, value in rows(report):
        print(f"  {what}: {value}")
    if report.problems:
        print(f"campaign: {len(report.problems)} VIOLATIONS; the logs are in {directory}")
        for problem in report.problems[:40]:
            print(f"  {problem}")
        return 1
    if given.write_docs:
        write_docs(Path(__file__).resolve().parents[2] / "docs" / "reliability.md", report)
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
