"""What ``agentq doctor`` finds out about this machine. Imports no server library: one may be missing."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agentq.embedded.binaries import find_mongod, find_redis_server
from agentq.errors import AgentqError
from config.settings import Settings

Level = Literal["ok", "warn", "fail"]
_LIBRARIES = ("celery", "kombu", "redis", "packaging", "pymongo", "pydantic", "pydantic-settings", "aiohttp", "flower")


@dataclass(frozen=True)
class Check:
    """``found`` is what is; ``mend`` is what to do about it, empty if nothing."""

    level: Level
    name: str
    found: str
    mend: str = ""


def machine(settings: Settings) -> Iterator[Check]:
    """What must hold before anything is started. Each check says what it found and how to mend it; none raises."""
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    yield Check("ok" if good else "fail", "python", version, "" if good else "Use Python 3.11 or newer.")
    yield _libraries()
    yield _disk(settings.data_dir)
    for name, find, given in (
        ("redis-server", find_redis_server, settings.broker_url),
        ("mongod", find_mongod, settings.mongo_url),
    ):
        try:
            yield Check("ok", name, str(find()))
        except AgentqError as error:
            yield Check("ok" if given else "fail", name, error.message, "" if given else error.hint)


def _libraries() -> Check:
    missing = []
    for name in _LIBRARIES:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Check("fail", "libraries", f"missing: {', '.join(missing)}", "Run `pip install 'agentq[server]'`.")
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("celery", "redis", "pymongo", "flower"))
    return Check("ok", "libraries", ", ".join(versions))


def _disk(data_dir: Path) -> Check:
    there = next(folder for folder in (data_dir.resolve(), *data_dir.resolve().parents) if folder.exists())
    free = shutil.disk_usage(there).free / 1e9
    level: Level = "ok" if free > 2 else "warn" if free > 0.5 else "fail"
    mend = "" if level == "ok" else "Make room, or choose another --data-dir: MongoDB stops when the disk is full."
    return Check(level, "disk", f"{free:.1f} GB free at {there}", mend)
