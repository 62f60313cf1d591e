"""``agentq batch submit --dry-run``: what is in the file, and what it will take."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from itertools import islice
from typing import TYPE_CHECKING, BinaryIO

import click

from agentq.batch import preflight
from agentq.batch.estimate import history
from agentq.batch.lines import Bad, Defaults, Good
from agentq.batch.submit import Ids, Order, defaults_for, digest, lines_of, new_batch, submit_lines
from agentq.cli.batch_watch import span, watch_batch
from agentq.cli.table import counted
from agentq.engine.joining import part_of_price

if TYPE_CHECKING:
    from agentq.store.mongo import MongoStore


async def dry_run(store: MongoStore, file: BinaryIO, order: Order, sample: int | None, as_json: bool) -> int:
    """Print what a submission would be. 0, or 1 where no line is good or the sample did not run through."""
    defaults = await defaults_for(store.batches, order)
    checked = await asyncio.to_thread(preflight.check, file, defaults)
    if sample is not None and checked.good:
        await _run_sample(store, file, order, defaults, sample)
    found = [
        preflight.forecast(name, checked, history(await store.batches.history(name)))
        for name in sorted(checked.workflows)
    ]
    parts = {one.workflow: await _part_of_price(store, order, defaults, one.workflow) for one in found}
    if as_json:
        bad = [line.as_error() for line in checked.first_bad]
        facts = {
            "good": checked.good,
            "bad": checked.bad,
            "first_bad": bad,
            "workflows": [asdict(one) | {"part_of_price": parts[one.workflow]} for one in found],
        }
        click.echo(json.dumps(facts))
    else:
        for line in report(checked, found, parts):
            click.echo(line)
    return 0 if checked.good else 1


async def _part_of_price(store: MongoStore, order: Order, defaults: Defaults, workflow: str) -> float | None:
    """What part of the price the order's window may leave of it, see ``agentq.engine.joining``."""
    if order.complete_by is None or order.live:
        return None
    bundle = await store.bundle(defaults.workflows[workflow]["hash"])
    return part_of_price(bundle.models.values(), order.complete_by - store.now()) if bundle is not None else None


def report(
    checked: preflight.Checked, found: list[preflight.Forecast], parts: Mapping[str, float | None]
) -> Iterator[str]:
    """For people."""
    count = checked.good + checked.bad
    if not count:
        yield "There is no line in the file. Write one JSON object a line. Nothing was submitted."
        return
    yield f"{counted(count, 'line')}: {checked.good:,} good, {checked.bad:,} bad. Nothing was submitted."
    for bad in checked.first_bad:
        yield f"  line {bad.line}: {bad.code}: {bad.message} {bad.hint}"
    if checked.bad > len(checked.first_bad):
        yield f"  and {checked.bad - len(checked.first_bad):,} more"
    for one in found:
        yield f"{one.workflow}: {counted(one.lines, 'request')}"
        known = one.history
        if known is None or one.low is None or one.expected is None or one.high is None or one.seconds is None:
            yield f"  tokens  about {one.input_tokens:,} in the requests; what the workflow adds to them is not known"
            yield "  cost    not known: no run of this workflow has ended yet; --sample 10 runs ten lines to find out"
            continue
        yield f"  tokens  about {one.input_tokens:,} in and {one.output_tokens:,} out"
        yield (
            f"  cost    about ${one.expected / 1e9:.6f}: from ${one.low / 1e9:.6f} (P50, ${known.cost_p50 / 1e9:.6f} a "
            f"line) to ${one.high / 1e9:.6f} (P90, ${known.cost_p90 / 1e9:.6f} a line)"
        )
        if (part := parts[one.workflow]) is not None:
            least = f"down to ${one.expected * part / 1e9:.6f}" if part < 1 else "some at a part of the price"
            yield f"  window  calls may wait for the provider's batch endpoint, {least}; --live makes them at once"
        pace = f"at {known.rate:.1f} lines/s, the best rate of late" if known.rate else "one line after the other"
        yield f"  time    about {span(one.seconds)} {pace}"
        yield f"  from    {counted(known.runs, 'earlier run')} of this workflow"


async def _run_sample(store: MongoStore, file: BinaryIO, order: Order, defaults: Defaults, count: int) -> None:
    """Run the first good lines as a batch of their own. They are paid for, and run again in the real batch."""
    ids = Ids()

    def lines(pinned: dict[str, object]) -> Iterable[Good | Bad]:
        file.seek(0)
        every = lines_of(file, replace(defaults, workflows=pinned), ids)  # type: ignore[arg-type]
        return islice((line for line in every if isinstance(line, Good)), count)

    try:
        source = {**digest(file, "a sample"), "bytes": 0}
        once = replace(order, again=os.urandom(8).hex(), priority="standard", complete_by=None, budget_nano_usd=None)
        batch = new_batch(once, source, "agentq", list(defaults.workflows.values()), store.now())  # type: ignore[arg-type]
        done = await submit_lines(store.batches, store.now, batch, lines)
    finally:
        ids.close()
    sampled = counted(done.batch["submitted"]["good"], "line")
    click.echo(f"a sample of {sampled} runs first: {done.batch['_id']}", err=True)
    await watch_batch(store, done.batch["_id"], err=True)
