"""``agentq audit verify``: does the audit trail prove what happened?"""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from agentq.cli.connect import data_dir_option, open_store
from agentq.engine.audit import check


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
            broken += bool(problems)
            for problem in problems:
                click.echo(f"{name}: {problem}")
    return runs, events, broken
