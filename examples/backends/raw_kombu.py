"""The message itself, for a back end with no Celery at all: any AMQP or Redis library can send it.

A JSON body ``[args, kwargs, {}]`` with two headers, to the queue ``agentq``. Nobody waits for its result; the
idempotency key makes it safe to send the message again.

    BROKER_URL=... python examples/backends/raw_kombu.py mail-8812 "Where is my order LF-1002?"
"""

from __future__ import annotations

import os
import sys
import uuid

from kombu import Connection


def hand_in(url: str, key: str, text: str, workflow: str = "default") -> str:
    """Send one request; gives the id of the message."""
    message_id = str(uuid.uuid4())
    request = {"input": text, "workflow": workflow, "idempotency_key": key}
    with Connection(url) as connection:
        connection.Producer().publish(
            [[], {"request": request}, {}],
            exchange="",
            routing_key="agentq",
            serializer="json",
            headers={"task": "agentq.submit", "id": message_id},
            correlation_id=message_id,
            delivery_mode=2,
        )
    return message_id


if __name__ == "__main__":
    if len(sys.argv) != 3 or not os.environ.get("BROKER_URL"):
        sys.exit("usage: BROKER_URL=... python examples/backends/raw_kombu.py KEY TEXT")
    print(hand_in(os.environ["BROKER_URL"], sys.argv[1], sys.argv[2], os.environ.get("WORKFLOW", "default")))
