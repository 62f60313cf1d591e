"""From a file to durable runs: streamed, resumable, exact.

What is in the file is the batch, together with tenant, workflow and priority (``submission_key``): submitting it again
(after a crash, or twice at once) goes on where the submission stands and never makes a second one. That rests on three
things: what a line becomes depends only on the line, on the ids before it and on the workflows the batch was pinned to
at its birth; ids of runs follow from batch and line; a chunk of lines and the place to go on from are one transaction.
"""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from typing import Any, BinaryIO, cast

from agentq.batch.estimate import dearest, history
from agentq.batch.lines import Bad, Defaults, Good, parse_line, read_lines
from agentq.canonical import canonical_json, sha256
from agentq.errors import Conflict, InvalidRequest, UnknownWorkflow
from agentq.protocol import Notify, Priority, parse_request
from agentq.run import UNKNOWN_COST, check_times, new_run
from agentq.store.batches import Batches
from schemas.batch import (
    BATCH_FORMAT,
    LINE_ENDS,
    BadLine,
    BatchDoc,
    Estimate,
    LineFormat,
    Source,
    Submitted,
    bad_line_id,
    flow,
    new_batch_id,
    run_id,
)

CHUNK_LINES = 1_000
CHUNK_BYTES = 4 * 1024 * 1024  # of input: lines may be long, and a chunk is held in memory two or three times
Doc = dict[str, Any]
Now = Callable[[], datetime]


@dataclass(frozen=True, slots=True)
class Order:
    """How a batch is to be done. ``again``: a word that makes the same file another batch. ``notify``: who is told
    when it has ended. ``live``: no call waits for a provider's batch endpoint."""

    tenant: str = "default"
    workflow: str = "default"
    priority: Priority = "batch"
    budget_nano_usd: int | None = None
    complete_by: datetime | None = None
    again: str = ""
    retry_of: str | None = None
    form: LineFormat | None = None
    notify: Notify | None = None
    live: bool = False


@dataclass(frozen=True, slots=True)
class Submission:
    """``known``: the batch was there before, with the options of its first submission. ``went_on_after``: the line that
    an earlier submission, which did not come to its end, had got to."""

    batch: BatchDoc
    known: bool
    went_on_after: int | None = None


