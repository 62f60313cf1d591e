"""``agentq batch jobs``: what waits at a provider's batch endpoint, and what came of it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from agentq.cli.batch_watch import span
from agentq.cli.connect import data_dir_option, open_store
from agentq.cli.table import counted

if TYPE_CHECKING:  # imported when the command runs, so that --help stays quick
    from datetime import datetime

    from schemas.job import JobDoc


@click.command(help="List the latest jobs of providers' batch endpoints, newest first.")
@data_dir_option
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 1_000))
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def jobs(data_dir: Path | None, limit: int, as_json: bool) -> None:
    """Reads MongoDB only."""

    async def work() -> None:
        async with open_store(data_dir) as store:
            found = await store.jobs.latest(limit)
            if not found and not as_json:
                click.echo("No jobs yet. Calls of batches with a window (--complete-by) may become some.")
            for job in found:
                click.echo(json.dumps(job, default=str) if as_json else describe_job(job, store.now()))

    asyncio.run(work())


def describe_job(job: JobDoc, now: datetime) -> str:
    """A job on one line."""
    told = [f"{job['_id']}  {job['status']:<10}  {job['endpoint']}  {counted(job['calls'], 'call')}"]
    if "sent_at" in job:
        took = (job.get("ended_at", now) - job["sent_at"]).total_seconds()
        told.append(f"{'took' if 'ended_at' in job else 'handed in since'} {span(took)}")
    if job["status"] == "done" and job["calls"]:
        told.append(f"{job['answered']:,} answered, ${job['cost_nano_usd'] / 1e9:.6f}")
    if job["error"] is not None:
        told.append(job["error"])
    return ", ".join(told)
