"""``agentq up``: everything on this machine, in the foreground."""

from __future__ import annotations

import shlex
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import click

from agentq.cli.connect import data_dir_option, settings_for
from agentq.embedded.stack import Stack

_PORT = click.IntRange(0, 65535)


@click.command()
@click.option(
    "--app",
    "app_dir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Directory of your agents, tools and workflows [AGENTQ_APP_DIR].",
)
@data_dir_option
@click.option("--redis-port", type=_PORT, help="Port of the embedded Redis; 0 picks a free one.")
@click.option("--mongo-port", type=_PORT, help="Port of the embedded MongoDB; 0 picks a free one.")
@click.option("--model-port", type=_PORT, help="Port of the offline model server; 0 picks a free one.")
@click.option("--flower-port", type=_PORT, help="Port of Flower; 0 picks a free one.")
@click.option("--no-flower", is_flag=True, help="Do not start Flower.")
@click.option(
    "--scenario",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Faults and delays for the offline model server to act out.",
)
def up(
    app_dir: Path | None,
    data_dir: Path | None,
    redis_port: int | None,
    mongo_port: int | None,
    model_port: int | None,
    flower_port: int | None,
    no_flower: bool,
    scenario: Path | None,
) -> None:
    """Start Redis, MongoDB, the model server, the worker pools, the scheduler and Flower; Ctrl-C stops all of it.

    What AGENTQ_BROKER_URL or AGENTQ_MONGO_URL names is used instead of the embedded server; a provider's key or base
    URL replaces the offline model server. Data stays in the data directory and is found again by the next `agentq up`.
    """
    settings = settings_for(
        data_dir,
        app_dir=app_dir,
        redis_port=redis_port,
        mongo_port=mongo_port,
        model_port=model_port,
        flower_port=flower_port,
        flower=False if no_flower else None,
    )
    began = time.monotonic()

    def when_ready(stack: Stack) -> None:
        click.secho(f"agentq is ready after {time.monotonic() - began:.1f} s. Ctrl-C stops it.", bold=True)
        if "flower_url" in stack.settings:
            click.echo(f"  queues   {stack.settings['flower_url']}")
        click.echo(f"  data     {settings.data_dir.resolve()}")
        if data_dir is not None:
            click.echo(f"  first    export AGENTQ_DATA_DIR={shlex.quote(str(settings.data_dir.resolve()))}")
        click.echo('  try      agentq submit "..."   agentq runs   agentq doctor')

    stack = Stack(settings, scenario=scenario, report=click.echo)
    # In a thread: a signal handler runs in the main thread, and would block for ever on an event that the main thread
    # is just looking at.
    with stop_signals() as (stop, hard), ThreadPoolExecutor(1, "agentq-up") as thread:
        thread.submit(stack.run, stop, hard, when_ready).result()
    click.echo("stopped")


@contextmanager
def stop_signals() -> Iterator[tuple[threading.Event, threading.Event]]:
    """Two events: the first Ctrl-C (or SIGTERM, SIGHUP) sets ``stop``, the second one ``hard``."""
    stop, hard = threading.Event(), threading.Event()

    def handler(_number: int, _frame: FrameType | None) -> None:
        (hard if stop.is_set() else stop).set()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # started with nohup, it is to outlive its terminal
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield stop, hard
    finally:
        for number, old in before.items():
            signal.signal(number, old)
