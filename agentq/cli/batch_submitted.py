"""What a person is told of a submission: what came of it, and which of the wishes the batch does not follow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from agentq.cli.batch_watch import state
from agentq.cli.table import counted
from schemas.batch import BatchDoc

if TYPE_CHECKING:
    from agentq.batch.submit import Order, Submission


def say_submitted(done: Submission, order: Order) -> None:
    """On standard error; ``say_not_applied`` says the rest."""
    found = done.batch
    good, bad = found["submitted"]["good"], found["submitted"]["bad"]
    click.echo(f"{counted(good, 'request')} and {counted(bad, 'bad line')}, {_what_came_of_it(done, order)}", err=True)
    if found["error"] is not None:
        click.echo(f"failed: {found['error']['message']} {found['error']['hint']}", err=True)
    elif bad:
        nothing = "" if good else "no line is good, so nothing runs; "
        click.echo(f"{nothing}see the bad lines with: agentq batch results {found['_id']} --only errors", err=True)


def _what_came_of_it(done: Submission, order: Order) -> str:
    found = done.batch
    if done.went_on_after is not None:
        return f"went on from line {done.went_on_after + 1:,}, where an earlier submission stood; all on disk now"
    if not done.known:
        return "all on disk"
    before = f"submitted before, {state(found)}"
    if order.retry_of is None:
        return f"{before}; --again makes a new batch of it"
    if not found["live"] and found["entries"] > found["counts"]["succeeded"]:
        return f"{before}; 'agentq batch retry {found['_id']}' hands in again what did not succeed"
    return before


def not_applied(done: Submission, order: Order) -> dict[str, str]:
    """The options of the order that a batch which was there before does not follow, and how it is instead."""
    return _differing(done.batch, order) if done.known else {}


def _differing(batch: BatchDoc, order: Order) -> dict[str, str]:
    found: dict[str, str] = {}
    budget, window = batch["budget_nano_usd"], batch["complete_by"]
    if order.budget_nano_usd is not None and order.budget_nano_usd != budget:
        change = f"; 'agentq batch budget {batch['_id']} USD' changes that" if batch["live"] else ""
        found["--budget"] = f"it has {'no budget' if budget is None else f'${budget / 1e9:g}'}{change}"
    # MongoDB keeps milliseconds; a span is counted from now, so it differs each time it is given
    if order.complete_by is not None and (window is None or abs(order.complete_by - window).total_seconds() >= 1):
        found["--complete-by"] = f"it has {'no window' if window is None else f'until {window:%Y-%m-%d %H:%M:%S} UTC'}"
    if order.notify is not None and order.notify != batch.get("notify"):
        found["--webhook"] = f"{'others are' if batch.get('notify') else 'nobody is'} told of its end"
    if order.live and not batch.get("live_only"):
        found["--live"] = "its calls may wait for a provider's batch endpoint"
    return found


def say_not_applied(batch: BatchDoc, order: Order, options: dict[str, str]) -> None:
    """Which options were not applied, and what to do; on standard error."""
    if not options:
        return
    click.echo("The batch keeps the options of its first submission; not applied:", err=True)
    for option, instead in options.items():
        click.echo(f"  {option}: {instead}", err=True)
    if order.retry_of is None:
        click.echo("Submit with --again for a new batch with these options.", err=True)
    elif batch["live"] and options.keys() - {"--budget"}:
        click.echo(f"Cancel it, then 'agentq batch retry {batch['_id']}' takes new options.", err=True)
