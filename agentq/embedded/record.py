"""Who runs on a data directory: the lock that admits one ``agentq up``, and the record by which others find it.

Imports nothing heavy: every command reads the record.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agentq.errors import Conflict

_LOCK = "stack.lock"
_RECORD = "stack.json"
_TRIES, _PAUSE_S = 20, 0.05  # a reader holds the lock for an instant while it asks whether it is free


def write_private(file: Path, text: str) -> None:
    """Write a file that only this user may read; readers see the old text or the new, never half."""
    draft = file.with_name(file.name + ".new")
    draft.unlink(missing_ok=True)  # so that O_CREAT sets the mode
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:  # noqa: PTH123
        out.write(text)
    draft.replace(file)


@dataclass(frozen=True)
class StackRecord:
    """A running stack: ``settings`` are the AGENTQ_* values (lower case, without the prefix) that reach it."""

    pid: int
    started_at: datetime
    settings: Mapping[str, str] = field(repr=False)  # may hold passwords
    components: Sequence[Mapping[str, Any]]  # {name, pid, address, log_file, state}


class StackLock:
    """The right to run on a data directory; the kernel takes it back when the holder dies."""

    def __init__(self, data_dir: Path) -> None:
        """Make the directory (for this user only) and take the lock; Conflict names the process that has it."""
        self._data_dir = data_dir
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._fd = os.open(data_dir / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        if not _try_lock(self._fd, tries=_TRIES):
            holder = os.pread(self._fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise Conflict(
                f"agentq already runs on {data_dir} (process {holder}).",
                code="already_running",
                hint=f"Stop it with `kill {holder}`, or choose another directory with --data-dir."
                if holder.isdigit()
                else "Stop it, or choose another directory with --data-dir.",
            )
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        (data_dir / _RECORD).unlink(missing_ok=True)  # of one that was killed

    def publish(self, settings: Mapping[str, str], components: Sequence[Mapping[str, Any]], started: datetime) -> None:
        """Let others find this stack; call again when a process id has changed."""
        record = {
            "pid": os.getpid(),
            "started_at": started.isoformat(timespec="seconds"),
            "settings": dict(settings),
            "components": list(components),
        }
        write_private(self._data_dir / _RECORD, json.dumps(record, indent=2) + "\n")

    def release(self) -> None:
        (self._data_dir / _RECORD).unlink(missing_ok=True)
        os.close(self._fd)


def find_stack(data_dir: Path) -> StackRecord | None:
    """The stack that runs on ``data_dir``, None if there is none or it is not ready yet."""
    try:
        fd = os.open(data_dir / _LOCK, os.O_RDWR)
    except OSError:
        return None
    try:
        if _try_lock(fd, tries=1):
            return None  # nobody holds it: the record, if any, is of one that was killed
        raw = json.loads((data_dir / _RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    finally:
        os.close(fd)
    return StackRecord(
        pid=raw["pid"],
        started_at=datetime.fromisoformat(raw["started_at"]).astimezone(UTC),
        settings=raw["settings"],
        components=raw["components"],
    )


def _try_lock(fd: int, tries: int) -> bool:
    pause = threading.Event()
    for left in reversed(range(tries)):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if left:
                pause.wait(_PAUSE_S)
        else:
            return True
    return False
