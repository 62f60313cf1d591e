"""Starts processes of ours fast: one process has imported everything, and forks a child for each that is wanted.

A worker needs a second of CPU to import what it runs on, and a campaign starts a hundred. The child does what
``python -m <module> <arguments>`` does, in a session of its own, with its own environment and log; it dies with the
nursery, and the nursery dies with whoever started it.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

# Everything a worker and a scheduler import but the modules that read the environment when they are imported.
PRELOADED = (
    "celery.__main__", "celery.bin.celery", "celery.bin.worker", "celery.apps.worker", "celery.worker.worker",
    "celery.worker.consumer.consumer", "celery.worker.strategy", "celery.concurrency.thread", "celery.app.amqp",
    "celery.app.events", "celery.app.control", "celery.backends.redis", "celery.fixups.django", "kombu.transport.redis",
    "kombu.transport.pyamqp", "celery.loaders.app", "celery.utils.term", "agentq.runtime.scheduler", "workers.host",
    "workers.intake", "workers.liveness", "workers.epoch", "workers.sentry", "workers.critic", "workers.router",
    "workers.specialist", "workers.tool_runner",
)  # fmt: skip


class Child:
    """A process of the nursery, as far as ``subprocess.Popen`` would show it to ``agentq.embedded.process``."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.ended = threading.Event()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not self.ended.wait(timeout):
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def send_signal(self, sign: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, sign)


class Nursery:
    """``with Nursery(cwd) as nursery``: ``nursery.spawn(["celery", "-A", ...], log_file=..., env=...)``."""

    def __init__(self, cwd: Path) -> None:
        self._cwd = cwd
        self._children: dict[int, Child] = {}
        self._wanted: list[Future[Child]] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Nursery:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("AGENTQ_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fault.nursery"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            cwd=self._cwd, env=environ, text=True, bufsize=1, start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, name="nursery", daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._reader.join(10)
        self._process.stdout.close()

    def spawn(self, argv: Sequence[str], *, log_file: Path, env: Mapping[str, str]) -> Child:
        """``python -m argv...`` with its output appended to ``log_file`` and ``env`` added to the environment."""
        job = {"argv": list(argv), "log": str(log_file), "env": dict(env)}
        future: Future[Child] = Future()
        assert self._process.stdin is not None
        with self._lock:
            self._wanted.append(future)
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        return future.result(60)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            if "born" in told:
                child = self._children[told["born"]] = Child(told["born"])
                with self._lock:
                    self._wanted.pop(0).set_result(child)
            else:
                child = self._children.pop(told["ended"])
                child.returncode = told["code"]
                child.ended.set()
        for child in self._children.values():  # they died with the nursery
            child.returncode = -signal.SIGKILL
            child.ended.set()


# --------------------------------------------------------------------------------------------- in the nursery's process


def _serve() -> dict[str, Any] | None:
    """Fork a child for each line of stdin; gives None in the nursery when stdin ends, and in a child its job."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    unread = b""
    while True:
        ready, _, _ = select.select([0, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            _reap()
        if 0 in ready:
            data = os.read(0, 65_536)
            if not data:
                return None
            *lines, unread = (unread + data).split(b"\n")
            for line in lines:
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    os.close(woken)
                    os.close(wake)
                    return dict(json.loads(line))
                _tell({"born": pid})


def _reap() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _tell({"ended": pid, "code": os.waitstatus_to_exitcode(status)})


def _tell(news: dict[str, int]) -> None:
    os.write(1, json.dumps(news).encode() + b"\n")


def _become(job: dict[str, Any]) -> None:
    """From a copy of the nursery to the process that was asked for."""
    pr_set_pdeathsig = 1
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    os.setsid()
    log = os.open(job["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for new, old in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(new, old)
    os.close(log)
    os.close(nothing)
    os.environ.update(job["env"])
    sys.argv = job["argv"]


if __name__ == "__main__":
    for module in PRELOADED:
        importlib.import_module(module)
    if (wanted := _serve()) is not None:
        _become(wanted)
        runpy.run_module(wanted["argv"][0], run_name="__main__", alter_sys=True)
