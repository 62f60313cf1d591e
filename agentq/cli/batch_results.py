"""Printing the results of a batch: by line, or as they come and each once."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

import click

from agentq.batch.output import of_line
from agentq.cli.table import counted
from agentq.errors import InvalidRequest, Unavailable
from schemas.batch import ENDED, BadLine, BatchDoc, LineFormat
from schemas.run import RunDoc

if TYPE_CHECKING:
    from agentq.store.mongo import MongoStore

POLL_S = 0.5
PAGE = 500
_NUMBER = re.compile(r"[+-]?[0-9]+")


async def print_results(
    store: MongoStore, batch: BatchDoc, *, form: LineFormat | None, only: str | None, output: Path | None,
    errors: Path | None, follow: bool, cursor: str | None,
) -> None:  # fmt: skip
    """Write each ended line to standard output or to the files that are named.

    A file is written anew; with a cursor, which gives only what comes after it, lines are added to the file. Raises
    ``InvalidRequest`` before any file is touched where the wishes make no sense, ``Unavailable`` where the lines cannot
    be written.
    """
    for path, option, other in ((output, "results", "errors"), (errors, "errors", "results")):
        if path is not None and only == other:
            raise InvalidRequest(
                f"With --only {other} nothing would go to {path}, which is for {option}.",
                hint="Use --output FILE for results, --errors FILE for errors.",
            )
    start = await _start(store, batch, cursor)
    try:
        with ExitStack() as files:
            printer = Printer(files, form or batch["format"], only, output, errors, add=cursor is not None)
            if follow or cursor is not None:
                await _from_ledger(store, batch["_id"], printer, follow, cursor, start)
            else:
                async for line in store.batches.by_line(batch["_id"]):
                    printer.put(line)
            printer.flush()
    except OSError as error:
        if error.errno == errno.EPIPE:  # whoever read has had enough: click ends quietly
            raise
        _drop_what_is_left()
        raise Unavailable(
            f"The results could not be written: {error.strerror or error}.",
            hint="Make room and ask for them again: none is lost, some may come twice.",
        ) from None


def _drop_what_is_left() -> None:
    """Python tries to write the rest at its end, and would complain a second time."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _opened(path: Path, mode: str) -> TextIO:
    try:
        return cast("TextIO", path.open(mode, encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest(
            f"{path} cannot be written: {error.strerror}.", hint="Name a file in a folder that is there and is yours."
        ) from None


class Printer:
    """Where results and errors go. ``add``: files keep what an earlier command left there."""

    def __init__(
        self, files: ExitStack, form: LineFormat, only: str | None, results: Path | None, errors: Path | None, *,
        add: bool,
    ) -> None:  # fmt: skip
        self._form = form
        out: TextIO | None = sys.stdout if only != "errors" else None
        err: TextIO | None = sys.stdout if only != "results" else None
        self._results = out if results is None else files.enter_context(_opened(results, "a"))
        self._errors = err if errors is None else files.enter_context(_opened(errors, "a"))
        if not add:
            for path in {results, errors} - {None}:
                assert path is not None
                _opened(path, "w").close()  # not before both can be written; they may be the same file

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


async def _start(store: MongoStore, batch: BatchDoc, cursor: str | None) -> int:
    """How many lines are not printed, because the reader has had them."""
    if cursor is None:
        return 0
    if not cursor.isprintable() or not 1 <= len(cursor) <= 100:
        raise InvalidRequest("A cursor's name has 1 to 100 printable characters.", hint="Use the name of the reader.")
    if not _NUMBER.fullmatch(cursor):
        return await store.batches.cursor(batch["_id"], cursor)
    if not 0 <= int(cursor) <= batch["entries"]:
        raise InvalidRequest(
            f"--cursor {cursor}: {counted(batch['entries'], 'line')} of {batch['_id']} ended so far.",
            code="invalid_value", hint=f"Use a number from 0 to {batch['entries']}, or the name of a reader.",
        )  # fmt: skip
    return int(cursor)


async def _from_ledger(
    store: MongoStore, batch_id: str, printer: Printer, follow: bool, cursor: str | None, start: int
) -> None:
    named = cursor if cursor is not None and not _NUMBER.fullmatch(cursor) else None
    while True:
        now = await store.batches.load(batch_id)  # before the page: what ends later is on the next one
        page = await store.batches.entries(batch_id, start, PAGE)
        for number, line in enumerate(page, start + 1):
            printer.put(line, number)
        start += len(page)
        if page:
            printer.flush()
            if named is not None:
                await store.batches.move_cursor(batch_id, named, start)
            continue
        if not follow or now is None or now["status"] in ENDED:
            break
        await asyncio.sleep(POLL_S)
    read = "1 line has" if start == 1 else f"{start} lines have"
    click.echo(f"{read} been read; go on with --cursor {named or start}", err=True)
