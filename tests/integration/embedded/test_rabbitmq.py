"""The real RabbitMQ beside the embedded servers, and our queues on it: what it keeps, limits and refuses."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from amqp.exceptions import NotFound
from celery import Celery
from kombu import Connection, Queue

from agentq.client import Client
from agentq.embedded.rabbitmq import start_rabbitmq
from agentq.embedded.servers import Server
from agentq.errors import ConfigError
from agentq.protocol import INTAKE_QUEUE, Hint
from tests.fault.system import eventually
from workers.queues import DEAD_QUEUE, DELIVERY_LIMIT, task_queues, with_dead_letters

pytestmark = [pytest.mark.servers, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Where the program is missing, skips locally and fails in CI."""
    try:
        server = start_rabbitmq(tmp_path_factory.mktemp("rabbitmq") / "node")
    except ConfigError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"needs a server: {error}")
    with server:
        yield server


@pytest.fixture
def channel(rabbitmq: Server) -> Iterator[Any]:
    """A channel with confirmations, on queues that are empty."""
    with Connection(rabbitmq.url, transport_options={"confirm_publish": True}) as connection:
        channel: Any = connection.channel()
        yield channel
        for queue in (INTAKE_QUEUE, DEAD_QUEUE):
            channel.queue_delete(queue)


def named(directory: Path) -> bytes:
    """The files in which RabbitMQ remembers its quorum queues; it writes them half a second late."""
    return b"".join(file.read_bytes() for file in directory.rglob("names.dets"))


def publish(channel: Any, queue: str, body: Any) -> None:
    connection_of(channel).Producer(channel).publish(body, routing_key=queue, delivery_mode=2)


def connection_of(channel: Any) -> Any:
    return channel.connection.client


def test_it_keeps_confirmed_messages_over_a_kill_and_leaves_nothing_behind(tmp_path: Path, rabbitmq: Server) -> None:
    """On 127.0.0.1 only; killed and started again on the same directory and port; a clean stop leaves no process."""
    server = start_rabbitmq(tmp_path / "rabbitmq")
    addresses = {one.laddr.ip for one in psutil.Process(server.pid).net_connections() if one.status == "LISTEN"}
    assert addresses == {"127.0.0.1"}
    with Connection(server.url, transport_options={"confirm_publish": True}) as connection:
        channel: Any = connection.channel()
        Queue("kept", queue_arguments={"x-queue-type": "quorum"})(channel).declare()
        publish(channel, "kept", {"a": 1})
        eventually(lambda: b"kept" in named(tmp_path), "RabbitMQ has written the new queue's name (docs/brokers.md)")
    assert server.kill() == -signal.SIGKILL
    with start_rabbitmq(tmp_path / "rabbitmq", server.port) as again:
        assert again.url == server.url
        with Connection(again.url) as connection:
            found: Any = connection.channel()
            eventually(lambda: found.queue_declare("kept", passive=True).message_count == 1, "the message is back")
        descendants = psutil.Process(again.pid).children(recursive=True)
        assert again.stop() == 0
    _, alive = psutil.wait_procs(descendants, timeout=10)
    assert [process.name() for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    assert rabbitmq.alive(), "two nodes do not disturb each other"


def test_a_message_that_is_handed_out_too_often_becomes_a_dead_letter(rabbitmq: Server, channel: Any) -> None:
    """Each time its consumer dies counts; the limit is RabbitMQ's, so no poison message can loop for ever."""
    app = _worker_app(rabbitmq)
    for queue in app.amqp.queues.consume_from.values():
        queue(channel).declare()
    publish(channel, INTAKE_QUEUE, {"x": 1})
    handed_out = 0
    while channel.queue_declare(DEAD_QUEUE, passive=True).message_count == 0:
        if message := channel.basic_get(INTAKE_QUEUE):
            handed_out += 1
            channel.basic_reject(message.delivery_tag, requeue=True)
    assert handed_out == DELIVERY_LIMIT + 1
    dead = channel.basic_get(DEAD_QUEUE, no_ack=True)
    assert dead.headers["x-first-death-reason"] == "delivery_limit"
    assert dead.headers["x-first-death-queue"] == INTAKE_QUEUE


def _worker_app(server: Server) -> Celery:
    app = Celery("worker", broker=server.url, set_as_current=False)
    app.conf.task_queues = task_queues(server.url)
    app.amqp.queues.select([INTAKE_QUEUE])
    with_dead_letters(app)
    assert set(app.amqp.queues.consume_from) == {INTAKE_QUEUE, DEAD_QUEUE}
    return app


def test_a_queue_that_somebody_declared_otherwise_is_taken_as_it_is(
    rabbitmq: Server, channel: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A foreign application that was here first must not be the end of every worker."""
    channel.queue_declare(INTAKE_QUEUE, durable=True, auto_delete=False)
    publish(channel, INTAKE_QUEUE, {"x": 1})
    _worker_app(rabbitmq).amqp.queues[INTAKE_QUEUE](channel).declare()
    assert f"queue {INTAKE_QUEUE} is taken as it is" in caplog.text
    assert channel.basic_get(INTAKE_QUEUE, no_ack=True) is not None
    channel.queue_declare(DEAD_QUEUE)


def test_a_client_declares_nothing_and_hears_that_no_queue_took_its_hint(
    rabbitmq: Server, channel: Any, mongo_url: str, database: str
) -> None:
    """Without a worker there is no queue: the run is accepted, and made due at once instead of half a minute later."""
    with Client(mongo_url, rabbitmq.url, database) as client:
        connected = client._connect()
        assert connected.send("router", [Hint("r1", "s1", 1)]) is False
        assert not connected.publishes(), "it leaves the broker alone for a while"
    with connection_of(channel).channel() as other, pytest.raises(NotFound):
        other.queue_declare("router", passive=True)
    Queue("router", durable=True)(channel).declare()
    with Client(mongo_url, rabbitmq.url, database) as client:
        assert client._connect().send("router", [Hint("r1", "s1", 1)]) is True
    assert channel.basic_get("router", no_ack=True) is not None
    channel.queue_delete("router")
