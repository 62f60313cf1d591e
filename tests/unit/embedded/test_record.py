"""One stack a data directory, and others find it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from agentq.embedded.record import StackLock, find_stack
from agentq.errors import Conflict

STARTED = datetime(2026, 11, 21, 9, 30, tzinfo=UTC)
HOLD = """
import signal, sys
from datetime import UTC, datetime
from pathlib import Path
from agentq.embedded.record import StackLock
lock = StackLock(Path(sys.argv[1]))
lock.publish({"mongo_url": "mongodb://here"}, [], datetime.now(UTC))
print("held", flush=True)
signal.pause()
"""


def test_the_second_on_a_directory_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    lock = StackLock(tmp_path)
    with pytest.raises(Conflict, match=rf"already runs on .* \(process {os.getpid()}\)"):
        StackLock(tmp_path)
    lock.release()
    StackLock(tmp_path).release()


def test_others_find_what_was_published(tmp_path: Path) -> None:
    lock = StackLock(tmp_path)
    assert find_stack(tmp_path) is None, "not ready yet"
    part = {"name": "redis", "pid": 1, "address": "127.0.0.1:1", "log_file": "x", "state": "up"}
    lock.publish({"broker_url": "redis://:secret@here"}, [part], STARTED)
    found = find_stack(tmp_path)
    assert found is not None
    assert (found.pid, found.started_at) == (os.getpid(), STARTED)
    assert found.settings == {"broker_url": "redis://:secret@here"}
    assert found.components == [part]
    assert "secret" not in repr(found)
    lock.release()
    assert find_stack(tmp_path) is None
    assert not (tmp_path / "stack.json").exists()


def test_only_this_user_can_read_it(tmp_path: Path) -> None:
    home = tmp_path / "data"
    lock = StackLock(home)
    lock.publish({}, [], STARTED)
    assert home.stat().st_mode & 0o777 == 0o700
    assert {file.name: file.stat().st_mode & 0o777 for file in home.iterdir()} == {
        "stack.json": 0o600,
        "stack.lock": 0o600,
    }
    lock.release()


def test_the_record_of_a_killed_stack_says_nothing(tmp_path: Path) -> None:
    root = str(Path(__file__).resolve().parents[3])
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    holder.stdout.close()
    found = find_stack(tmp_path)
    assert found is not None
    assert found.pid == holder.pid
    holder.kill()
    assert holder.wait() == -signal.SIGKILL
    assert (tmp_path / "stack.json").exists(), "it could not tidy up"
    assert find_stack(tmp_path) is None
    StackLock(tmp_path).release()


def test_there_is_nothing_where_nothing_ever_ran(tmp_path: Path) -> None:
    assert find_stack(tmp_path / "nowhere") is None
