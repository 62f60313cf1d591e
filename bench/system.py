"""What is measured, as processes: Redis, MongoDB, the bench's own model server, the scheduler and the workers."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pymongo import MongoClient
from redis import Redis

from agentq.client import Client
from agentq.embedded.process import Process, describe_exit, free_port, log_tail, spawn, stop_process
from agentq.embedded.rabbitmq import start_rabbitmq
from agentq.embedded.servers import port_open, start_mongod, start_redis
from agentq.errors import Unavailable
from agentq.protocol import POOLS
from bench.pace import Pace

CHECKOUT = Path(__file__).resolve().parent.parent
APP = Path(__file__).resolve().parent / "app"
WORKFLOW = "bench"
START_TIMEOUT_S = 60.0

# Worker names and the queues each serves. Combined: a run goes on in place. Pools: every step hops over the broker.
TOPOLOGIES: dict[str, dict[str, str]] = {
    "combined": {f"worker-{number}": ",".join(POOLS) for number in (1, 2)},
    "pools": {pool: pool for pool in POOLS},
}


@dataclass(frozen=True)
class ModelServer:
    """``bench.model_server`` as seen from outside. One thread at a time."""

    url: str
    pid: int
    _connection: http.client.HTTPConnection = field(repr=False)

    def reset(self, delay_ms: int) -> None:
        """Counters back to zero; from now on calls are answered after ``delay_ms``."""
        self._ask("POST", f"/reset?delay_ms={delay_ms}")

    def calls(self) -> dict[str, int]:
        """Since the reset: ``calls``, ``repeated`` (an Idempotency-Key again), ``in_flight``, ``max_in_flight``."""
        return self._ask("GET", "/calls")

    def _ask(self, method: str, path: str) -> dict[str, int]:
        self._connection.request(method, path)
        counters: dict[str, int] = json.loads(self._connection.getresponse().read())
        return counters


@dataclass(frozen=True)
class Servers:
    """What the workers need, running."""

    directory: Path
    mongo_url: str
    broker_url: str
    model: ModelServer
    mongo: MongoClient[dict[str, Any]] = field(repr=False)
    redis: Redis = field(repr=False)
    pids: Mapping[str, int]
    pace: Pace = field(repr=False)


@dataclass(frozen=True)
class System:
    """Servers, scheduler and workers, ready for runs of the workflow ``bench``."""

    servers: Servers
    client: Client
    pids: Mapping[str, int]
    settings: Mapping[str, str]

    @property
    def runs(self) -> Any:
        return self.servers.mongo["agentq"]["runs"]


@contextmanager
def serving(directory: Path, broker: str = "redis") -> Iterator[Servers]:
    """Real servers with their data in ``directory``. Raises ``ConfigError`` or ``Unavailable`` as they do. With
    RabbitMQ as broker, Redis runs too and has nothing to do."""
    with ExitStack() as stack:
        redis = stack.enter_context(start_redis(directory / "redis"))
        mongod = stack.enter_context(start_mongod(directory / "mongodb", cache_gb=1.0))
        model = stack.enter_context(_model_server(directory))
        mongo = stack.enter_context(MongoClient[dict[str, Any]](mongod.url, tz_aware=True))
        redis_client = stack.enter_context(Redis.from_url(redis.url))
        pids = {"redis": redis.pid, "mongod": mongod.pid, "model server": model.pid}
        broker_url = redis.url
        if broker == "rabbitmq":
            rabbitmq = stack.enter_context(start_rabbitmq(directory / "rabbitmq"))
            pids["rabbitmq"], broker_url = rabbitmq.pid, rabbitmq.url
        pace = stack.enter_context(Pace())
        yield Servers(directory, mongod.url, broker_url, model, mongo, redis_client, pids, pace)


@contextmanager
def _model_server(directory: Path) -> Iterator[ModelServer]:
    port = free_port()
    log_file = directory / "model-server.log"
    process = spawn([sys.executable, "-m", "bench.model_server", str(port)], log_file=log_file, cwd=CHECKOUT)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        _wait("model server", process, log_file, lambda: port_open(port))
        yield ModelServer(f"http://127.0.0.1:{port}/v1", process.pid, connection)
    finally:
        connection.close()
        stop_process(process, 1)


@contextmanager
def working(servers: Servers, topology: str, settings: Mapping[str, str]) -> Iterator[System]:
    """Scheduler and workers on ``servers``, with these AGENTQ_* settings over the defaults.

    AGENTQ_* variables of the caller's environment reach the workers, too (``AGENTQ_TASK_EVENTS=false make bench``).
    """
    env = {
        "AGENTQ_DATA_DIR": str(servers.directory / "no-stack"),
        "AGENTQ_CONFIG": "",
        "AGENTQ_APP_DIR": str(APP),
        "AGENTQ_MONGO_URL": servers.mongo_url,
        "AGENTQ_BROKER_URL": servers.broker_url,
        "AGENTQ_OPENAI_BASE_URL": servers.model.url,
        "AGENTQ_OPENAI_API_KEY": "bench",
        **settings,
    }
    commands = {"scheduler": ["-m", "workers.scheduler"]}
    for name, queues in TOPOLOGIES[topology].items():
        commands[name] = ["-m", *("celery", "-A", "workers.app", "worker", "-Q", queues, "-n", f"{name}@%h")]
        commands[name] += ["--without-gossip", "--without-mingle"]
    with ExitStack() as stack:
        started = []
        for name, argv in commands.items():
            log_file, ready = servers.directory / f"{name}.log", servers.directory / f"{name}.ready"
            ready.unlink(missing_ok=True)
            process = spawn(
                [sys.executable, *argv], log_file=log_file, env={**env, "AGENTQ_READY_FILE": str(ready)}, cwd=CHECKOUT
            )
            stack.callback(stop_process, process, 20)
            started.append((name, process, log_file, ready))
        for name, process, log_file, ready in started:
            _wait(name, process, log_file, ready.exists)
        client = stack.enter_context(Client(servers.mongo_url, servers.broker_url))
        pids = {name: process.pid for name, process, *_ in started}
        yield System(servers, client, {**pids, **servers.pids, "client": os.getpid()}, settings)


def _wait(name: str, process: Process, log_file: Path, ready: Any) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not ready():
        try:
            code = process.wait(0.05)
        except subprocess.TimeoutExpired:
            if time.monotonic() < deadline:
                continue
            problem = f"was not ready within {START_TIMEOUT_S:g} s"
        else:
            problem = f"ended with {describe_exit(code)} before it was ready"
        raise Unavailable(f"The {name} {problem}.", code="start_failed", hint=f"Its log:\n{log_tail(log_file, 20)}")
