"""How a batch goes: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import click

from agentq.batch.estimate import forecast
from agentq.batch.output import paused_by
from agentq.cli.table import counted
from agentq.engine.tally import lost_estimate
from schemas.batch import ENDED, BatchDoc
from schemas.job import JobDoc

if TYPE_CHECKING:
    from agentq.store.mongo import MongoStore

POLL_S = 0.5
PLAIN_EVERY_S = 5.0
RATE_OVER_S = 30.0


class Pace:
    """Lines a second over the last half minute."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def rate(self, at_s: float, entries: int) -> float | None:
        """None until there are two seconds to judge by."""
        self._seen.append((at_s, entries))
        while at_s - self._seen[0][0] > RATE_OVER_S:
            self._seen.popleft()
        since, before = self._seen[0]
        return (entries - before) / (at_s - since) if at_s - since >= 2 and entries > before else None


def headline(
    batch: BatchDoc,
    in_flight: int,
    now: datetime,
    rate: float | None = None,
    jobs: Sequence[JobDoc] = (),
    held: int = 0,
) -> str:
    """Everything that moves, on one line. ``jobs``: where its calls wait at a provider; ``held``: lines that wait for
    a time of their own. With either, no rate says when it is done."""
    counts, likely = batch["counts"], forecast(batch, now, rate)
    total = "? lines" if batch["total"] is None else counted(batch["total"], "line")
    failed = batch["entries"] - counts["succeeded"]
    told = [f"{batch['entries']:,} of {total}", f"{failed:,} failed", f"{in_flight:,} in flight"]
    going = batch["live"] and batch["ending"] is None
    moving = going and paused_by(batch) is None and not jobs
    if jobs:
        told.append(_at_providers(jobs, now))
    if held:
        told.append(f"{held:,} not before {'its' if held == 1 else 'their'} time")
    if likely.rate is not None and moving:
        told.append(f"{likely.rate:.1f}/s")
    told.append(f"${batch['cost_nano_usd'] / 1e9:.6f} so far")
    if likely.cost is not None and going:
        told.append(f"about ${likely.cost / 1e9:.6f} in all")
    if likely.seconds_left is not None and moving and not held:
        told.append(f"done in about {span(likely.seconds_left)}")
    return ", ".join(told)


def _at_providers(jobs: Sequence[JobDoc], now: datetime) -> str:
    """What waits for jobs of a provider's batch endpoint; they may hold lines of other batches too."""
    calls, oldest = sum(job["calls"] for job in jobs), min(job.get("sent_at", now) for job in jobs)
    noun = "a job" if len(jobs) == 1 else f"{len(jobs)} jobs"
    return f"{noun} of {counted(calls, 'call')} at the provider for {span((now - oldest).total_seconds())}"


