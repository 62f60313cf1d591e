"""The real system in processes that a test may kill: broker, MongoDB, workers by Celery's command line, scheduler."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pymongo import MongoClient

from agentq.client import Client, Handle
from agentq.embedded.binaries import find_mongod
from agentq.embedded.process import Process, kill_process, spawn, stop_process
from agentq.embedded.rabbitmq import start_rabbitmq
from agentq.embedded.servers import Server, start_mongod, start_redis
from agentq.engine.audit import check
from agentq.protocol import POOLS
from schemas.run import RUN
from tests.fault.model import ScriptedServer

CHECKOUT = Path(__file__).resolve().parent.parent.parent
LEASE_S = 5
Broker = Literal["redis", "rabbitmq"]


class System:
    """Started by ``start``; everything it started is gone after ``stop``."""

    def __init__(self, directory: Path, model: ScriptedServer, broker: Broker = "redis") -> None:
        self.directory = directory
        self.model = model
        self.processes: dict[str, Process] = {}
        self._broker_kind = broker

    def start(self) -> None:
        find_mongod()  # so that nothing has been started where a program is missing
        self.broker = self._start_broker()
        self.mongod = start_mongod(self.directory / "mongodb")
        self.mongo: MongoClient[dict[str, Any]] = MongoClient(self.mongod.url, tz_aware=True)
        self.scheduler()

    def stop(self) -> None:
        for process in self.processes.values():
            kill_process(process)
        self.mongo.close()
        self.broker.stop()
        self.mongod.stop()

    def client(self) -> Client:
        return Client(self.mongod.url, self.broker.url)

    def _env(self, name: str, failpoint: str | None) -> dict[str, str]:
        ready = self.directory / f"{name}.ready"
        ready.unlink(missing_ok=True)
        env = {
            "AGENTQ_MONGO_URL": self.mongod.url,
            "AGENTQ_BROKER_URL": self.broker.url,
            "AGENTQ_OPENAI_BASE_URL": self.model.url,
            "FAULT_BANK_URL": self.model.bank_url,
            "AGENTQ_APP_DIR": str(CHECKOUT / "tests" / "fault" / "app"),
            "AGENTQ_DATA_DIR": str(self.directory),
            "AGENTQ_LEASE_S": str(LEASE_S),
            "AGENTQ_READY_FILE": str(ready),
        }
        return env | ({"AGENTQ_FAILPOINT": failpoint} if failpoint else {})

    def _spawn(self, name: str, argv: list[str], failpoint: str | None) -> Process:
        env = self._env(name, failpoint)
        process = spawn([sys.executable, "-m", *argv], log_file=self.directory / f"{name}.log", env=env, cwd=CHECKOUT)
        self.processes[name] = process
        ready = self.directory / f"{name}.ready"
        eventually(lambda: ready.exists() or process.poll() is not None, f"{name} is ready")
        return process

    def worker(self, name: str = "worker", queues: str = ",".join(POOLS), failpoint: str | None = None) -> Process:
        """A worker by the ordinary Celery command line."""
        argv = ["celery", "-A", "workers.app", "worker", "-Q", queues, "-n", f"{name}@%h", "-l", "INFO",
                "--without-gossip", "--without-mingle"]  # fmt: skip
        return self._spawn(name, argv, failpoint)

    def scheduler(self, failpoint: str | None = None) -> Process:
        return self._spawn("scheduler", ["workers.scheduler"], failpoint)

    def end(self, name: str) -> None:
        stop_process(self.processes.pop(name), 20)

    def kill(self, name: str) -> None:
        kill_process(self.processes.pop(name))

    def _start_broker(self, port: int = 0) -> Server:
        start = start_redis if self._broker_kind == "redis" else start_rabbitmq
        return start(self.directory / self._broker_kind, port)

    def restart_broker(self) -> None:
        """SIGKILL; the same port comes back with what was on disk."""
        self.broker.kill()
        self.broker = self._start_broker(self.broker.port)

    def lose_broker(self) -> None:
        """SIGKILL, and its data gone; the same port comes back empty."""
        self.broker.kill()
        shutil.rmtree(self.directory / self._broker_kind)
        self.broker = self._start_broker(self.broker.port)

    def restart_mongod(self) -> None:
        self.mongod.kill()
        self.mongod = start_mongod(self.directory / "mongodb", port=self.mongod.port)

    def run_doc(self, run_id: str) -> dict[str, Any]:
        doc = self.mongo["agentq"]["runs"].find_one({"_id": run_id})
        assert doc is not None
        return doc

    def payments(self, run_id: str) -> int:
        return self.model.bank.payments_of(run_id)

    def check_ended_right(self, handle: Handle, crashes: int, timeout_s: float = 90) -> dict[str, Any]:
        """The promises about one run that met ``crashes`` crashes; gives the run."""
        outcome = handle.wait(timeout_s)
        assert outcome.status == "succeeded", outcome
        assert outcome.answer == "I paid A; the balance was 12."
        eventually(lambda: self.run_doc(handle.run_id)["next_due"] is None, "the run is settled")
        run = self.run_doc(handle.run_id)
        RUN.validate_python(run)
        events = handle.events()
        assert check(handle.run_id, run["audit"], events) == []
        finished = [event["step"] for event in events if event["type"] in FINISHING]
        assert len(finished) == len(set(finished)) == 8, "every step finished once"
        calls = self.model.of_run(handle.run_id)
        assert set(calls) == {"s1", "s2", "s5", "s7", "s8"}
        assert sum(calls.values()) <= 5 + crashes, "at most one extra paid call a crash"
        assert self.payments(handle.run_id) == 1
        spent = run["usage"]["cost_nano_usd"] + run["waste"].get("cost_nano_usd", 0)
        assert spent <= sum(calls.values()) * 20_000
        assert run["usage"]["cost_nano_usd"] == 5 * 20_000, "the run is charged for its own calls only"
        return run


FINISHING = {"route.chosen", "agent.turn", "tool.called", "critic.verdict"}


def eventually(condition: Callable[[], object], what: str, timeout_s: float = 60) -> None:
    """Wait for a state; fails with ``what`` was awaited."""
    pause, deadline = threading.Event(), time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain until {what}"
        pause.wait(0.05)
