"""``agentq audit verify``: does the audit trail prove what happened?"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import click

from agentq.cli.connect import data_dir_option, open_store
from agentq.engine.audit import check

if TYPE_CHECKING:
    from agentq.store.mongo import MongoStore


@click.group(help="The tamper-evident audit trail.")
def audit() -> None:
    """Group of the audit commands."""


@audit.command(help="Check every run's audit chain (or one run's): any edit, deletion, insertion, reordering shows.")
@data_dir_option
@click.argument("run_id", required=False)
def verify(data_dir: Path | None, run_id: str | None) -> None:
    """Exit 0 if every chain is whole, 1 if not."""
    runs, events, broken = asyncio.run(_verify(data_dir, run_id))
    if run_id is not None and runs == 0:
        click.echo(f"There is no run {run_id!r}. 'agentq runs' lists the latest.", err=True)
        raise SystemExit(2)
    if broken:
        click.echo(f"audit: {broken} of {runs} runs are NOT intact (see above)")
        raise SystemExit(1)
    click.echo(f"audit: {runs} runs, {events} events: every chain is whole and unchanged")


async def _verify(data_dir: Path | None, run_id: str | None) -> tuple[int, int, int]:
    runs = events = broken = 0
    async with open_store(data_dir) as store:
        async for name, head, chain in store.chains():
            if run_id is not None and name != run_id:
                continue
            runs, events = runs + 1, events + len(chain)
            problems = ["its run is gone, its events are still there"] if head is None else check(name, head, chain)
            if problems and head is not None:  # it may have moved between the two reads
                problems = await _look_again(store, name)
            broken += bool(problems)
            for problem in problems:
                click.echo(f"{name}: {problem}")
    return runs, events, broken


async def _look_again(store: MongoStore, run_id: str) -> list[str]:
    """Check one run on its own: first the run, then what has been copied, so that nothing can be missed."""
    run = await store.load(run_id)
    if run is None:
        return ["its run is gone, its events are still there"]
    events = {event["seq"]: event for event in run["events"]}
    events |= {event["seq"]: event async for event in store.audit_events(run_id) if event["seq"] <= run["audit"]["seq"]}
    return check(run_id, run["audit"], [events[seq] for seq in sorted(events)])