def span(seconds: float) -> str:
    """A length of time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5_400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} d"


def state(batch: BatchDoc) -> str:
    """Its status, and why it does not move."""
    by = paused_by(batch)
    return batch["status"] if by is None else f"{batch['status']}, paused ({by})"


def advice(batch: BatchDoc) -> str | None:
    """What a person may have to do."""
    if batch["error"] is not None:
        return f"{batch['error']['message']} {batch['error']['hint']}"
    if batch["live"]:
        return _advice_while_live(batch)
    if batch["entries"] == batch["counts"]["succeeded"]:
        return None
    why = f"'agentq batch results {batch['_id']} --only errors' says why"
    if batch["entries"] > batch["counts"]["succeeded"] + batch["counts"]["bad"]:
        return f"{why}; 'agentq batch retry {batch['_id']}' hands in again what could be read."
    return f"{why}."


def _advice_while_live(batch: BatchDoc) -> str | None:
    if batch["status"] == "validating":
        return "Not all of its lines are on disk yet: nothing runs. Submitting the same file again goes on."
    by = paused_by(batch)
    if by is None:
        return None
    if by == "person":
        return f"'agentq batch resume {batch['_id']}' goes on."
    return (
        f"The budget of ${(batch['budget_nano_usd'] or 0) / 1e9:g} has no room for another line. "
        f"'agentq batch budget {batch['_id']} USD' raises it and goes on."
    )


def describe(batch: BatchDoc, in_flight: int, now: datetime, jobs: Sequence[JobDoc] = (), held: int = 0) -> list[str]:
    """A batch in a few lines. ``jobs`` and ``held`` as in ``headline``."""
    counts = ", ".join(f"{count:,} {name}" for name, count in batch["counts"].items() if count)
    submitted = batch["submitted"]
    lines = [
        f"batch     {batch['_id']}  {state(batch)}",
        f"file      {batch['source']['name']}, {counted(submitted['good'], 'request')}, "
        f"{counted(submitted['bad'], 'bad line')}",
        f"for       tenant {batch['tenant']}, workflow {batch['workflow']}, priority {batch['priority']}",
        f"times     {_times(batch)} UTC",
        f"progress  {headline(batch, in_flight, now, jobs=jobs, held=held)}",
        f"ended     {counts or 'none'}",
    ]
    if batch["waste_nano_usd"]:
        lines.append(f"waste     ${batch['waste_nano_usd'] / 1e9:.6f} of the cost, for answers that nobody could use")
    if lost := batch["usage"].get("lost_llm_calls", 0):
        about = lost_estimate(batch) / 1e9
        died = "1 call died with its worker" if lost == 1 else f"{lost:,} calls died with their workers"
        lines.append(f"lost      {died}; if paid, about ${about:.6f} more than the cost")
    if batch["budget_nano_usd"] is not None:
        lines.append(f"budget    ${batch['budget_nano_usd'] / 1e9:g}")
    if batch["complete_by"] is not None:
        lines.append(f"window    until {batch['complete_by']:%Y-%m-%d %H:%M:%S} UTC")
    if batch["retry_of"] is not None:
        lines.append(f"retry of  {batch['retry_of']}")
    return lines + ([advised] if (advised := advice(batch)) else [])


def _times(batch: BatchDoc) -> str:
    """Lines may start when all of them are on disk."""
    passed = {
        "created": batch["created_at"],
        "started": batch["at"].get("in_progress"),
        "ended": None if batch["live"] else batch["at"].get(batch["status"]),
    }
    return ", ".join(f"{what} {at:%Y-%m-%d %H:%M:%S}" for what, at in passed.items() if at is not None)


async def watch_batch(store: MongoStore, batch_id: str, *, err: bool = False) -> int:
    """Until it has ended, or its budget stops it. 0 when it completed. ``err``: on standard error."""
    show = _Bar(err) if (sys.stderr if err else sys.stdout).isatty() else _Plain(err)
    pace, said = Pace(), False
    with show:
        while True:
            batch = await store.batches.load(batch_id)
            assert batch is not None, "batches are never removed"
            in_flight = await store.batches.in_flight(batch_id) if batch["live"] else 0
            by = paused_by(batch)
            over = batch["status"] in ENDED or by == "budget"
            jobs = await store.jobs.of_batch(batch_id) if batch["live"] else []
            rate = pace.rate(time.monotonic(), batch["entries"])
            held = await store.batches.held(batch) if batch["live"] else 0
            show.update(batch, headline(batch, in_flight, store.now(), rate, jobs, held), over)
            if over:
                break
            if by == "person" and not said:  # nothing more will come until somebody acts
                show.say(advice(batch) or "")
            said = by == "person"
            await asyncio.sleep(POLL_S)
    click.echo(f"{batch_id}: {state(batch)}", err=err)
    if advised := advice(batch):
        click.echo(advised, err=err)
    return 0 if batch["status"] == "completed" else 1


class _Plain:
    """A line when something has changed, every few seconds at most, and the last one."""

    def __init__(self, err: bool) -> None:
        self._err = err
        self._said = ""
        self._at = -PLAIN_EVERY_S

    def __enter__(self) -> None:
        """Nothing to open."""

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def update(self, batch: BatchDoc, text: str, last: bool) -> None:
        line, at = f"{state(batch)}: {text}", time.monotonic()
        if line != self._said and (last or at - self._at >= PLAIN_EVERY_S):
            click.echo(line, err=self._err)
            self._said, self._at = line, at

    def say(self, text: str) -> None:
        click.echo(text, err=self._err)


class _Bar:
    """One bar that is drawn over and over."""

    def __init__(self, err: bool) -> None:
        from rich.console import Console  # noqa: PLC0415 - only where there is a terminal
        from rich.progress import BarColumn, Progress, TextColumn  # noqa: PLC0415

        columns = TextColumn("{task.fields[state]}"), BarColumn(bar_width=None), TextColumn("{task.description}")
        self._progress = Progress(*columns, console=Console(stderr=err))
        self._task = self._progress.add_task("", total=None, state="")

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, batch: BatchDoc, text: str, last: bool) -> None:  # noqa: ARG002 - as _Plain
        self._progress.update(
            self._task, completed=batch["entries"], total=batch["total"], description=text, state=state(batch)
        )

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)
