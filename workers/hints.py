"""Hints on the broker: one Celery message carries what a group of commits produced for one pool."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from typing import Any

from celery import Celery
from kombu import Connection, Producer

from agentq.group import Group
from agentq.protocol import POOLS, Hint, Pool, hint_message, task_name
from workers.queues import publishing

log = logging.getLogger(__name__)


class HintPublisher:
    """Publishes hints; those that become ready while a message is on its way share the next one for their pool.

    A broker that does not answer costs its time-out and a log line: the scheduler publishes again.
    """

    def __init__(self, app: Celery, batch: int, now: Callable[[], datetime]) -> None:
        self._app = app
        self._now = now  # MongoDB's time
        self._thread = ThreadPoolExecutor(1, "hints")
        self._connection: Connection | None = None
        self._producer: Producer | None = None
        self._options = publishing(app.conf.broker_url)
        self._groups = {pool: Group(partial(self._send, pool), limit=batch) for pool in POOLS}

    async def __call__(self, hints: Sequence[tuple[Pool, Hint]]) -> None:
        if len(hints) == 1:
            pool, hint = hints[0]
            await self._groups[pool](hint)
        else:
            await asyncio.gather(*(self._groups[pool](hint) for pool, hint in hints))

    async def _send(self, pool: Pool, hints: list[Hint]) -> list[None]:
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._send_now, pool, hints)
        except Exception as error:  # noqa: BLE001 - whatever a broker's library raises, the steps are stored
            log.warning("%d hints for %s are left to the scheduler: %s", len(hints), pool, type(error).__name__)
        return [None] * len(hints)

    def _send_now(self, pool: Pool, hints: list[Hint]) -> None:
        try:
            if self._producer is None:
                self._connection = self._app.connection_for_write()
                self._producer = self._connection.Producer()
            self._app.send_task(
                task_name(pool), kwargs=hint_message(hints, self._now()), queue=pool, retry=False, argsrepr="()",
                kwargsrepr=f"{{{len(hints)} hints}}", producer=self._producer, **self._options,
            )  # fmt: skip
        except BaseException:
            self._drop()  # a confirmation that comes late would be taken for that of the next message
            raise

    def _drop(self) -> None:
        connection, self._connection, self._producer = self._connection, None, None
        if connection is not None:
            connection.release()

    def close(self) -> None:
        self._thread.submit(self._drop)
        self._thread.shutdown()


def parse_hints(value: Any) -> list[Hint]:
    """The hints of a message; ``ValueError`` for anything that is not a list of ``[run_id, step_id, attempt]``.

    What they name need not exist: a hint only leads to a conditional claim, so a forged one does nothing.
    """
    if not isinstance(value, list) or len(value) > 10_000:
        raise ValueError("hints is not a list")
    hints = []
    for item in value:
        match item:
            case [str(run_id), str(step_id), int(attempt)] if (
                _plain(run_id) and _plain(step_id) and 0 < attempt < 1_000_000
            ):
                hints.append(Hint(run_id, step_id, attempt))
            case _:
                raise ValueError("a hint is [run_id, step_id, attempt]")
    return hints


def parse_time(value: Any) -> datetime | None:
    """When a message of hints was published, from ``hint_message``'s milliseconds; None where it does not say."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 43:
        return datetime.fromtimestamp(value / 1000, UTC)
    return None


def _plain(name: str) -> bool:
    """Ids become parts of field paths in MongoDB: letters and digits only."""
    return name.isalnum() and len(name) <= 64
