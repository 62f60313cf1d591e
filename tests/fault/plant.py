"""The system as the chaos campaign and the longer scenarios need it: many processes started fast, and a fault proxy
between them and every server."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from amqp.exceptions import NotFound
from kombu import Connection
from pymongo import MongoClient
from redis import Redis

from agentq.client import Client
from agentq.embedded.process import Process
from agentq.embedded.servers import Server, start_mongod
from agentq.protocol import POOLS
from tests.fault.model import ScriptedServer
from tests.fault.nursery import Nursery
from tests.fault.proxy import Proxy
from tests.fault.replica_set import ReplicaSet
from tests.fault.system import CHECKOUT, Broker, System, eventually
from workers.queues import MARKER_QUEUE

ALL_POOLS = ",".join(POOLS)


class Plant(System):
    """``with Plant(directory, model) as plant``: servers, proxies and schedulers run; workers are started by the test.

    What the processes and ``client()`` are given leads through ``broker_proxy``, ``mongo_proxy`` and ``model_proxy``;
    ``mongo`` and the bank are reached directly. A replica set has no proxy: its members give out their own addresses.
    """

    def __init__(
        self,
        directory: Path,
        model: ScriptedServer,
        broker: Broker = "redis",
        *,
        replica_set: bool = False,
        schedulers: int = 1,
        app: Path | None = None,
        settings: Mapping[str, str] | None = None,
        mongo_directory: Path | None = None,
    ) -> None:
        super().__init__(directory, model, broker)
        self.app = app or CHECKOUT / "tests" / "fault" / "app"
        self.settings = dict(settings or {})
        self.replicas = ReplicaSet(directory / "replicas") if replica_set else None
        self.mongo_directory = mongo_directory or directory / "mongodb"
        self._schedulers = schedulers
        self._stack = ExitStack()

    def __enter__(self) -> Plant:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        enter = self._stack.enter_context
        self.broker = self._start_broker()  # first: its program may be missing, and then nothing is left behind
        self.nursery = enter(Nursery(CHECKOUT))
        self.broker_proxy = enter(Proxy(self.broker.port))
        self.model_proxy = enter(Proxy(int(self.model.url.split(":")[2].split("/")[0])))
        if self.replicas is not None:
            self.mongo_url = direct = enter(self.replicas).url
        else:
            self.mongod = self._start_mongod()
            self.mongo_proxy = enter(Proxy(self.mongod.port))
            direct, self.mongo_url = self.mongod.url, self.mongo_proxy.leading_to(self.mongod.url)
        self.mongo: MongoClient[dict[str, Any]] = MongoClient(
            direct, tz_aware=True, serverSelectionTimeoutMS=5_000, socketTimeoutMS=5_000
        )
        for number in range(self._schedulers):
            self.start_scheduler(f"scheduler-{number}")

    def stop(self) -> None:
        self.mongo.close()
        self._stack.close()  # with the nursery go its children
        self.broker.stop()
        if self.replicas is None:
            self.mongod.stop()

    def _start_mongod(self, port: int = 0) -> Server:
        return start_mongod(self.mongo_directory, port, log_file=self.directory / "mongodb.log")

    def restart_mongod(self, pause_s: float = 0.0) -> None:
        """SIGKILL; after ``pause_s`` the same port comes back with what was on disk."""
        self.mongod.kill()
        threading.Event().wait(pause_s)
        self.mongod = self._start_mongod(self.mongod.port)

    def empty_broker(self) -> None:
        """FLUSHALL; on RabbitMQ every queue is purged."""
        if self.broker.url.startswith("redis"):
            with Redis.from_url(self.broker.url) as redis:
                redis.flushall()
            return
        with Connection(self.broker.url) as connection:
            for queue in (*POOLS, MARKER_QUEUE):
                channel: Any = connection.channel()  # amqp's, of which kombu's stubs know little
                with contextlib.suppress(NotFound):
                    channel.queue_purge(queue)

    @property
    def broker_url(self) -> str:
        return self.broker_proxy.leading_to(self.broker.url)

    def client(self) -> Client:
        return Client(self.mongo_url, self.broker_url)

    def _environment(self, name: str, failpoint: str | None, app: Path | None) -> dict[str, str]:
        ready = self.directory / f"{name}.ready"
        ready.unlink(missing_ok=True)
        env = {
            "AGENTQ_MONGO_URL": self.mongo_url,
            "AGENTQ_BROKER_URL": self.broker_url,
            "AGENTQ_OPENAI_BASE_URL": self.model_proxy.leading_to(self.model.url),
            "FAULT_BANK_URL": self.model.bank_url,
            "AGENTQ_APP_DIR": str(app or self.app),
            "AGENTQ_DATA_DIR": str(self.directory),
            "AGENTQ_LEASE_S": "5",
            "AGENTQ_READY_FILE": str(ready),
            **self.settings,
        }
        return env | ({"AGENTQ_FAILPOINT": failpoint} if failpoint else {})

    def launch(
        self, name: str, queues: str = ALL_POOLS, failpoint: str | None = None, app: Path | None = None
    ) -> Process:
        """Start a worker and do not wait for it; ``is_ready`` tells when it serves."""
        argv = ["celery", "-A", "workers.app", "worker", "-Q", queues, "-n", f"{name}@%h", "-l", "INFO",
                "--without-gossip", "--without-mingle"]  # fmt: skip
        return self._born(name, argv, failpoint, app)

    def start_scheduler(self, name: str, failpoint: str | None = None) -> Process:
        return self._born(name, ["workers.scheduler"], failpoint, None)

    def _born(self, name: str, argv: list[str], failpoint: str | None, app: Path | None) -> Process:
        env, log_file = self._environment(name, failpoint, app), self.directory / f"{name}.log"
        child: Any = self.nursery.spawn(argv, log_file=log_file, env=env)
        self.processes[name] = child
        return child  # type: ignore[no-any-return]  # all of Popen that anybody here uses

    def is_ready(self, name: str) -> bool:
        return (self.directory / f"{name}.ready").exists()

    def worker(
        self, name: str = "worker", queues: str = ALL_POOLS, failpoint: str | None = None, app: Path | None = None
    ) -> Process:
        """Start a worker and wait until it serves, or has ended."""
        process = self.launch(name, queues, failpoint, app)
        eventually(lambda: self.is_ready(name) or process.poll() is not None, f"{name} is ready")
        return process


def app_variant(directory: Path, **files: tuple[str, str]) -> Path:
    """A copy of the tests' app directory in which, by file name (``models`` for models.yaml), one text is another."""
    shutil.copytree(CHECKOUT / "tests" / "fault" / "app", directory)
    for name, (old, new) in files.items():
        file = directory / f"{name}.yaml"
        text = file.read_text()
        assert old in text, f"{name}.yaml has no {old!r}"
        file.write_text(text.replace(old, new))
    return directory
