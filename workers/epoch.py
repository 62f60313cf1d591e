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
from kombu import Connection
from kombu.exceptions import OperationalError

from agentq.errors import Unavailable
from workers.queues import MARKER_QUEUE, marker_queue, on_redis, publishing

log = logging.getLogger(__name__)


class BrokerEpoch:
    """``await epoch()`` is True once after the marker was found missing; the first look of a system is one, too."""

    def __init__(self, app: Celery, executor: Executor) -> None:
        self._app = app
        self._executor = executor
        self._url: str = app.conf.broker_url
        # A quorum queue that is just recovering exists already and tells no messages yet: look again before believing.
        self._sure = 1 if on_redis(self._url) else 4
        self._empty = 0  # so many looks in a row found the queue there and empty
        self._connection: Connection | None = None
        self._channel: Any = None  # kept: on Redis a new one connects anew

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
        if self._channel is None:
            self._channel = connection.channel()
        try:
            count = self._channel.queue_declare(MARKER_QUEUE, passive=True).message_count
            self._empty = 0 if count > 0 else self._empty + 1
            if self._empty < self._sure:
                return False
        except connection.channel_errors:
            log.debug("the broker has no marker queue")  # as good as a queue without a message
            self._close_channel()  # RabbitMQ has done so
        with connection.channel() as channel:
            marker_queue(self._url)(channel).declare()
            connection.Producer(channel).publish(
                {"marker": "kept so that a broker that lost its data is noticed"}, routing_key=MARKER_QUEUE,
                exchange="", serializer="json", delivery_mode=2, retry=False,
                **publishing(self._url),
            )  # fmt: skip
        self._empty = 0
        return True

    def _close_channel(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def _drop(self) -> None:
        self._channel = None
        if self._connection is not None:
            self._connection.release()
            self._connection = None
