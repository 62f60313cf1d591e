"""``agentq batch``: hand in a file of requests, follow it, steer it, read its results."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import click

from agentq.batch.output import paused_by
from agentq.cli.batch_jobs import jobs
from agentq.cli.connect import data_dir_option, open_store
from agentq.cli.table import counted
from agentq.engine.tally import lost_estimate
from agentq.errors import Conflict, InvalidRequest, NotFound
from agentq.protocol import parse_request

if TYPE_CHECKING:  # imported when a command runs, so that --help stays quick
    from agentq.batch.submit import Order
    from agentq.store.mongo import MongoStore
    from schemas.batch import BatchDoc

_SPAN = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@click.group()
def batch() -> None:
    """Batches: files of requests in, files of results out."""


batch.add_command(jobs)


def order_options(command: Any) -> Any:
    """How a batch is to be done."""
    for option in (
        click.option("--budget", "budget_usd", type=float, help="US dollars; no line starts that could overrun it."),
        click.option("--complete-by", help="When unfinished lines expire: 90m, 24h, 7d, or a time with its offset."),
        click.option("--live", is_flag=True, help="No call waits for a provider's cheaper batch endpoint."),
        click.option("--watch", "watching", is_flag=True, help="Stay, and show how it goes."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    ):
        command = option(command)
    return command


@batch.command(
    help="Hand in a file of requests, one JSON object a line; '-' reads standard input. Prints the batch's id."
)
@data_dir_option
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option("--workflow", default="default", show_default=True, help="For lines that name none.")
@click.option("--tenant", default="default", show_default=True)
@click.option("--priority", type=click.Choice(["interactive", "standard", "batch"]), default="batch", show_default=True)
@click.option("--again", is_flag=True, help="A new batch, even if this file has been submitted before.")
@click.option("--dry-run", is_flag=True, help="Submit nothing: check every line, estimate cost and time.")
@click.option(
    "--sample", type=click.IntRange(1, 1000), help="With --dry-run: run so many lines first, to learn the cost."
)
@click.option("--webhook", metavar="URL", help="Told with a signed POST when the batch has ended.")
@order_options
def submit(
    data_dir: Path | None, file: str, workflow: str, tenant: str, priority: Any, again: bool, dry_run: bool,
    sample: int | None, webhook: str | None, budget_usd: float | None, complete_by: str | None, live: bool,
    watching: bool, as_json: bool,
) -> None:  # fmt: skip
    """Exit 0 when all is on disk (with --watch: when completed), 1 otherwise and where no line is good, 2 where the
    order is wrong."""
    from agentq.batch.submit import Order  # noqa: PLC0415

    if sample is not None and not dry_run:
        raise click.UsageError("--sample goes with --dry-run.")
    order = Order(
        tenant, workflow, priority, _nano_usd(budget_usd), _window(complete_by), os.urandom(8).hex() if again else "",
        notify=None if webhook is None else parse_request({"input": "-", "webhook": {"url": webhook}}).notify,
        live=live,
    )  # fmt: skip

    async def work() -> int:
        with _opened(file) as lines:
            async with open_store(data_dir) as store:
                if dry_run:
                    from agentq.cli.batch_preflight import dry_run as check  # noqa: PLC0415

                    return await check(store, lines, order, sample, as_json)
                return await hand_in(store, lines, Path(file).name, order, watching, as_json)

    raise SystemExit(asyncio.run(work()))


def _opened(file: str) -> BinaryIO:
    """The file, which is read more than once: what comes through a pipe is put into a temporary one."""
    if file == "-":
        return _spooled(sys.stdin.buffer)
    opened = Path(file).open("rb")  # noqa: SIM115 - the caller closes it
    if opened.seekable():
        return opened
    with opened:
        return _spooled(opened)


def _spooled(pipe: BinaryIO) -> BinaryIO:
    spooled = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    while block := pipe.read(1024 * 1024):
        spooled.write(block)
    return cast("BinaryIO", spooled)


async def hand_in(store: MongoStore, lines: BinaryIO, name: str, order: Order, watching: bool, as_json: bool) -> int:
    """Submit, say what came of it, and stay if that is wished. 1 where no line is good."""
    from agentq.batch.submit import submit_file  # noqa: PLC0415
    from agentq.cli.batch_submitted import not_applied, say_not_applied, say_submitted  # noqa: PLC0415
    from agentq.cli.batch_watch import watch_batch  # noqa: PLC0415

    with _Counting() as told:
        done = await submit_file(store.batches, store.now, lines, name, order, told)
    found, unheard = done.batch, not_applied(done, order)
    if as_json:
        facts = {"batch_id": found["_id"], "known": done.known, "not_applied": unheard, **summary(found)}
        click.echo(json.dumps(facts, default=str))
    else:
        click.echo(found["_id"])
        say_submitted(done, order)
    say_not_applied(found, order, unheard)
    if found["status"] == "failed":
        return 1
    code = await watch_batch(store, found["_id"]) if watching else 0
    return code if found["submitted"]["good"] else 1


class _Counting:
    """Says on a terminal how many lines are on disk, while it goes on."""

    def __enter__(self) -> Any:
        self._live = sys.stderr.isatty()
        return self._tell if self._live else lambda _: None

    def _tell(self, submitted: Any) -> None:
        click.echo(f"\r{counted(submitted['good'] + submitted['bad'], 'line')} on disk", nl=False, err=True)

    def __exit__(self, *_: object) -> None:
        if self._live:
            click.echo("\r\x1b[K", nl=False, err=True)


def _window(text: str | None) -> datetime | None:
    if text is None:
        return None
    now = datetime.now(UTC)
    try:
        if span := _SPAN.fullmatch(text):
            moment = now + timedelta(seconds=float(span[1]) * _SECONDS[span[2]])
        else:
            moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            raise _no_window(text, "has no offset from UTC", f"Add the offset: {moment.isoformat()}+00:00 is UTC.")
        moment = moment.astimezone(UTC)
    except ValueError:
        raise _no_window(text, "is neither a span nor a time") from None
    except OverflowError:
        raise _no_window(text, "is too far away") from None
    if moment <= now:
        raise _no_window(text, "is no time to come", f"It is {now:%Y-%m-%dT%H:%M:%S}+00:00 now.")
    return moment


def _no_window(text: str, why: str, hint: str = "") -> InvalidRequest:
    write = "Write 90m, 24h or 7d, or a time with its offset: 2026-12-01T09:00:00+01:00."
    return InvalidRequest(f"--complete-by {text!r} {why}.", code="invalid_value", hint=hint or write)


def _nano_usd(usd: float | None) -> int | None:
    if usd is None:
        return None
    if not 0 < usd <= 1_000_000_000:
        raise InvalidRequest(
            f"A budget of {usd} US dollars is none.", code="invalid_value", hint="Use a number above 0, such as 20."
        )
    return round(usd * 1e9)


# -- one batch --------------------------------------------------------------------------------------------------------


def run_with_store(data_dir: Path | None, work: Any) -> Any:
    """Run ``work(store)`` in an event loop."""

    async def run() -> Any:
        async with open_store(data_dir) as store:
            return await work(store)

    return asyncio.run(run())


async def found_batch(store: MongoStore, batch_id: str) -> BatchDoc:
    """Raises ``NotFound``."""
    found = await store.batches.load(batch_id)
    if found is None:
        raise NotFound(f"There is no batch {batch_id!r}.", hint="'agentq batch list' lists the latest.")
    return found


def summary(found: BatchDoc) -> dict[str, Any]:
    """What a program wants to know."""
    return {
        "status": found["status"],
        "total": found["total"],
        "ended": found["entries"],
        "counts": found["counts"],
        "cost_nano_usd": found["cost_nano_usd"],
        "cost_usd": found["cost_nano_usd"] / 1e9,
        "lost_llm_calls": found["usage"].get("lost_llm_calls", 0),
        "lost_usd_about": lost_estimate(found) / 1e9,
        "budget_usd": None if found["budget_nano_usd"] is None else found["budget_nano_usd"] / 1e9,
        "paused": paused_by(found),
        "complete_by": found["complete_by"],
        "retry_of": found["retry_of"],
        "file": found["source"]["name"],
    }


@batch.command(help="Show one batch.")
@data_dir_option
@click.argument("batch_id")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--openai", is_flag=True, help="As OpenAI's API describes a batch.")
def status(data_dir: Path | None, batch_id: str, as_json: bool, openai: bool) -> None:
    """Reads MongoDB only."""
    from agentq.batch.output import of_batch  # noqa: PLC0415
    from agentq.cli.batch_watch import describe  # noqa: PLC0415

    async def work(store: MongoStore) -> None:
        found = await found_batch(store, batch_id)
        if openai:
            click.echo(json.dumps(of_batch(found)))
        elif as_json:
            click.echo(json.dumps({"batch_id": found["_id"], **summary(found), "at": found["at"]}, default=str))
        else:
            at_providers = await store.jobs.of_batch(batch_id) if found["live"] else []
            in_flight, held = await store.batches.in_flight(batch_id), await store.batches.held(found)
            for line in describe(found, in_flight, store.now(), at_providers, held):
                click.echo(line)

    run_with_store(data_dir, work)


@batch.command("list", help="List the latest batches, newest first.")
@data_dir_option
@click.option("--tenant", help="Only batches of this tenant.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 1_000))
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def list_(data_dir: Path | None, tenant: str | None, limit: int, as_json: bool) -> None:
    """Reads MongoDB only."""

    async def work(store: MongoStore) -> None:
        found = await store.batches.latest({} if tenant is None else {"tenant": tenant}, limit)
        if not found and not as_json:
            whose = "" if tenant is None else f" of tenant {tenant!r}"
            click.echo(f"No batches{whose} yet. Hand one in with: agentq batch submit requests.jsonl")
        for one in found:
            if as_json:
                click.echo(json.dumps({"batch_id": one["_id"], **summary(one)}, default=str))
                continue
            total = "? lines" if one["total"] is None else counted(one["total"], "line")
            state = f"paused ({by})" if (by := paused_by(one)) else one["status"]
            click.echo(
                f"{one['_id']}  {state:18s}  {one['entries']:,}/{total}  ${one['cost_nano_usd'] / 1e9:.6f}  "
                f"{one['created_at']:%Y-%m-%d %H:%M}  {one['source']['name']}"
            )

    run_with_store(data_dir, work)


@batch.command(help="Show how a batch goes, until it has ended. Exit 0 when it completed, else 1.")
@data_dir_option
@click.argument("batch_id")
def watch(data_dir: Path | None, batch_id: str) -> None:
    """A live bar on a terminal, plain lines elsewhere."""
    from agentq.cli.batch_watch import watch_batch  # noqa: PLC0415

    async def work(store: MongoStore) -> int:
        await found_batch(store, batch_id)
        return await watch_batch(store, batch_id)

    raise SystemExit(run_with_store(data_dir, work))


@batch.command(help="Start no more lines; those under way are finished.")
@data_dir_option
@click.argument("batch_id")
def pause(data_dir: Path | None, batch_id: str) -> None:
    """Safe to repeat."""

    async def work(store: MongoStore) -> None:
        if await store.batches.pause(batch_id, {"by": "person", "at": store.now()}) is None:
            _refuse_unless_live(await found_batch(store, batch_id), "pause")

    run_with_store(data_dir, work)
    click.echo(f"{batch_id}: paused; 'agentq batch resume {batch_id}' goes on")


@batch.command(help="Go on with a paused batch.")
@data_dir_option
@click.argument("batch_id")
def resume(data_dir: Path | None, batch_id: str) -> None:
    """Safe to repeat; refused where the budget has no room for another line."""

    async def work(store: MongoStore) -> None:
        from agentq.engine.tally import slots  # noqa: PLC0415

        found = await found_batch(store, batch_id)
        _refuse_unless_live(found, "resume")
        going: BatchDoc = {**found, "paused": None}
        if found["status"] == "in_progress" and slots(going, 0) == 0:
            raise Conflict(
                f"The budget of batch {batch_id} has no room for another line.",
                hint=f"Raise it: agentq batch budget {batch_id} USD.",
            )
        await store.batches.pause(batch_id, None)

    run_with_store(data_dir, work)
    click.echo(f"{batch_id}: goes on")


def _refuse_unless_live(found: BatchDoc, act: str) -> None:
    if found["status"] not in ("validating", "in_progress"):
        raise Conflict(f"Batch {found['_id']} is {found['status']}.", hint=f"There is nothing to {act}.")


@batch.command(help="Change what a batch may cost, in US dollars; a batch that its budget stopped goes on.")
@data_dir_option
@click.argument("batch_id")
@click.argument("usd", type=float)
def budget(data_dir: Path | None, batch_id: str, usd: float) -> None:
    """Safe to repeat."""

    async def work(store: MongoStore) -> None:
        nano_usd, rests = _nano_usd(usd), ""
        assert nano_usd is not None
        changed = await store.batches.set_budget(batch_id, nano_usd)
        if changed is None:
            _refuse_unless_live(await found_batch(store, batch_id), "spend on")
        elif paused_by(changed) is not None:
            rests = f"; it is paused, 'agentq batch resume {batch_id}' goes on"
        click.echo(f"{batch_id}: may cost ${usd:g}{rests}")

    run_with_store(data_dir, work)


@batch.command(help="Cancel a batch: what waits ends at once, what is under way as soon as its step ends.")
@data_dir_option
@click.argument("batch_id")
def cancel(data_dir: Path | None, batch_id: str) -> None:
    """Exit 0 when asked; 2 when it has already ended or expires."""

    async def work(store: MongoStore) -> None:
        asked = await store.batches.move(batch_id, ["validating", "in_progress"], "cancelling", ending="cancelled")
        if asked is None and (found := await found_batch(store, batch_id))["status"] not in ("cancelling", "cancelled"):
            _refuse_unless_live(found, "cancel")

    run_with_store(data_dir, work)
    click.echo(f"{batch_id}: cancellation requested")


@batch.command(help="Hand in the lines of an ended batch that did not succeed, as a new batch. Prints its id.")
@data_dir_option
@click.argument("batch_id")
@order_options
def retry(
    data_dir: Path | None,
    batch_id: str,
    budget_usd: float | None,
    complete_by: str | None,
    live: bool,
    watching: bool,
    as_json: bool,
) -> None:
    """Safe to repeat: the same lines are the same new batch."""
    from agentq.batch.retry import write_failed  # noqa: PLC0415
    from agentq.batch.submit import Order  # noqa: PLC0415

    async def work(store: MongoStore) -> int:
        found = await found_batch(store, batch_id)
        order = Order(
            found["tenant"], found["workflow"], found["priority"], _nano_usd(budget_usd), _window(complete_by),
            retry_of=batch_id, form=found["format"], live=live,
        )  # fmt: skip
        with tempfile.TemporaryFile() as lines:
            await write_failed(store.batches, found, cast("BinaryIO", lines))
            return await hand_in(store, cast("BinaryIO", lines), found["source"]["name"], order, watching, as_json)

    raise SystemExit(run_with_store(data_dir, work))


@batch.command(help="Print the results and errors of a batch, one JSON object a line.")
@data_dir_option
@click.argument("batch_id")
@click.option(
    "--format", "form", type=click.Choice(["agentq", "openai"]), help="By default, that of the submitted file."
)
@click.option("--only", type=click.Choice(["results", "errors"]), help="By default both.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Results go to this file; with --cursor, at its end.",
)
@click.option("--errors", type=click.Path(path_type=Path, dir_okay=False), help="Errors go to this file; likewise.")
@click.option("--follow", is_flag=True, help="Print what has ended, then what ends, until the batch has ended.")
@click.option("--cursor", help="Only what this reader has not had: a name that the server keeps, or a number.")
def results(data_dir: Path | None, batch_id: str, **wishes: Any) -> None:
    """Each line once: by the order of the file, with --follow or --cursor by the order of their ends."""
    from agentq.cli.batch_results import print_results  # noqa: PLC0415

    async def work(store: MongoStore) -> None:
        await print_results(store, await found_batch(store, batch_id), **wishes)

    run_with_store(data_dir, work)
