"""``agentq limits`` and ``agentq schedule``: who may have how much, and what is handed in again and again."""

from __future__ import annotations

import asyncio
import getpass
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agentq.cli.connect import data_dir_option, open_client, open_store
from agentq.cli.table import one_line, print_table

if TYPE_CHECKING:
    from agentq.store.backlog import Limit
    from agentq.store.limits import Limits

tenant_option = click.option("--tenant", required=True, help="Whose limits.")
key_option = click.option("--key", help="Only for requests with this key of the tenant.")


@asynccontextmanager
async def _open(data_dir: Path | None) -> AsyncIterator[Limits]:
    from agentq.store.limits import Limits  # noqa: PLC0415 - the store is imported when it is used

    async with open_store(data_dir) as store:
        yield Limits(store, getpass.getuser())


def _with(data_dir: Path | None, work: Callable[[Limits], Coroutine[Any, Any, Any]]) -> Any:
    async def run() -> Any:
        async with _open(data_dir) as limits:
            return await work(limits)

    return asyncio.run(run())


def _name(tenant: str, key: str | None) -> str:
    return tenant if key is None else f"{tenant}|{key}"


@click.group(help="How much a tenant, or one key of it, may have; takes effect within two seconds.")
def limits() -> None:
    """Group of the commands about limits."""


@limits.command("set", help="Change some limits; those not named stay. 'none' takes one away.")
@data_dir_option
@tenant_option
@key_option
@click.option("--weight", help="The tenant's share beside the others' (1 if not set), by cost.")
@click.option("--in-flight", help="Runs in flight at a time.")
@click.option("--spend-usd", help="Estimated cost of the runs in flight at a time.")
@click.option("--per-minute", help="Runs admitted in any minute.")
@click.option("--waiting", help="Requests that may wait; more are refused, and told when to come back.")
def set_limits(data_dir: Path | None, tenant: str, key: str | None, **given: str | None) -> None:
    """Exit 0 when that is in force, 2 for a value that means nothing."""
    changes = {
        "weight": _number("--weight", given["weight"], "a number", float),
        "in_flight": _number("--in-flight", given["in_flight"], "a whole number", int),
        "spend": _number("--spend-usd", given["spend_usd"], "a number", lambda text: round(float(text) * 1e9)),
        "per_minute": _number("--per-minute", given["per_minute"], "a whole number", int),
        "waiting": _number("--waiting", given["waiting"], "a whole number", int),
    }
    told = {name: None if value == "none" else value for name, value in changes.items() if value is not None}
    if not told:
        raise click.UsageError("Name at least one limit, e.g. --in-flight 10.")
    if key is not None and "weight" in told:
        raise click.UsageError("Weights are a tenant's: leave --key out.")
    limit, changed = _with(data_dir, lambda limits: limits.set(_name(tenant, key), told))
    _print({_name(tenant, key): limit})
    if not changed:
        click.echo("nothing changed: that was in force already", err=True)


def _number(option: str, text: str | None, what: str, kind: Callable[[str], Any]) -> Any:
    if text is None or text == "none":
        return text
    try:
        return kind(text)
    except (ValueError, OverflowError):
        raise click.UsageError(f"{option}: {text!r} is not {what} (or 'none').") from None


@limits.command("show", help="The limits in force.")
@data_dir_option
@click.option("--history", is_flag=True, help="Every change: when, who, before, after; and whether its chain is whole.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show_limits(data_dir: Path | None, history: bool, as_json: bool) -> None:
    """Exit 0; with --history, 1 if the chain of changes is not whole."""
    if history:
        _print_history(data_dir, as_json)
        return
    found = _with(data_dir, lambda limits: limits.all())
    if as_json:
        click.echo(json.dumps({name: limit._asdict() for name, limit in found.items()}))
    elif found:
        _print(found)
    else:
        click.echo("Nobody has limits: every tenant has weight 1. Set some with: agentq limits set --tenant T ...")


def _print(found: dict[str, Limit]) -> None:
    rows = [("tenant", "key", "weight", "in flight", "spend", "a minute", "waiting")]
    for name, limit in found.items():
        tenant, _, key = name.partition("|")
        spend = "-" if limit.spend is None else f"${limit.spend / 1e9:g}"
        caps = ["-" if one is None else str(one) for one in (limit.in_flight, limit.per_minute, limit.waiting)]
        rows.append((tenant, key or "-", f"{limit.weight:g}", caps[0], spend, caps[1], caps[2]))
    print_table(rows)


def _print_history(data_dir: Path | None, as_json: bool) -> None:
    events, problems = _with(data_dir, lambda limits: limits.history())
    for event in events:
        if as_json:
            click.echo(json.dumps(event))
            continue
        data = event["data"]
        when = datetime.fromtimestamp(event["at_ms"] / 1000, UTC)
        click.echo(f"{when:%Y-%m-%d %H:%M:%S} UTC  {data['by']}  {data['name']}  {data['before']} -> {data['after']}")
    for problem in problems:
        click.echo(f"limits: {problem}", err=True)
    if problems:
        raise SystemExit(1)
    click.echo(f"limits: {len(events)} changes, the chain is whole and unchanged", err=True)


@limits.command("clear", help="Take all limits of a tenant, or of one key of it, away.")
@data_dir_option
@tenant_option
@key_option
def clear_limits(data_dir: Path | None, tenant: str, key: str | None) -> None:
    """Exit 0 when there are none any more, 2 if there were none."""
    _with(data_dir, lambda limits: limits.clear(_name(tenant, key)))
    click.echo(f"{_name(tenant, key).replace('|', ', key ')}: no limits")


@click.group(help="Recurring requests; make one with: agentq submit --cron '30 9 * * MON-FRI' ...")
def schedule() -> None:
    """Group of the commands about recurring requests."""


@schedule.command("list", help="All recurring requests, the next due first.")
@data_dir_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def list_schedules(data_dir: Path | None, as_json: bool) -> None:
    """Reads MongoDB only."""
    with open_client(data_dir) as client:
        found = client.schedules()
    if as_json:
        for doc in found:
            click.echo(json.dumps(doc, default=str))
        return
    rows = [("schedule", "cron", "time zone", "next (UTC)", "last run", "input")]
    for doc in found:
        due = "never" if doc["due"] is None else f"{doc['due']:%Y-%m-%d %H:%M}"
        last = doc["last_run"] or (doc["last_error"] or {}).get("code") or "-"
        rows.append((doc["_id"], doc["cron"], doc["timezone"], due, last, one_line(doc["request"]["input"], 50)))
    if found:
        print_table(rows)
    else:
        click.echo("No recurring requests.")


@schedule.command("drop", help="Hand a recurring request in no more.")
@data_dir_option
@click.argument("schedule_id")
def drop_schedule(data_dir: Path | None, schedule_id: str) -> None:
    """Exit 0 when dropped, 2 if there is none of that id."""
    with open_client(data_dir) as client:
        client.drop_schedule(schedule_id)
    click.echo(f"{schedule_id}: dropped")
