"""Follow-up tasks: a Celery message by name on the caller's own queue, when what it asked for has ended."""

from __future__ import annotations

import asyncio
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import cast

from celery import Celery
from kombu import Connection, Producer

from agentq.notify.failure import NotDelivered
from agentq.protocol import FollowUp
from schemas.delivery import Delivery
from workers.queues import publishing

_IDS = uuid.UUID("6ba7b811-9dad-11d1-80b4-00c04fd430c8")  # RFC 4122's for URLs
_TOLD = ("run_id", "batch_id", "status")


def task_id(delivery: Delivery) -> str:
    """The Celery task's id: the same for every repetition of the same end."""
    return str(uuid.uuid5(_IDS, f"agentq:{delivery['_id']}"))


class FollowUpSender:
    """``await send(delivery)`` returns when the broker has the message. Raises ``NotDelivered``: on RabbitMQ also where
    no queue of that name exists; on Redis, where every name is a queue, a mistyped one fills unseen."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._thread = ThreadPoolExecutor(1, "follow-up")
        self._connection: Connection | None = None
        self._producer: Producer | None = None
        self._options = publishing(app.conf.broker_url)

    async def __call__(self, delivery: Delivery) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._send, delivery)

    def _send(self, delivery: Delivery) -> None:
        """Without Celery's routing, which knows our queues only, and without declaring a queue that is not ours."""
        to = cast("FollowUp", delivery["to"])
        kwargs = {name: delivery["data"][name] for name in _TOLD if name in delivery["data"]}
        message = self._app.amqp.create_task_message(task_id(delivery), to["task"], (), kwargs)
        try:
            if self._producer is None:
                self._connection = self._app.connection_for_write()
                self._producer = self._connection.Producer()
            self._producer.publish(
                message.body, exchange="", routing_key=to["queue"], serializer="json", headers=message.headers,
                delivery_mode=2, retry=False, **message.properties, **self._options,
            )  # fmt: skip
        except Exception as error:
            self._drop()
            raise NotDelivered(f"The broker did not take it: {type(error).__name__}.", code="broker_refused") from error

    def _drop(self) -> None:
        connection, self._connection, self._producer = self._connection, None, None
        if connection is not None:
            connection.release()

    def close(self) -> None:
        self._thread.submit(self._drop)
        self._thread.shutdown()
