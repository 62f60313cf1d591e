"""What a run costs: ``python -m bench``. See bench/README.md for what the columns mean.

Exit code 1 if any run did not succeed or any model call was made twice or not at all: such figures are worth nothing.
A missed target is shown and is no failure, because it depends on the machine and on who else uses it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from agentq.errors import AgentqError
from bench import load, report
from bench.system import TOPOLOGIES, Servers, serving, working

MEASUREMENTS = ("alone", "throughput", "in-flight")
# 5,000 runs at 1 s a call are 5,000 steps in flight: half of them a process if the work is spread evenly, which the
# first to ask for messages decides; each message brings up to 64.
IN_FLIGHT = {"AGENTQ_STEPS_IN_FLIGHT": "5000", "AGENTQ_WORKER_CONCURRENCY": "80"}
RESULTS = Path(__file__).resolve().parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))  # a connection a call in flight
    try:
        with tempfile.TemporaryDirectory(prefix="agentq-bench-", dir=options.dir) as directory:
            measured = _measure(options, Path(directory))
    except AgentqError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(report.table(measured))
    file = options.json or RESULTS / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{options.topology}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(measured.as_json(), indent=1) + "\n", encoding="utf-8")
    print(f"\nWritten to {file}")
    return 1 if measured.problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="What a run costs on the real thing.")
    parser.add_argument("--quick", action="store_true", help="small numbers, no repeats: does it still work?")
    parser.add_argument("--topology", choices=TOPOLOGIES, default="combined", help="default combined")
    parser.add_argument("--broker", choices=("redis", "rabbitmq"), default="redis", help="default redis")
    parser.add_argument("--only", choices=MEASUREMENTS, action="append", help="may be repeated; default all")
    parser.add_argument("--runs", type=int, help="of the throughput measurement; default 2000")
    parser.add_argument("--repeats", type=int, help="of the throughput measurement; default 3")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default bench/results/<time>-<topology>.json")
    parser.add_argument("--dir", type=Path, help="where the servers keep their data meanwhile; default the temp dir")
    return parser


def _measure(options: argparse.Namespace, directory: Path) -> report.Report:
    only = options.only or MEASUREMENTS
    given = {name: value for name, value in sorted(os.environ.items()) if name.startswith("AGENTQ_")}
    measured = report.Report(options.topology, report.machine(directory), given)
    runs, repeats = options.runs or (100 if options.quick else 2000), options.repeats or (1 if options.quick else 3)
    with serving(directory, options.broker) as servers:
        if "alone" in only or "throughput" in only:
            _with_defaults(servers, options, only, runs, repeats, measured)
        if "in-flight" in only:
            measured.bursts += _in_flight(servers, options, given)
    return measured


def _with_defaults(
    servers: Servers, options: argparse.Namespace, only: Sequence[str], runs: int, repeats: int, measured: report.Report
) -> None:
    with working(servers, options.topology, {}) as system:
        _say("warming up")
        load.burst(system, 50 if options.quick else 300, 0)
        if "alone" in only:
            _say("one run at a time")
            measured.alone = load.alone(system, 20 if options.quick else 200)
        if "throughput" in only:
            _say(f"{runs} at once, {repeats} times")
            measured.bursts.append([load.burst(system, runs, 0) for _ in range(repeats)])


def _in_flight(servers: Servers, options: argparse.Namespace, given: Mapping[str, str]) -> list[list[load.Burst]]:
    with working(servers, options.topology, {**IN_FLIGHT, **given}) as system:
        _say("warming up")
        load.burst(system, 50 if options.quick else 300, 0)
        bursts = []
        for runs in [50] if options.quick else [1000, 5000]:
            _say(f"{runs} in flight at 1 s a call")
            bursts.append([load.burst(system, runs, 1000)])
        return bursts


def _say(what: str) -> None:
    print(f"bench: {what} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
