"""The running system as these tests see it: its addresses, its command line, Flower, and all it leaves behind."""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kombu import Connection
from redis import Redis

from agentq.embedded.stack import Stack
from agentq.protocol import INTAKE_QUEUE

T = TypeVar("T")
CHECKOUT = Path(__file__).resolve().parents[2]

# Words in a request that make the offline model server act (see the scenario in conftest.py).
SLOWLY = "in-your-own-time"
INVENT = "please-invent-something"

_BASE64 = re.compile(rb"[A-Za-z0-9+/]{24,}={0,2}")
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def until(condition: Callable[[], T], what: str, timeout_s: float = 60) -> T:
    """Wait until ``condition`` gives something true, and give it; ``what`` says what was waited for."""
    deadline, pause = time.monotonic() + timeout_s, threading.Event()
    while True:
        if value := condition():
            return value
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        pause.wait(0.05)


@dataclass(frozen=True)
class Running:
    """One stack, shared by all tests of this folder."""

    stack: Stack
    invention: str  # what the offline model makes up where a request says INVENT

    @property
    def settings(self) -> dict[str, str]:
        return self.stack.settings

    @property
    def broker_url(self) -> str:
        return self.settings["broker_url"]

    @property
    def on_redis(self) -> bool:
        return self.broker_url.startswith("redis://")

    @property
    def result_backend(self) -> str:
        """The Celery result backend with which a foreign application gets its answers."""
        return self.broker_url if self.on_redis else "rpc://"

    @property
    def sending(self) -> dict[str, Any]:
        """What a foreign application gives ``send_task``: on RabbitMQ it must not declare our queue as its own."""
        return {"queue": INTAKE_QUEUE} | ({} if self.on_redis else {"declare": []})

    @property
    def mongo_url(self) -> str:
        return self.settings["mongo_url"]

    @property
    def data_dir(self) -> Path:
        return Path(self.settings["data_dir"])

    def pids(self) -> dict[str, int]:
        return {component["name"]: component["pid"] for component in self.stack.components()}

    def state(self, name: str) -> str:
        return next(str(one["state"]) for one in self.stack.components() if one["name"] == name)

    # -- the command line ---------------------------------------------------------------------------------------------

    def agentq(self, *words: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run ``agentq words`` as a person beside the running stack would; ``text`` is its standard input."""
        return subprocess.run(
            [sys.executable, "-m", "agentq.cli", *words],
            cwd=CHECKOUT, env={**os.environ, "AGENTQ_DATA_DIR": str(self.data_dir)}, input=text,
            capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip

    # -- where nothing personal may be --------------------------------------------------------------------------------

    def broker_content(self) -> bytes:
        """What the broker holds: every key of Redis with its whole content, message bodies decoded. RabbitMQ shows no
        message without handing it out: there, the intake must be empty."""
        if not self.on_redis:
            until(lambda: self.waiting(INTAKE_QUEUE) == 0, "the intake is empty")
            return b""
        with Redis.from_url(self.broker_url) as client:
            found = [part for key in client.scan_iter(count=1000) for part in (key, *_content(client, key))]
        return decoded(b"\n".join(found))

    def waiting(self, queue: str) -> int:
        """How many messages wait in a queue of RabbitMQ."""
        with Connection(self.broker_url) as connection, connection.channel() as channel:
            amqp: Any = channel
            return int(amqp.queue_declare(queue, passive=True).message_count)

    def broker_file(self) -> bytes:
        """Everything that was ever written to the broker's disk, message bodies decoded: Redis's append-only file,
        RabbitMQ's logs of its quorum queues and its message store."""
        if self.on_redis:
            return decoded((self.data_dir / "redis" / "appendonly.aof").read_bytes())
        files = [file for file in sorted((self.data_dir.parent / "rabbitmq" / "mnesia").rglob("*")) if file.is_file()]
        assert any(file.suffix == ".wal" for file in files), "it has to read what quorum queues write"
        return decoded(b"\n".join(file.read_bytes() for file in files))

    def logs(self) -> bytes:
        """Every log file, of our processes and of the servers."""
        return decoded(b"\n".join(file.read_bytes() for file in sorted((self.data_dir / "logs").iterdir())))

    def flower(self, path: str) -> str:
        """A page or an answer of Flower's."""
        with _DIRECT.open(self.settings["flower_url"] + path, timeout=30) as answer:
            return str(answer.read().decode())

    def flower_json(self, path: str) -> Any:
        return json.loads(self.flower(path))

    def flower_everything(self) -> bytes:
        """All that Flower shows about tasks and workers, over its API and on its pages."""
        tasks = self.flower_json("/api/tasks?limit=10000")
        assert tasks, "Flower has seen no task"
        pages = ["/api/workers?refresh=1", "/api/queues/length", "/", "/workers", "/tasks", "/broker", "/metrics"]
        latest = sorted(tasks, key=lambda task: tasks[task]["received"] or 0, reverse=True)[:30]
        pages += [path for task in latest for path in (f"/api/task/info/{task}", f"/task/{task}")]
        return decoded("\n".join([json.dumps(tasks), *map(self.flower, pages)]).encode())


def decoded(raw: bytes) -> bytes:
    """``raw``, and after it what its base64 parts hold: kombu wraps message bodies in base64, so that a plain search
    would find nothing and prove nothing."""
    parts = [raw]
    for found in _BASE64.finditer(raw):
        try:
            parts.append(base64.b64decode(found.group(), validate=True))
        except binascii.Error:
            continue
    return b"\n".join(parts)


def _content(client: Any, key: bytes) -> Iterator[bytes]:
    """The values under one key, whatever its type; nothing if it is gone by now."""
    match client.type(key):
        case b"string":
            yield client.get(key) or b""
        case b"list":
            yield from client.lrange(key, 0, -1)
        case b"set":
            yield from client.smembers(key)
        case b"zset":
            yield from client.zrange(key, 0, -1)
        case b"hash":
            yield from (part for pair in client.hgetall(key).items() for part in pair)
        case b"none":
            return
        case other:
            raise AssertionError(f"a key of a type this test does not read: {key!r} is a {other!r}")
