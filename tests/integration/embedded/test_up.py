"""``agentq up`` as a user runs it: the whole system, crashes in it, the end of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from pymongo import MongoClient
from redis import Redis

from agentq.embedded.record import StackRecord, find_stack

pytestmark = [pytest.mark.servers, pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[3]
EVERYTHING = ["redis", "mongodb", "model", "router", "specialist", "critic", "tools", "scheduler", "flower"]


class Up:
    """A running ``agentq up`` on a data directory."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.data_dir = folder / "data"
        self.out = folder / "up.out"
        with self.out.open("ab") as out:
            self.process = subprocess.Popen(
                agentq("up", "--data-dir", str(self.data_dir), *options),
                cwd=ROOT, env=environment(), stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.until(lambda: find_stack(self.data_dir) is not None, 120)

    @property
    def said(self) -> str:
        return self.out.read_text()

    @property
    def record(self) -> StackRecord:
        found = find_stack(self.data_dir)
        assert found is not None
        return found

    def pid(self, name: str) -> int:
        return next(int(one["pid"] or 0) for one in self.record.components if one["name"] == name)

    def pids(self) -> list[int]:
        return [int(one["pid"]) for one in self.record.components]

    def until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        deadline, pause = time.monotonic() + seconds, threading.Event()
        while not condition():
            assert time.monotonic() < deadline, self.said
            assert self.process.poll() is None, self.said
            pause.wait(0.05)

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(90)


def agentq(*argv: str) -> list[str]:
    return [sys.executable, "-m", "agentq.cli", *argv]


def environment() -> dict[str, str]:
    providers = ("OPENAI_", "ANTHROPIC_", "AGENTQ_")
    return {name: value for name, value in os.environ.items() if not name.startswith(providers)}


def call(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        agentq(*argv), cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=120
    )


def gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) for pid in pids)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    started: list[Up] = []

    def make(*options: str) -> Up:
        started.append(Up(tmp_path, *options))
        return started[-1]

    yield make
    for one in started:
        if one.process.poll() is None:
            one.end(signal.SIGKILL)


def mongo(up: Up) -> MongoClient[dict[str, Any]]:
    return MongoClient(up.record.settings["mongo_url"], serverSelectionTimeoutMS=20_000)


def test_up_runs_everything_mends_what_dies_and_stops_cleanly(start: Callable[..., Up]) -> None:
    up = start()
    assert [one["name"] for one in up.record.components] == EVERYTHING
    up.until(lambda: "agentq is ready" in up.said)

    done = call("doctor", "--data-dir", str(up.data_dir), "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert [check for check in checks.values() if check["level"] != "ok"] == []
    assert done.returncode == 0
    assert {"pool router", "pool agentq", "scheduler", "mongodb writes", "flower"} <= set(checks)

    refused = call("up", "--data-dir", str(up.data_dir))
    assert refused.returncode == 2
    assert f"(process {up.process.pid})" in refused.stderr

    with mongo(up) as client:
        client.keep.things.insert_one({"_id": 1})
    with Redis.from_url(up.record.settings["broker_url"]) as client:
        client.set("kept", "yes")
    before = {name: up.pid(name) for name in ("redis", "mongodb", "critic")}
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)
    up.until(lambda: all(up.pid(name) not in (0, pid) for name, pid in before.items()))
    up.until(lambda: all(one["state"] == "up" for one in up.record.components))
    assert up.said.count("died (signal SIGKILL)") == 3
    with mongo(up) as client:
        assert client.keep.things.count_documents({}) == 1
    with Redis.from_url(up.record.settings["broker_url"]) as client:
        assert client.get("kept") == b"yes"

    pids = up.pids()
    assert up.end(signal.SIGINT) == 0
    assert gone(pids)
    assert find_stack(up.data_dir) is None
    stopped = [line.removeprefix("stopping ") for line in up.said.splitlines() if line.startswith("stopping ")]
    assert stopped == ["flower", "router, specialist, critic, tools", "scheduler", "model", "redis", "mongodb"]
    assert "Traceback" not in up.said


def test_a_killed_up_takes_everything_with_it_and_the_next_one_finds_its_data(start: Callable[..., Up]) -> None:
    up = start("--no-flower")
    with mongo(up) as client:
        client.keep.things.insert_one({"_id": 1})
    pids = up.pids()
    up.end(signal.SIGKILL)
    deadline, pause = time.monotonic() + 30, threading.Event()
    while not gone(pids):
        assert time.monotonic() < deadline, "orphans"
        pause.wait(0.05)

    again = start("--no-flower")
    with mongo(again) as client:
        assert client.keep.things.count_documents({}) == 1
    pids = again.pids()
    assert again.end(signal.SIGTERM) == 0
    assert gone(pids)
