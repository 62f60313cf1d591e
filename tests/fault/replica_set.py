"""Three mongods that elect a primary among themselves, each of which a test may kill, freeze and bring back."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from pymongo import MongoClient
from pymongo.errors import PyMongoError

from agentq.embedded.process import Process, free_port, kill_process, spawn, stop_process
from agentq.embedded.servers import REPLICA_SET, mongod_argv, port_open

MEMBERS = 3
ELECTION_TIMEOUT_MS = 1_000  # 10 s is the default: a test has no time for it
HEARTBEAT_MS = 300


class ReplicaSet:
    """``with ReplicaSet(directory) as mongo``: ``mongo.url`` names all members. Members are numbered from 0."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ports: list[int] = []
        self._processes: list[Process] = []

    def __enter__(self) -> ReplicaSet:
        for _ in range(MEMBERS):
            self.ports.append(free_port(self.ports))
        self._processes = [self._spawn(member) for member in range(MEMBERS)]
        for member in range(MEMBERS):
            _until(lambda member=member: port_open(self.ports[member]), f"mongod {member} listens")
        members = [{"_id": member, "host": f"127.0.0.1:{port}"} for member, port in enumerate(self.ports)]
        settings = {"electionTimeoutMillis": ELECTION_TIMEOUT_MS, "heartbeatIntervalMillis": HEARTBEAT_MS}
        with self._direct(0) as client:
            client.admin.command("replSetInitiate", {"_id": REPLICA_SET, "members": members, "settings": settings})
        _until(self.healthy, "a primary is elected and all members follow it")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            kill_process(process)

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        return f"mongodb://{hosts}/?replicaSet={REPLICA_SET}"

    def primary(self, timeout_s: float = 30) -> int:
        """The member that takes writes now; waits for one to be elected."""
        pause, deadline = threading.Event(), time.monotonic() + timeout_s
        while not (found := self._writable()):
            assert time.monotonic() < deadline, f"waited {timeout_s} s in vain for a primary"
            pause.wait(0.05)
        return found[0]

    def kill(self, member: int) -> None:
        """SIGKILL."""
        kill_process(self._processes[member])

    def restart(self, member: int) -> None:
        """Start a member that was killed on the data it had; returns at once, it catches up by itself."""
        self._processes[member] = self._spawn(member)

    def freeze(self, member: int) -> None:
        """SIGSTOP: it is there, and silent."""
        os.kill(self._processes[member].pid, signal.SIGSTOP)

    def thaw(self, member: int) -> None:
        os.kill(self._processes[member].pid, signal.SIGCONT)

    def stop(self, member: int) -> None:
        """SIGTERM: a primary that is told so hands over first."""
        stop_process(self._processes[member], 20)

    def healthy(self) -> bool:
        """One primary, and the others are its secondaries."""
        states = [self._hello(member) for member in range(MEMBERS)]
        primaries = sum(bool(state.get("isWritablePrimary")) for state in states)
        return primaries == 1 and sum(bool(state.get("secondary")) for state in states) == MEMBERS - 1

    def _writable(self) -> list[int]:
        return [member for member in range(MEMBERS) if self._hello(member).get("isWritablePrimary")]

    def _hello(self, member: int) -> dict[str, Any]:
        if self._processes[member].poll() is not None:
            return {}
        try:
            with self._direct(member) as client:
                return dict(client.admin.command("hello"))
        except PyMongoError:
            return {}

    def _direct(self, member: int) -> MongoClient[dict[str, Any]]:
        return MongoClient(
            f"mongodb://127.0.0.1:{self.ports[member]}/?directConnection=true",
            serverSelectionTimeoutMS=500, connectTimeoutMS=500, socketTimeoutMS=2_000,
        )  # fmt: skip

    def _spawn(self, member: int) -> Process:
        directory = self.directory / f"mongodb-{member}"
        return spawn(mongod_argv(directory, self.ports[member]), log_file=directory.with_suffix(".log"))


def _until(condition: Any, what: str, timeout_s: float = 60) -> None:
    pause, deadline = threading.Event(), time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain until {what}"
        pause.wait(0.05)
