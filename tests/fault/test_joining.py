"""A batch with a window on the whole system, while scheduler (with the joiner) and workers are killed: its calls go
through the provider's batch endpoint, and each is paid once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pymongo import MongoClient

from agentq.embedded.stack import Stack
from agentq.errors import ConfigError
from config.settings import load_settings
from examples.support_desk.desk import DEFAULT_DATABASE
from examples.support_desk.seed import seed
from tests.acceptance.running import CHECKOUT, Running, until

pytestmark = [pytest.mark.servers, pytest.mark.timeout(300)]
LINES = 30
QUESTION = "How much is express shipping and how long does it take?"


def desk_with_an_endpoint(app: Path) -> Path:
    """The support desk, whose models' endpoint gathers for a second and is taken to answer within ten."""
    shutil.copytree(CHECKOUT / "examples" / "support_desk", app, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    models = yaml.safe_load((CHECKOUT / "config" / "models.yaml").read_text())["models"]
    for model in models.values():
        if "batch_endpoint" in model:
            model["batch_endpoint"] = {"gather_s": 1, "turnaround_s": 10}
    (app / "models.yaml").write_text(yaml.safe_dump({"models": models}), encoding="utf-8")
    return app


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    """The whole system. Where a server's program is missing, skips locally and fails in CI."""
    given: dict[str, Any] = {"data_dir": tmp_path / "data", "app_dir": desk_with_an_endpoint(tmp_path / "app")}
    try:
        with Stack(load_settings(environ={}, cwd=tmp_path, **given)) as stack:
            with MongoClient[dict[str, Any]](stack.settings["mongo_url"]) as mongo:
                seed(mongo[DEFAULT_DATABASE])
            yield Running(stack, "")
    except ConfigError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"needs the embedded servers: {error}")


def kill(running: Running, name: str) -> None:
    """SIGKILL; the stack starts it again."""
    (pid,) = [one["pid"] for one in running.stack.components() if one["name"] == name]
    os.kill(pid, signal.SIGKILL)


def calls(running: Running) -> list[dict[str, Any]]:
    """What the provider was paid for."""
    url = running.settings["openai_base_url"].removesuffix("/v1") + "/_calls"
    with urllib.request.urlopen(url) as answer:
        return [call for call in json.load(answer)["calls"] if call["status"] == 200]


def test_a_windowed_batch_is_joined_into_jobs_and_paid_once_whoever_dies(running: Running, tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    asked = [{"id": f"m-{n}", "input": QUESTION, "user": "cust-011"} for n in range(1, LINES + 1)]
    file.write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")
    order = ("--workflow", "support_desk", "--complete-by", "20m")
    submitted = running.agentq("batch", "submit", str(file), *order)
    assert submitted.returncode == 0, submitted.stderr
    batch_id = submitted.stdout.strip()
    with MongoClient[dict[str, Any]](running.mongo_url, tz_aware=True) as mongo:
        db = mongo[running.settings["mongo_database"]]

        def jobs(*status: str) -> int:
            return int(db["provider_jobs"].count_documents({"status": {"$in": status}}))

        until(lambda: jobs("sending", "sent", "done"), "calls are handed in")
        kill(running, "scheduler")
        until(lambda: jobs("done") >= 1, "answers are taken in", 120)
        for name in [one["name"] for one in running.stack.components() if one["name"].startswith("worker")]:
            kill(running, name)
        until(lambda: (db["batches"].find_one({"_id": batch_id}) or {})["status"] == "completed", "the batch ends", 200)
        batch = db["batches"].find_one({"_id": batch_id}) or {}
        runs = list(db["runs"].find({"batch.id": batch_id}))
    assert batch["counts"]["succeeded"] == LINES
    assert batch["cost_nano_usd"] == sum(run["usage"]["cost_nano_usd"] for run in runs) > 0
    made = calls(running)
    assert len(made) == sum(run["usage"]["llm_calls"] for run in runs)
    assert max(Counter(call["key"].rsplit("-", 1)[0] for call in made).values()) == 1, "no call twice"
    assert sum(call["batch"] != "" for call in made) > 0.9 * len(made), "only a step that lost its worker goes live"
    told = running.agentq("batch", "jobs").stdout
    assert f"{LINES} calls" in told
    assert "answered" in told
