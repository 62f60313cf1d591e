"""``agentq restore-check`` on a database that has gone back in time, with nothing else running."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentq.engine import advance
from agentq.engine.commit import Grant, plan
from agentq.protocol import Hint, Request
from agentq.run import new_run
from agentq.store.api import Verdict
from agentq.store.mongo import MongoStore
from schemas.run import RUN, RunDoc
from tests.integration.test_store_contract import BUNDLE, decide, replied, routed

CHECKOUT = Path(__file__).parents[3]
pytestmark = pytest.mark.servers


async def backup(url: str, database: str) -> None:
    """What the restored database holds: one run in the middle of three parallel tool calls, one that never began."""
    store = MongoStore(url, database)
    await store.open()
    await store.register([BUNDLE])
    for run_id in ("r1", "r2"):
        await store.runs.insert_one(
            dict(new_run(Request(input="hello"), BUNDLE.registered(), run_id=run_id, now=store.now()))
        )
    run = await store.claim(Hint("r1", "s1", 1), Grant("t1", "w", 30_000))
    assert run is not None
    first = decide(run, "s1", routed(), "t1", store, grants={"s2": Grant("t2", "w", 30_000)})
    assert await store.commit(first) is Verdict.APPLIED
    wishes = [{"id": "a", "name": name, "arguments": {}} for name in ("look_up", "refund", "post")]
    grants = {"s5": Grant("t5", "w", 30_000)}
    second = decide(first.after, "s2", replied("", wishes), "t2", store, grants=grants)
    assert await store.commit(second) is Verdict.APPLIED
    await store.close()


async def stored(url: str, database: str) -> dict[str, RunDoc]:
    store = MongoStore(url, database)
    runs: dict[str, Any] = {doc["_id"]: doc async for doc in store.runs.find({})}
    await store.close()
    for run in runs.values():
        RUN.validate_python(run)
    return runs


async def zombie(url: str, database: str) -> Verdict:
    """A worker of before the restore that still holds what it thinks is the lease of s5."""
    store = MongoStore(url, database)
    await store.sync_clock()
    run = await store.load("r1")
    assert run is not None
    late = plan(run, advance.wake(run, "s5", 0), now=store.now(), step_id="s5", token="t5")
    verdict = await store.commit(late)
    await store.close()
    return verdict


def agentq(url: str, database: str, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environ = {
        **os.environ, "AGENTQ_MONGO_URL": url, "AGENTQ_MONGO_DATABASE": database, "AGENTQ_DATA_DIR": str(home)
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "agentq.cli", *words], cwd=CHECKOUT, env=environ, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip


def test_it_counts_first_and_settles_when_told(mongo_url: str, database: str, tmp_path: Path) -> None:
    """Nothing that may have happened is repeated blindly; whoever worked before the restore is fenced."""
    asyncio.run(backup(mongo_url, database))
    before = asyncio.run(stored(mongo_url, database))
    dry = agentq(mongo_url, database, tmp_path, "restore-check")
    assert dry.returncode == 0, dry.stderr
    assert "nothing was changed: add --apply" in dry.stdout
    assert [run["status"] for run in before.values()] == ["running", "queued"]
    assert asyncio.run(stored(mongo_url, database)) == before
    done = agentq(mongo_url, database, tmp_path, "restore-check", "--apply")
    assert done.returncode == 0, done.stderr
    counted = dict(line.rsplit("  ", 1) for line in done.stdout.splitlines()[1:-1])
    assert {name.strip(): int(count) for name, count in counted.items()} == {
        "live runs": 2, "steps held for a person": 1, "steps tried again": 3, "leases removed": 1, "runs paused": 2,
    }  # fmt: skip
    runs = asyncio.run(stored(mongo_url, database))
    steps = runs["r1"]["steps"]
    assert {key: (step["attempt"], step.get("held")) for key, step in steps.items()} == {
        "s3": (2, None), "s4": (2, None), "s5": (1, "outcome_unknown")
    }  # fmt: skip
    assert [(run["status"], run["leases"], run["pause"]["reason"]) for run in runs.values()] == [
        ("paused", {}, "restored")
    ] * 2
    assert asyncio.run(zombie(mongo_url, database)) is Verdict.FENCED
    stuck = agentq(mongo_url, database, tmp_path, "runs", "--stuck")
    assert "agentq dlq resolve r1 --step s5" in stuck.stdout
    assert "agentq resume r2" in stuck.stdout
    assert agentq(mongo_url, database, tmp_path, "audit", "verify").returncode == 0
