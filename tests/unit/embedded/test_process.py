"""Children cannot outlive their parent, and do not die before it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from agentq.embedded.process import free_port, kill_process, log_tail, spawn, stop_process

PARENT = """
import signal, sys
from pathlib import Path
from agentq.embedded.process import spawn
child = spawn(["sleep", "600"], log_file=Path(sys.argv[1]))
print(child.pid, flush=True)
signal.pause()
"""


def test_a_child_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "log")], stdout=subprocess.PIPE, env={**os.environ, **_PATH}
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.stdout.close()
    assert _runs(child)
    parent.kill()
    assert parent.wait() == -signal.SIGKILL
    deadline, pause = time.monotonic() + 10, threading.Event()
    while _runs(child):
        assert time.monotonic() < deadline, "the child lives on"
        pause.wait(0.02)


def test_a_child_outlives_the_thread_that_asked_for_it(tmp_path: Path) -> None:
    """Linux ties the parent-death signal to the starting thread; ``spawn`` must not."""
    children = []
    thread = threading.Thread(target=lambda: children.append(spawn(["sleep", "600"], log_file=tmp_path / "log")))
    thread.start()
    thread.join()
    (child,) = children
    # Had the thread's end killed it, it would be dead as soon as it has become `sleep`.
    deadline, pause = time.monotonic() + 10, threading.Event()
    while "sleep" not in psutil.Process(child.pid).name():
        assert time.monotonic() < deadline
        pause.wait(0.01)
    try:
        assert child.poll() is None
    finally:
        assert kill_process(child) == -signal.SIGKILL


def test_stop_asks_first_and_may_be_repeated(tmp_path: Path) -> None:
    polite = (
        "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(5));"
        "print('up', flush=True); signal.pause()"
    )
    child = spawn([sys.executable, "-I", "-c", polite], log_file=tmp_path / "log")
    deadline, pause = time.monotonic() + 10, threading.Event()
    while "up" not in log_tail(tmp_path / "log"):
        assert time.monotonic() < deadline
        pause.wait(0.01)
    assert stop_process(child, 10) == 5
    assert stop_process(child, 10) == 5


def test_free_ports_lie_below_the_range_of_outgoing_connections() -> None:
    assert all(15_000 <= free_port() < 32_000 for _ in range(20))


def test_the_tail_of_a_log_starts_where_told(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("old\n" + "\n".join(f"line {n}" for n in range(20)))
    assert log_tail(log, lines=2) == "line 18\nline 19"
    assert log_tail(log, lines=99, start=4).splitlines()[0] == "line 0"
    assert log_tail(tmp_path / "missing") == ""


_PATH = {"PYTHONPATH": str(Path(__file__).resolve().parents[3])}


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_port_that_is_spoken_for_is_not_given_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = iter([20_001, 20_002, *range(20_003, 20_103)])
    monkeypatch.setattr("random.randrange", lambda _low, _high: next(tried))
    assert free_port(taken={20_001, 20_002}) >= 20_003
