"""How the scheduler notices that the broker lost its data: a parked message that is gone.

One durable queue holds one message that nobody consumes. It works on every broker kombu speaks to, and needs no
key outside Celery's own.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Executor
from typing import Any

from celery import Celery
from kombu import Connection, Queue
from kombu.exceptions import OperationalError

from agentq.errors import Unavailable

log = logging.getLogger(__name__)
MARKER_QUEUE = "agentq.epoch"


class BrokerEpoch:
    """``await epoch()`` is True once after the marker was found missing; the first look of a system is one, too."""

    def __init__(self, app: Celery, executor: Executor) -> None:
        self._app = app
        self._executor = executor
        self._connection: Connection | None = None

    async def __call__(self) -> bool:
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._look)

    def _look(self) -> bool:
        try:
            if self._connection is None:
                self._connection = self._app.connection_for_write()
                self._connection.ensure_connection(max_retries=1, timeout=3)
            return self._missing(self._connection)
        except Exception as error:
            known = isinstance(error, (OperationalError, OSError, *self._errors()))
            self._drop()
            if not known:
                raise
            raise Unavailable(
                "The broker does not answer.", code="broker_unavailable", hint="Check that it runs: agentq doctor."
            ) from error

    def _errors(self) -> tuple[type[BaseException], ...]:
        """What this broker's library raises for a lost connection or a missing queue."""
        if self._connection is None:
            return ()
        return (*self._connection.connection_errors, *self._connection.channel_errors)

    def _missing(self, connection: Connection) -> bool:
        with connection.channel() as channel:
            try:
                declared: Any = channel
                if declared.queue_declare(MARKER_QUEUE, passive=True).message_count > 0:
                    return False
            except self._errors():
                log.debug("the broker has no marker queue")  # as good as a queue without a message
        with connection.channel() as channel:
            queue = Queue(MARKER_QUEUE, routing_key=MARKER_QUEUE, durable=True)
            queue(channel).declare()
            connection.Producer(channel).publish(
                {"marker": "kept so that a broker that lost its data is noticed"}, routing_key=MARKER_QUEUE,
                exchange="", serializer="json", delivery_mode=2, retry=False,
            )  # fmt: skip
        return True

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.release()
            self._connection = None
