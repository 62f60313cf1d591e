"""The nursery's children and the replica set behave as the tests that use them rely on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from pymongo import MongoClient

from agentq.embedded.process import kill_process, stop_process
from tests.fault.nursery import Nursery
from tests.fault.replica_set import ReplicaSet
from tests.fault.system import CHECKOUT, eventually

pytestmark = [pytest.mark.servers, pytest.mark.timeout(120)]


def test_a_nurserys_child_runs_a_module_with_its_own_environment_and_its_end_is_told(tmp_path: Path) -> None:
    with Nursery(CHECKOUT) as nursery:
        child = nursery.spawn(["this"], log_file=tmp_path / "log", env={})
        assert child.wait(20) == 0
        assert "Zen of Python" in (tmp_path / "log").read_text()
        env = {"AGENTQ_MONGO_URL": "nonsense://"}
        child = nursery.spawn(["workers.scheduler"], log_file=tmp_path / "scheduler", env=env)
        assert child.wait(20) == 2
        assert "mongo_url" in (tmp_path / "scheduler").read_text()


def test_a_nurserys_child_can_be_killed_and_dies_with_the_nursery(tmp_path: Path) -> None:
    with Nursery(CHECKOUT) as nursery:
        server = ["http.server", "--bind", "127.0.0.1", "0"]
        killed, asked, left = (nursery.spawn(server, log_file=tmp_path / "log", env={}) for _ in range(3))
        assert kill_process(killed) == -signal.SIGKILL  # type: ignore[arg-type]
        assert stop_process(asked, 20) == -signal.SIGTERM  # type: ignore[arg-type]
        assert left.poll() is None
    assert left.wait(10) == -signal.SIGKILL
    eventually(lambda: not _exists(left.pid), "the last child is gone")


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_replica_set_elects_another_primary_and_takes_the_old_one_back(tmp_path: Path) -> None:
    with ReplicaSet(tmp_path) as replicas, MongoClient[dict[str, int]](replicas.url, w="majority") as client:
        things = client["test"]["things"]
        things.insert_one({"_id": 1})
        first = replicas.primary()
        replicas.kill(first)
        second = replicas.primary()
        assert second != first
        things.insert_one({"_id": 2})
        replicas.restart(first)
        eventually(replicas.healthy, "the old primary follows the new one")
        replicas.freeze(second)
        third = replicas.primary()
        assert third != second
        replicas.thaw(second)
        eventually(replicas.healthy, "the frozen primary has stepped down")
        assert [thing["_id"] for thing in things.find().sort("_id")] == [1, 2]
