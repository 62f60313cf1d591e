"""``agentq dlq``: runs that failed for good, steps of which nobody knows whether they happened, refused requests."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agentq.cli.connect import data_dir_option, open_client
from agentq.cli.dlq_edit import edit, to_yaml
from agentq.cli.letters import MOST, chosen, confirm, facts_of, filters, kind_of, retried, seek
from agentq.cli.repair import operating
from agentq.cli.table import one_line, print_table, span

if TYPE_CHECKING:
    from agentq.runtime.operator import Kind, Wave
    from schemas.run import RunDoc


@click.group(help="Dead letters: runs that failed for good, steps that wait for a person, requests that were refused.")
def dlq() -> None:
    """Group of the dead-letter commands."""


@dlq.command(name="list", help="List them, newest first.")
@data_dir_option
@filters
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, MOST))
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def list_(data_dir: Path | None, limit: int, as_json: bool, **which: Any) -> None:
    """Reads MongoDB only."""
    found = asyncio.run(seek(data_dir, limit, which))
    rows = [("run", "kind", "workflow", "age", "code", "step", "what")]
    for kind, run in found:
        facts = facts_of(kind, run)
        if as_json:
            click.echo(json.dumps(facts))
        age = span((datetime.now(UTC) - (run["ended_at"] or run["created_at"])).total_seconds())
        rows.append((run["_id"], kind, facts["workflow"] or "-", age, facts["code"], facts["step"],
                     one_line(facts["message"], 80)))  # fmt: skip
    if not as_json:
        if found:
            print_table(rows)
        click.echo("no dead letters" if not found else "next: agentq dlq show RUN", err=bool(found))


@dlq.command(help="Show one: its cause, what is kept of it, what can be done.")
@data_dir_option
@click.argument("run_id")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(data_dir: Path | None, run_id: str, as_json: bool) -> None:
    """Reads MongoDB only."""

    async def read() -> tuple[RunDoc, Kind, dict[str, Any]]:
        async with operating(data_dir) as operator:
            run = await operator.load_letter(run_id)
            kind = kind_of(run)
            return run, kind, await operator.editable(run) if kind == "quarantined" else {}

    run, kind, editable = asyncio.run(read())
    kept: Any = run.get("quarantine") if kind == "quarantined" else run.get("refused") if kind == "rejected" else None
    if as_json:
        click.echo(json.dumps({**facts_of(kind, run), "kept": kept, "editable": editable}, default=str))
        return
    facts = facts_of(kind, run)
    click.echo(f"run    {run_id}  {kind}, {run['status']}")
    click.echo(f"cause  {facts['code']}: {one_line(facts['message'], 300)}")
    if kind == "rejected":
        _show_refused(run)
    elif kind == "held":
        _show_held(run)
    else:
        _show_quarantined(run, editable)


def _show_refused(run: RunDoc) -> None:
    kept = run["refused"]
    if "body" not in kept:
        click.echo(f"body   not kept: it was no JSON, or too large ({kept['bytes']} bytes, SHA-256 {kept['sha256']})")
    else:
        click.echo(f"body   {kept['bytes']} bytes of JSON:")
        click.echo(_indented(to_yaml(json.loads(kept["body"]))))
        click.echo(f"next   agentq dlq edit {run['_id']}      correct it and hand it in")
    if "run" in kept:
        click.echo(f"       it was handed in again as run {kept['run']}")
    click.echo(f"next   agentq dlq drop {run['_id']}      take it off the list")


def _show_held(run: RunDoc) -> None:
    for key, step in sorted(run["steps"].items()):
        if "held" in step:
            click.echo(f"step   {key}: {step['payload'].get('name', step['kind'])}, called once; did it happen?")
            click.echo(_indented(to_yaml(step["payload"].get("arguments", {}))))
            click.echo(f"next   agentq dlq resolve {run['_id']} --step {key} --result TEXT   it happened")
    click.echo(f"next   agentq dlq retry {run['_id']}     it did not happen: do it again")
    click.echo(f"next   agentq dlq drop {run['_id']}      cancel the run")


def _show_quarantined(run: RunDoc, editable: dict[str, Any]) -> None:
    kept = run["quarantine"]
    if kept["step_id"] is not None and kept["step"] is not None:
        click.echo(f"step   {kept['step_id']}: {kept['step']['kind']}, {kept['step']['attempt']} attempts")
    for key, step in sorted(kept["others"].items()):
        doubt = ", may have taken effect" if key in kept["leased"] else ""
        click.echo(f"open   {key}: {step['payload'].get('name', step['kind'])}{doubt}")
    click.echo("can be edited:")
    click.echo(_indented(to_yaml(editable)))
    click.echo(f"next   agentq dlq retry {run['_id']}     go on where it failed")
    click.echo(f"next   agentq dlq edit {run['_id']}      change something first")


def _indented(text: str) -> str:
    return "\n".join(
        f"       {one_line(line, 500) if line.strip() == line else _kept_indent(line)}" for line in text.split("\n")
    )


def _kept_indent(line: str) -> str:
    inner = line.lstrip(" ")
    return " " * (len(line) - len(inner)) + one_line(inner, 500)


@dlq.command(
    help="Let it go on: a failed run where it failed; a held step because it did not happen; a refused request."
)
@data_dir_option
@click.argument("run_id", required=False)
@click.option("--step", "step_id", help="Of several held steps, this one.")
@click.option("--all", "everything", is_flag=True, help="All dead letters, or all that the filters let through.")
@filters
@click.option("--canary", default=0, type=click.IntRange(0), help="First so many; the others only if these succeed.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="At most so many a second.")
@click.option("--limit", default=MOST, show_default=True, type=click.IntRange(1, MOST), help="At most so many.")
@click.option("--dry-run", is_flag=True, help="Only say which.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def retry(
    data_dir: Path | None, run_id: str | None, step_id: str | None, everything: bool, canary: int, rate: float | None,
    limit: int, dry_run: bool, yes: bool, **which: Any,
) -> None:  # fmt: skip
    """Exit 0 when all were started; 1 when some could not be, or the canaries failed."""
    if run_id is not None:
        click.echo(asyncio.run(_retry_one(data_dir, run_id, step_id, dry_run=dry_run)))
        return
    # Whether a held step has happened is a question about each, and a refused request is refused again as it is.
    found = chosen(data_dir, everything, limit, which, default=["quarantined"])
    if dry_run or not found:
        for kind, run in found:
            click.echo(f"{run['_id']}  {kind}  {facts_of(kind, run)['code']}")
        click.echo(f"{len(found)} would be retried; nothing was changed")
        return
    confirm(f"Retry {len(found)} runs?", yes)
    _print_wave(asyncio.run(_retry_many(data_dir, [run["_id"] for _, run in found], canary, rate)), len(found))


async def _retry_one(data_dir: Path | None, run_id: str, step_id: str | None, *, dry_run: bool) -> str:
    async with operating(data_dir) as operator:
        if dry_run:
            kind = kind_of(await operator.load(run_id))
            return f"{run_id}  {kind}: it would be retried; nothing was changed"
        with open_client(data_dir) as client:
            new_id = await retried(operator, client, run_id, step_id=step_id)
            return f"{run_id}: {(await operator.load(new_id))['status']}" if new_id == run_id else new_id


async def _retry_many(data_dir: Path | None, run_ids: list[str], canary: int, rate: float | None) -> Wave:
    from agentq.runtime.operator import retry_many  # noqa: PLC0415

    async with operating(data_dir) as operator:
        with open_client(data_dir) as client:

            async def again(run_id: str) -> str:
                return await retried(operator, client, run_id)

            async def status(run_id: str) -> str:
                return (await operator.load(run_id))["status"]

            return await retry_many(
                run_ids, again, status, canary=canary, rate_per_s=rate, now=lambda: datetime.now(UTC)
            )


def _print_wave(wave: Wave, count: int) -> None:
    for run_id, why in wave.refused.items():
        click.echo(f"{run_id}: {why}", err=True)
    click.echo(f"{len(wave.started)} of {count} go on, {len(wave.refused)} could not be started")
    if wave.stopped is not None:
        click.echo(f"stopped after the canaries: {wave.stopped}", err=True)
    if wave.refused or wave.stopped is not None:
        raise SystemExit(1)


@dlq.command(help="A held step has happened: say what the model shall see of it.")
@data_dir_option
@click.argument("run_id")
@click.option("--step", "step_id", help="Where several are held.")
@click.option("--result", required=True, metavar="TEXT", help="As if the tool had said it.")
def resolve(data_dir: Path | None, run_id: str, step_id: str | None, result: str) -> None:
    """Exit 0 when the run goes on."""

    async def act() -> str:
        async with operating(data_dir) as operator:
            return (await operator.resolve(run_id, step_id, result))["status"]

    click.echo(f"{run_id}: {asyncio.run(act())}")


@dlq.command(help="Nothing more is to be done: a held run is cancelled, the others are not listed any more.")
@data_dir_option
@click.argument("run_id", required=False)
@click.option("--all", "everything", is_flag=True, help="All dead letters, or all that the filters let through.")
@filters
@click.option("--reason", default="", help="Recorded in the audit trail.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def drop(
    data_dir: Path | None, run_id: str | None, everything: bool, reason: str, yes: bool, **which: Any
) -> None:  # fmt: skip
    """Exit 0 when done."""
    if run_id is None:
        run_ids = [run["_id"] for _, run in chosen(data_dir, everything, MOST, which, ["quarantined", "rejected"])]
        confirm(f"Drop {len(run_ids)} runs?", yes)
    else:
        run_ids = [run_id]

    async def act() -> None:
        async with operating(data_dir) as operator:
            for one in run_ids:
                click.echo(f"{one}: dropped, it has {(await operator.drop(one, reason))['status']}")

    asyncio.run(act())


dlq.add_command(edit)
