"""Child processes that cannot outlive us: start, stop, and say how they ended.

``spawn`` promises three things about a child. It dies (SIGKILL) when this process dies, however that happens. It is
in a session of its own, so a Ctrl-C at the terminal reaches only the supervisor, which then stops the children in
order. Its output is appended to a log file.
"""

from __future__ import annotations

import contextlib
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

from agentq.errors import Unavailable

# Runs in the child before the real program: asks the kernel to kill it with its parent, and leaves at once if the
# parent died before it could ask. A program of its own rather than a ``preexec_fn``, which is unsafe in a process with
# threads (and warned about since Python 3.12). Costs 25 ms; ``exec`` keeps the process id.
_DIE_WITH_PARENT = """
import ctypes, os, sys
PR_SET_PDEATHSIG, SIGKILL = 1, 9
if sys.platform == "linux":
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"cannot run {sys.argv[2]}: {error}")
"""

Process = subprocess.Popen[bytes]


class _Spawner:
    """The one thread that starts children, alive until the process ends.

    Linux sends the parent-death signal when the *thread* that started the child ends, so a child started from a
    short-lived thread would die with that thread.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._jobs: queue.SimpleQueue[tuple[Future[Process], list[str], Path, dict[str, str], Path | None]]
        self._jobs = queue.SimpleQueue()
        threading.Thread(target=self._run, name="agentq-spawner", daemon=True).start()

    def spawn(self, argv: list[str], log_file: Path, env: dict[str, str], cwd: Path | None) -> Process:
        future: Future[Process] = Future()
        self._jobs.put((future, argv, log_file, env, cwd))
        return future.result()

    def _run(self) -> None:
        while True:
            future, argv, log_file, env, cwd = self._jobs.get()
            try:
                future.set_result(_popen(argv, log_file, env, cwd))
            except OSError as error:
                future.set_exception(error)


_spawner_lock = threading.Lock()
_spawner: _Spawner | None = None


def spawn(
    argv: Sequence[str | Path],
    *,
    log_file: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Process:
    """Start ``argv`` as a child that dies with this process; its output is appended to ``log_file`` (mode 0600).

    ``env`` is added to this process's environment. May be called from any thread. A program that cannot be run shows as
    a child that exits with code 1 and says why in its log.
    """
    global _spawner  # noqa: PLW0603  one thread a process, and a forked copy needs a new one
    with _spawner_lock:
        if _spawner is None or _spawner.pid != os.getpid():
            _spawner = _Spawner()
    return _spawner.spawn([str(word) for word in argv], log_file, {**os.environ, **(env or {})}, cwd)


def _popen(argv: list[str], log_file: Path, env: dict[str, str], cwd: Path | None) -> Process:
    log_file.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *argv],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=cwd,
            start_new_session=True,
        )
    finally:
        os.close(log)


def stop_process(process: Process, timeout_s: float) -> int:
    """Ask with SIGTERM, insist with SIGKILL after ``timeout_s``; returns the exit code. Safe to repeat."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)
    return kill_process(process)


def kill_process(process: Process) -> int:
    """SIGKILL to the child and whatever it started (its process group); returns the exit code. Safe to repeat."""
    # Nobody left in the group; macOS answers EPERM for zombies.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def describe_exit(code: int) -> str:
    """``exit code 3`` or ``signal SIGKILL``: how a process ended, from ``Popen.returncode``."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def free_port(taken: Collection[int] = ()) -> int:
    """A TCP port of 127.0.0.1 that is free right now and not in ``taken``. Somebody may take it before you do.

    Below the range from which the kernel takes ports for outgoing connections: a client that keeps trying to reach a
    server that is being restarted must not be given that server's own port (TCP can connect to itself).
    """
    for _ in range(100):
        port = random.randrange(15_000, 32_000)
        if port in taken:
            continue
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise Unavailable("No free TCP port was found on 127.0.0.1.", code="no_free_port")


def log_tail(log_file: Path, lines: int = 8, start: int = 0) -> str:
    """The last lines of a log, at most 64 KiB, from byte ``start`` on; empty if there are none."""
    try:
        with log_file.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(start, size - 65_536))
            text = log.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])
