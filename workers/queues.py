"""The queues on the broker: on Redis plain lists, on RabbitMQ quorum queues (docs/adr/0007-rabbitmq-quorum-queues.md).

A message that RabbitMQ has handed out more than ``DELIVERY_LIMIT`` times in vain, because each worker that had it died
or lost its connection, goes to ``DEAD_QUEUE``; a worker that serves the intake reads that one, too.
"""

from __future__ import annotations

import logging
from typing import Any

from amqp.exceptions import AccessRefused, PreconditionFailed
from celery import Celery
from kombu import Queue

from agentq.protocol import INTAKE_QUEUE, POOLS

log = logging.getLogger(__name__)
DEAD_QUEUE = "agentq.dead"
MARKER_QUEUE = "agentq.epoch"
DELIVERY_LIMIT = 20
CONFIRM_S = 3.0  # a broker that does not confirm a hint within this time costs the hint, not the worker

_QUORUM = {"x-queue-type": "quorum"}
# Dead letters are handed over with a confirmation, which RabbitMQ does only where a full queue refuses new messages.
_LIMITED = _QUORUM | {
    "x-delivery-limit": DELIVERY_LIMIT,
    "x-dead-letter-exchange": "",
    "x-dead-letter-routing-key": DEAD_QUEUE,
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}


def on_redis(broker_url: str) -> bool:
    """Is the broker Redis? Any other is taken for RabbitMQ."""
    return broker_url.startswith(("redis", "rediss", "unix"))


class FoundQueue(Queue):
    """A queue that is declared, or taken as it is found.

    Where somebody declared it before with other arguments (a foreign application that was here first, an operator who
    wants another type), or where we may not declare, RabbitMQ answers with an error that would end the worker. It is
    declared on a channel of its own, because that error closes the channel; and bound to no exchange but the default.
    """

    def declare(self, nowait: bool = False, channel: Any = None) -> str:  # noqa: ARG002 - kombu's signature
        """Declare the queue; one that exists otherwise is left alone and reported."""
        given: Any = channel or self.channel
        probe = given.connection.channel()
        try:
            self.queue_declare(channel=probe)
        except (PreconditionFailed, AccessRefused) as error:
            log.warning("queue %s is taken as it is: %s", self.name, error.reply_text)
        finally:
            probe.close()
        return str(self.name)


def task_queues(broker_url: str) -> list[Queue]:
    """The queues of the pools and of the intake.

    On Redis, hints are not acknowledged (docs/adr/0005-hints-need-no-acknowledgement.md). Requests, unlike hints, exist
    nowhere else until they are stored: they are acknowledged after that.
    """
    if on_redis(broker_url):
        return [
            *(Queue(name, routing_key=name, no_ack=True) for name in POOLS),
            Queue(INTAKE_QUEUE, routing_key=INTAKE_QUEUE),
        ]
    return [FoundQueue(name, routing_key=name, queue_arguments=_LIMITED) for name in (*POOLS, INTAKE_QUEUE)]


def with_dead_letters(app: Celery) -> None:
    """Let a worker that consumes the intake consume the dead letters, which have no limit of their own."""
    queues = app.amqp.queues
    if INTAKE_QUEUE in queues.consume_from and not on_redis(app.conf.broker_url):
        queues.select_add(FoundQueue(DEAD_QUEUE, routing_key=DEAD_QUEUE, queue_arguments=_QUORUM))


def marker_queue(broker_url: str) -> Queue:
    """The queue that is gone when the broker has lost its data (``workers.epoch``)."""
    if on_redis(broker_url):
        return Queue(MARKER_QUEUE, routing_key=MARKER_QUEUE, durable=True)
    return FoundQueue(MARKER_QUEUE, routing_key=MARKER_QUEUE, queue_arguments=_QUORUM)


def publishing(broker_url: str) -> dict[str, Any]:
    """Options with which hints are sent: on RabbitMQ, an error if no queue took them or nobody confirmed in time."""
    return {} if on_redis(broker_url) else {"mandatory": True, "confirm_timeout": CONFIRM_S}
