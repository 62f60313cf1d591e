"""Workers and schedulers that are started while MongoDB is away wait for it; wrong settings end them at once."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient

from agentq.embedded.binaries import find_mongod
from agentq.embedded.process import Process, free_port, kill_process, spawn
from agentq.embedded.servers import Server, port_open
from tests.fault.conftest import judged
from tests.fault.plant import Plant
from tests.fault.system import CHECKOUT, eventually

pytestmark = [pytest.mark.servers, pytest.mark.timeout(240)]

WAITS = "waiting for MongoDB"
ROLES = {
    "worker": ["celery", "-A", "workers.app", "worker", "-Q", "router", "--without-gossip", "--without-mingle"],
    "scheduler": ["workers.scheduler"],
}


def test_whoever_starts_before_mongodb_waits_for_it_and_then_serves(make_plant: Callable[..., Plant]) -> None:
    """A clear line in the log, no sign of life before; then runs go through, without a restart of anybody."""
    plant = make_plant(schedulers=0)
    plant.mongod.kill()
    early = {"worker": plant.launch("worker"), "scheduler": plant.start_scheduler("scheduler")}
    for name in early:
        eventually(lambda: WAITS in _log(plant, name), f"the {name} says that it waits")  # noqa: B023 - awaited here
        assert not plant.is_ready(name)
    plant.restart_mongod()
    for name in early:
        eventually(lambda: plant.is_ready(name), f"the {name} serves")  # noqa: B023 - awaited here
    with plant.client() as client:
        judged(plant, [client.submit("pay A").run_id])
    assert [process.poll() for process in early.values()] == [None, None]
    assert _log(plant, "worker").count(WAITS) <= 3, "it says so, and does not go on about it"


@pytest.mark.parametrize("role", ROLES)
def test_whoever_waits_for_mongodb_stops_when_it_is_told_to(role: str, tmp_path: Path, redis: Server) -> None:
    process, log = _start(role, f"mongodb://127.0.0.1:{free_port()}/", redis, tmp_path)
    try:
        eventually(lambda: WAITS in log.read_text(), "it says that it waits")
        process.send_signal(signal.SIGTERM)
        eventually(lambda: process.poll() is not None, "it ends", 20)
        assert process.returncode == 0, log.read_text()
    finally:
        kill_process(process)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    "wrong", ["no number for a port", "password not escaped", "unknown user", "standalone", "other set"]
)
def test_wrong_settings_end_it_at_once_with_code_2_and_the_reason(
    role: str, wrong: str, tmp_path: Path, redis: Server, mongod: Server, standalone: str
) -> None:
    url, reason = {
        "no number for a port": ("mongodb://127.0.0.1:many/", "The MongoDB URL is not valid."),
        "password not escaped": ("mongodb://eve:s3cret@@127.0.0.1/", "The MongoDB URL is not valid."),
        "unknown user": (f"mongodb://eve:s3cret@127.0.0.1:{mongod.port}/", "MongoDB refuses these credentials."),
        "standalone": (standalone, "MongoDB runs as a standalone server."),
        "other set": (f"{standalone}?replicaSet=rs0", "No server of the MongoDB URL is a member of the replica set"),
    }[wrong]
    process, log = _start(role, url, redis, tmp_path)
    try:
        eventually(lambda: process.poll() is not None, "it ends")
        assert process.returncode == 2, log.read_text()
        assert reason in log.read_text()
        assert "s3cret" not in log.read_text()
        assert WAITS not in log.read_text()
    finally:
        kill_process(process)


def test_a_replica_set_that_is_not_initiated_yet_is_waited_for(tmp_path: Path, redis: Server, mongod: Server) -> None:
    assert mongod.port  # skips where there is none
    with _mongod(tmp_path / "data", "--replSet", "rs") as port:
        url = f"mongodb://127.0.0.1:{port}/?directConnection=true"
        process, log = _start("scheduler", url, redis, tmp_path)
        try:
            eventually(lambda: "replica set is not initiated yet" in log.read_text(), "it says what it waits for")
            with MongoClient[dict[str, Any]](url) as mongo:
                member = {"_id": 0, "host": f"127.0.0.1:{port}"}
                mongo.admin.command("replSetInitiate", {"_id": "rs", "members": [member]})
            eventually((tmp_path / "ready").exists, "it serves")
        finally:
            kill_process(process)


@pytest.fixture(scope="module")
def standalone(tmp_path_factory: pytest.TempPathFactory, mongod: Server) -> Iterator[str]:
    """A mongod that is no member of a replica set."""
    assert mongod.port  # skips where there is none
    with _mongod(tmp_path_factory.mktemp("standalone")) as port:
        yield f"mongodb://127.0.0.1:{port}/"


@contextmanager
def _mongod(directory: Path, *words: str) -> Iterator[int]:
    directory.mkdir(exist_ok=True)
    port = free_port()
    argv = [str(find_mongod()), "--dbpath", str(directory), "--port", str(port), "--bind_ip", "127.0.0.1", *words]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as process:
        try:
            eventually(lambda: port_open(port), "the server listens")
            yield port
        finally:
            process.kill()


def _start(role: str, mongo_url: str, redis: Server, directory: Path) -> tuple[Process, Path]:
    log = directory / f"{role}.log"
    env = {"AGENTQ_MONGO_URL": mongo_url, "AGENTQ_BROKER_URL": redis.url, "AGENTQ_DATA_DIR": str(directory),
           "AGENTQ_READY_FILE": str(directory / "ready")}  # fmt: skip
    return spawn([sys.executable, "-m", *ROLES[role]], log_file=log, env=env, cwd=CHECKOUT), log


def _log(plant: Plant, name: str) -> str:
    with suppress(FileNotFoundError):
        return (plant.directory / f"{name}.log").read_text()
    return ""
