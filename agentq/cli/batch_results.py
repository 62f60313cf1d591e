"""Printing the results of a batch: by line, or as they come and each once."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from agentq.batch.output import of_line
from agentq.errors import InvalidRequest
from schemas.batch import ENDED, BadLine, BatchDoc, LineFormat
from schemas.run import RunDoc

if TYPE_CHECKING:
    from agentq.store.mongo import MongoStore

POLL_S = 0.5
PAGE = 500


async def print_results(
    store: MongoStore, batch: BatchDoc, *, form: LineFormat | None, only: str | None, output: Path | None,
    errors: Path | None, follow: bool, cursor: str | None,
) -> None:  # fmt: skip
    """Write each ended line to standard output or to the files that are named."""
    with ExitStack() as files:
        printer = Printer(files, form or batch["format"], only, output, errors)
        if follow or cursor is not None:
            await _from_ledger(store, batch, printer, follow, cursor)
        else:
            async for line in store.batches.by_line(batch["_id"]):
                printer.put(line)


class Printer:
    """Where results and errors go."""

    def __init__(
        self, files: ExitStack, form: LineFormat, only: str | None, results: Path | None, errors: Path | None
    ) -> None:
        self._form = form
        out: TextIO | None = sys.stdout if only != "errors" else None
        err: TextIO | None = sys.stdout if only != "results" else None
        self._results = out if results is None else files.enter_context(results.open("a", encoding="utf-8"))
        self._errors = err if errors is None else files.enter_context(errors.open("a", encoding="utf-8"))
        for path in {results, errors} - {None}:
            assert path is not None
            path.open("w").close()  # what an earlier command left there is replaced

    def put(self, line: RunDoc | BadLine, number: int | None = None) -> None:
        """``number``: the line's place in the order in which lines ended; reading goes on from the one after it."""
        is_error, record = of_line(line, self._form)
        if number is not None:
            record = {**record, "n": number}
        file = self._errors if is_error else self._results
        if file is not None:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def flush(self) -> None:
        for file in (self._results, self._errors):
            if file is not None:
                file.flush()


async def _from_ledger(store: MongoStore, batch: BatchDoc, printer: Printer, follow: bool, cursor: str | None) -> None:
    batch_id = batch["_id"]
    named = cursor is not None and not cursor.isdecimal()
    start = await store.batches.cursor(batch_id, _cursor_name(cursor)) if named else int(cursor or 0)
    while True:
        now = await store.batches.load(batch_id)  # before the page: what ends later is on the next one
        page = await store.batches.entries(batch_id, start, PAGE)
        for number, line in enumerate(page, start + 1):
            printer.put(line, number)
        start += len(page)
        if page:
            printer.flush()
            if named:
                await store.batches.move_cursor(batch_id, _cursor_name(cursor), start)
            continue
        if not follow or now is None or now["status"] in ENDED:
            break
        await asyncio.sleep(POLL_S)
    click.echo(f"{start} lines have been read; go on with --cursor {cursor if named else start}", err=True)


def _cursor_name(cursor: str | None) -> str:
    assert cursor is not None
    if not cursor.isprintable() or not 1 <= len(cursor) <= 100:
        raise InvalidRequest("A cursor's name has 1 to 100 printable characters.", hint="Use the name of the reader.")
    return cursor