class Ids:
    """Which line had an id first. A temporary file, deleted when it is closed: memory does not grow with the batch."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._db.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-8192;")
        self._db.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, line INTEGER) WITHOUT ROWID")
        self._db.execute("BEGIN")

    def first(self, custom_id: str, line: int) -> int:
        """The line that had the id first: ``line`` itself if it is new."""
        added = self._db.execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", (custom_id, line)).rowcount
        if added:
            return line
        return cast("int", self._db.execute("SELECT line FROM ids WHERE id = ?", (custom_id,)).fetchone()[0])

    def close(self) -> None:
        self._db.close()


def lines_of(file: BinaryIO, defaults: Defaults, ids: Ids) -> Iterator[Good | Bad]:
    """Every line of a file as a good or a bad one; of lines with the same id the first one counts."""
    for number, raw in read_lines(file):
        yield unique(parse_line(number, raw, defaults), ids)


def unique(line: Good | Bad, ids: Ids) -> Good | Bad:
    """The line, or a bad one where an earlier line has its id."""
    if isinstance(line, Good) and (first := ids.first(line.custom_id, line.line)) != line.line:
        message = f"Line {first} has the id {line.custom_id!r} already."
        return Bad(line.line, line.custom_id, "duplicate_id", message, "Give every line an id of its own.")
    return line


async def submit_file(
    batches: Batches, now: Now, file: BinaryIO, name: str, order: Order,
    on_progress: Callable[[Submitted], None] = lambda _: None,
) -> Submission:  # fmt: skip
    """Hand in the lines of a file that can be read from its start again. Returns once all of them are durable.

    Safe to repeat. Raises ``UnknownWorkflow`` for the order's workflow, ``Conflict`` if the batch is cancelled or
    expires meanwhile, ``Unavailable``; then submitting the file again goes on.
    """
    source = await asyncio.to_thread(digest, file, name)
    defaults = await defaults_for(batches, order)
    form = order.form if order.form is not None else await asyncio.to_thread(format_of, file, defaults)
    batch = new_batch(order, source, form, list(defaults.workflows.values()), now())
    ids = Ids()
    try:
        file.seek(0)
        return await submit_lines(
            batches, now, batch, lambda pinned: lines_of(file, replace(defaults, workflows=pinned), ids), on_progress
        )
    finally:
        ids.close()


async def defaults_for(batches: Batches, order: Order) -> Defaults:
    """What holds for all lines of the order. Raises ``UnknownWorkflow``, ``InvalidRequest``."""
    parse_request({"input": "-", "workflow": order.workflow, "tenant": order.tenant, "priority": order.priority})
    known = {workflow["name"]: workflow for workflow in await batches.workflows()}
    if order.workflow not in known:
        names = f"Known are {', '.join(sorted(known))}." if known else "None is registered: is a worker running?"
        raise UnknownWorkflow(f"There is no workflow {order.workflow!r}.", hint=names)
    return Defaults(known, order.tenant, order.workflow, order.priority)


def digest(file: BinaryIO, name: str) -> Source:
    """What the file is known by: its content, whatever it is called."""
    file.seek(0)
    hashed = hashlib.sha256()
    while block := file.read(1024 * 1024):
        hashed.update(block)
    return {"name": name, "bytes": file.tell(), "sha256": hashed.hexdigest()}


def format_of(file: BinaryIO, defaults: Defaults) -> LineFormat:
    """The format of the first good line, which the results will have too."""
    file.seek(0)
    for number, raw in islice(read_lines(file), 100):
        if isinstance(line := parse_line(number, raw, defaults), Good):
            return line.format
    return "agentq"


def submission_key(order: Order, sha: str) -> str:
    """Two submissions are the same batch if and only if this is the same."""
    return sha256(canonical_json([sha, order.tenant, order.workflow, order.priority, order.again, order.retry_of]))


def new_batch(order: Order, source: Source, form: LineFormat, workflows: list[Any], now: datetime) -> BatchDoc:
    """The document of a batch of which no line is on disk yet."""
    batch: BatchDoc = {
        "_id": new_batch_id(int(now.timestamp() * 1000)),
        "v": BATCH_FORMAT,
        "key": submission_key(order, source["sha256"]),
        "tenant": order.tenant,
        "workflow": order.workflow,
        "priority": order.priority,
        "format": form,
        "source": source,
        "retry_of": order.retry_of,
        "workflows": workflows,
        "status": "validating",
        "live": True,
        "at": {"validating": now},
        "created_at": now,
        "complete_by": order.complete_by,
        "budget_nano_usd": order.budget_nano_usd,
        "estimate": None,
        "paused": None,
        "submitted": {"line": 0, "good": 0, "bad": 0},
        "total": None,
        "entries": 0,
        "counts": dict.fromkeys(LINE_ENDS, 0),
        "usage": {},
        "cost_nano_usd": 0,
        "waste_nano_usd": 0,
        "max_line_nano_usd": 0,
        "ending": None,
        "swept": "",
        "error": None,
    }
    if order.notify:
        batch |= {"notify": order.notify, "told": False}
    if order.live:
        batch["live_only"] = True
    return batch


async def submit_lines(
    batches: Batches, now: Now, batch: BatchDoc, lines: Callable[[Any], Iterable[Good | Bad]],
    on_progress: Callable[[Submitted], None] = lambda _: None,
) -> Submission:  # fmt: skip
    """Store ``lines`` (made for the workflows that the batch is pinned to) as the batch, or go on with it if it is
    known; then it is in progress."""
    stored = await batches.create(batch)
    known = stored["_id"] != batch["_id"]
    if stored["status"] != "validating":
        return Submission(stored, known)
    pinned = {workflow["name"]: workflow for workflow in stored["workflows"]}
    estimates = _Estimates(batches)
    chunks = _chunks(stored, pinned, lines(pinned), now, estimates)
    submitted = stored["submitted"]
    chunk = await asyncio.to_thread(next, chunks, None)
    while chunk is not None:
        coming = asyncio.create_task(asyncio.to_thread(next, chunks, None))  # is made while this one is written
        try:
            submitted = await _store(batches, stored["_id"], chunk, submitted)
            on_progress(submitted)
        finally:
            chunk = await coming
    if submitted["line"] == 0:
        error = {"code": "empty_file", "message": "There is no line in it.", "hint": "Write one JSON object a line."}
        begun = await batches.move(stored["_id"], ["validating"], "failed", error=error)
    else:
        begun = await batches.move(
            stored["_id"], ["validating"], "in_progress", estimate=dearest(estimates.found.values())
        )
    went_on_after = stored["submitted"]["line"] if known else None
    return Submission(begun or await _loaded(batches, stored["_id"]), known, went_on_after)


class _Estimates:
    """What a run of a workflow costs, looked up when a line of it is met: ``found``, None where nothing is known."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._loop = asyncio.get_running_loop()
        self.found: dict[str, Estimate | None] = {}

    def of(self, workflow: str) -> Estimate | None:
        """To be called in the thread that reads the lines, never in the event loop."""
        if workflow not in self.found:
            self.found[workflow] = asyncio.run_coroutine_threadsafe(self._look_up(workflow), self._loop).result()
        return self.found[workflow]

    async def _look_up(self, workflow: str) -> Estimate | None:
        known = history(await self._batches.history(workflow))
        return None if known is None else known.as_estimate()


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Lines that are stored together: the documents of the good ones, and the bad ones."""

    runs: list[Doc]
    bad: list[BadLine]
    last: int


def _chunks(
    batch: BatchDoc, pinned: Any, lines: Iterable[Good | Bad], now: Now, estimates: _Estimates
) -> Iterator[_Chunk]:
    runs: list[Doc] = []
    bad: list[BadLine] = []
    size = 0
    for line in (_in_time(line, batch["created_at"]) for line in lines):
        known = estimates.of(line.request.workflow) if isinstance(line, Good) else None
        if line.line > batch["submitted"]["line"]:
            if isinstance(line, Good):
                cost = UNKNOWN_COST if known is None else known["p50_nano_usd"]
                runs.append(_run(batch, line, pinned, now(), cost))
                size += len(line.request.input)
            else:
                bad.append(_bad_line(batch, line))
        if len(runs) + len(bad) >= CHUNK_LINES or size >= CHUNK_BYTES:
            yield _Chunk(runs, bad, line.line)
            runs, bad, size = [], [], 0
    if runs or bad:
        yield _Chunk(runs, bad, line.line)


def _in_time(line: Good | Bad, born: datetime) -> Good | Bad:
    """The line, or a bad one where it would expire before it may start. By the batch's birth: what a line becomes is
    the same whoever goes on with the submission, whenever."""
    if isinstance(line, Good):
        try:
            check_times(line.request, born)
        except InvalidRequest as error:
            return Bad(line.line, line.custom_id, error.code, error.message, error.hint)
    return line


def _run(batch: BatchDoc, line: Good, pinned: Any, now: datetime, cost: int) -> Doc:
    workflow = pinned[line.request.workflow]
    born = new_run(line.request, workflow, run_id=run_id(batch["_id"], line.line), now=now, waits=True, cost=cost)
    place: dict[str, Any] = {"id": batch["_id"], "line": line.line, "custom_id": line.custom_id}
    if batch["complete_by"] is not None and not batch.get("live_only"):
        place["complete_by"] = min(batch["complete_by"], born["deadline_at"])
    return {**born, "flow": flow(batch["tenant"], batch["_id"]), "batch": place}


def _bad_line(batch: BatchDoc, line: Bad) -> BadLine:
    return {
        "_id": bad_line_id(batch["_id"], line.line),
        "batch": batch["_id"],
        "line": line.line,
        "custom_id": line.custom_id,
        "error": line.as_error(),
        "tally": True,
    }


async def _store(batches: Batches, batch_id: str, chunk: _Chunk, before: Submitted) -> Submitted:
    """Store what of a chunk is not on disk yet; gives how far the submission is then."""
    while True:
        runs = [run for run in chunk.runs if run["batch"]["line"] > before["line"]]
        bad = [line for line in chunk.bad if line["line"] > before["line"]]
        if not runs and not bad:
            return before
        after: Submitted = {
            "line": chunk.last, "good": before["good"] + len(runs), "bad": before["bad"] + len(bad),
        }  # fmt: skip
        if await batches.add_lines(batch_id, before, after, runs, bad):
            return after
        batch = await _loaded(batches, batch_id)
        if batch["status"] == "validating" and batch["submitted"]["line"] == before["line"]:
            continue
        if batch["status"] != "validating" and batch["ending"] is not None:
            raise Conflict(
                f"Batch {batch_id} has {batch['ending']} after line {batch['submitted']['line']}.",
                hint="Lines after it are not part of it; hand them in as a file of their own.",
            )
        before = batch["submitted"]  # somebody else submits the same file at the same time


async def _loaded(batches: Batches, batch_id: str) -> BatchDoc:
    batch = await batches.load(batch_id)
    if batch is None:
        raise InvalidRequest(f"Batch {batch_id} is gone.", hint="Submit the file again.")
    return batch
