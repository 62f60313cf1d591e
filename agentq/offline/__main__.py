"""Entry point: ``python -m agentq.offline --host 127.0.0.1 --port 0 --scenario FILE --port-file FILE``."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from pathlib import Path

from agentq.errors import ConfigError
from agentq.offline.faults import Scenario, load_scenario
from agentq.offline.server import start_server


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m agentq.offline", description="An OpenAI- and Anthropic-compatible stand-in without any model."
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one (default)")
    parser.add_argument("--scenario", type=Path, help="YAML file of latencies and failures to inject")
    parser.add_argument("--port-file", type=Path, help="where to write the port, once the server listens")
    return parser.parse_args(argv)


async def _run(arguments: argparse.Namespace, scenario: Scenario) -> None:
    """Listen until SIGTERM or SIGINT; then finish the calls under way (two seconds at most) and stop."""
    stop = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    running = await start_server(host=arguments.host, port=arguments.port, scenario=scenario)
    if arguments.port_file:
        _write_atomically(arguments.port_file, f"{running.port}\n")
    sys.stdout.write(f"offline model server (no language model) listens on {running.url}\n")
    sys.stdout.flush()
    try:
        await stop.wait()
    finally:
        await running.stop()


def _write_atomically(path: Path, text: str) -> None:
    """A reader sees the whole file or none."""
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def main(argv: list[str] | None = None) -> int:
    """Exit 0 after a signal, 2 if the scenario or the address is wrong."""
    arguments = _arguments(argv)
    try:
        scenario = load_scenario(arguments.scenario) if arguments.scenario else Scenario()
        asyncio.run(_run(arguments, scenario))
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"Cannot listen on {arguments.host}:{arguments.port}: {error.strerror}.\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
