"""A batch on the real system while its worker, its scheduler and MongoDB are killed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fault.model import ScriptedServer
from tests.fault.system import CHECKOUT, System, eventually

pytestmark = [pytest.mark.servers, pytest.mark.timeout(300)]
LINES = 60


@pytest.fixture
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with ScriptedServer(0.05) as model:
        system = System(tmp_path_factory.mktemp("batch"), model)
        system.start()
        yield system
        system.stop()


def agentq(system: System, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "agentq.cli", "batch", *words], cwd=CHECKOUT, env=system._env("cli", None),
        capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    return done.stdout


def test_whatever_dies_every_line_has_one_result_and_every_call_is_billed_once(system: System) -> None:
    """Costs, counters and results are exact after kills of the worker, the scheduler (with the bookkeeper and the
    admission) and MongoDB; a reader with a cursor gets each line once across all of it."""
    file = system.directory / "requests.jsonl"
    lines = [json.dumps({"id": f"m-{number}", "input": "pay A"}) for number in range(1, LINES + 1)]
    file.write_text("\n".join([*lines, "{broken"]), encoding="utf-8")
    system.worker()
    batch_id = agentq(system, "submit", str(file)).strip()
    batches = system.mongo["agentq"]["batches"]

    def batch() -> dict[str, Any]:
        return batches.find_one({"_id": batch_id}) or {}

    had: list[dict[str, Any]] = []

    def read() -> None:
        had.extend(map(json.loads, agentq(system, "results", batch_id, "--cursor", "reader").splitlines()))

    eventually(lambda: batch()["entries"] >= LINES // 6, "some lines are done")
    system.kill("worker")
    system.worker()
    read()
    eventually(lambda: batch()["entries"] >= LINES // 3, "more lines are done")
    system.kill("scheduler")
    system.scheduler()
    system.restart_mongod()
    read()
    eventually(lambda: batch().get("status") == "completed", "the batch has ended", 150)
    read()
    assert sorted(line["line"] for line in had) == list(range(1, LINES + 2)), "each line once"
    ended = batch()
    assert ended["counts"] == {"succeeded": LINES, "failed": 0, "cancelled": 0, "expired": 0, "bad": 1}
    results = list(map(json.loads, agentq(system, "results", batch_id).splitlines()))
    assert [line["line"] for line in results] == list(range(1, LINES + 2))
    assert sum(line["cost_nano_usd"] for line in results) == ended["cost_nano_usd"]
    for line in results[:LINES]:
        calls = sum(system.model.of_run(line["run_id"]).values())
        assert 5 * 20_000 <= line["cost_nano_usd"] <= calls * 20_000, "its own calls, and those that were repeated"
        assert system.payments(line["run_id"]) <= 1
