"""A caller in another language: celery-node, by task name, through the same broker."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection, Queue
from pymongo import MongoClient

from agentq.embedded.process import spawn, stop_process
from agentq.embedded.rabbitmq import start_rabbitmq
from agentq.embedded.servers import start_redis
from agentq.protocol import INTAKE_QUEUE, POOLS
from tests.acceptance.running import CHECKOUT, Running, until

HERE = Path(__file__).parent / "node"


@pytest.fixture(scope="session")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the caller's program and exactly the packages of its lock file."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            if os.environ.get("CI"):
                pytest.fail(f"{program} is not installed, and CI must prove the other language")
            pytest.skip(f"{program} is not installed: apt-get install nodejs npm")
    folder = tmp_path_factory.mktemp("node")
    for file in HERE.glob("*.*"):
        if file.is_file():
            shutil.copy(file, folder)
    subprocess.run(
        ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"], cwd=folder, check=True, capture_output=True,
        timeout=110,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def reached(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Broker, result backend and database for celery-node.

    On RabbitMQ it always declares the queue it sends to, as a plain one, and finds answers in Redis only: so that queue
    is there before the worker, which takes it as it is (docs/brokers.md), and the worker stores results in Redis.
    """
    if running.on_redis:
        yield {"url": running.broker_url, "backend": running.broker_url, "database": running.settings["mongo_database"]}
        return
    home = tmp_path_factory.mktemp("node-rabbitmq")
    with start_rabbitmq(home / "rabbitmq") as rabbitmq, start_redis(home / "redis") as redis:
        with Connection(rabbitmq.url) as connection, connection.channel() as channel:
            Queue(INTAKE_QUEUE, durable=True)(channel).declare()
        env = {
            "AGENTQ_BROKER_URL": rabbitmq.url,
            "AGENTQ_RESULT_URL": redis.url,
            "AGENTQ_MONGO_URL": running.mongo_url,
            "AGENTQ_MONGO_DATABASE": "node",
            "AGENTQ_OPENAI_BASE_URL": running.settings["openai_base_url"],
            "AGENTQ_APP_DIR": running.settings["app_dir"],
            "AGENTQ_DATA_DIR": str(home),
            "AGENTQ_READY_FILE": str(home / "ready"),
        }
        argv = [sys.executable, "-m", "celery", "-A", "workers.app", "worker", "-Q", ",".join((*POOLS, INTAKE_QUEUE))]
        worker = spawn([*argv, "--without-gossip", "--without-mingle"], log_file=home / "log", env=env, cwd=CHECKOUT)
        try:
            until((home / "ready").exists, "the worker is ready")
            yield {"url": rabbitmq.url, "backend": redis.url, "database": "node"}
        finally:
            stop_process(worker, 20)


def node(job: dict[str, str], folder: Path, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    done = subprocess.run(
        ["node", "call.mjs"], cwd=folder, input=json.dumps({**job, "calls": calls}),
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def test_another_language_submits_asks_and_is_refused(
    running: Running, reached: dict[str, str], node_folder: Path
) -> None:
    """celery-node gets the run's id, the final answer, and an error with its reason for a bad request."""
    question = {"input": "Do you ship to Canada, and what does that cost?", "workflow": "support_desk"}
    submitted, asked, refused = node(
        reached,
        node_folder,
        [
            {"task": "agentq.submit", "request": question},
            {"task": "agentq.ask", "request": question},
            {"task": "agentq.ask", "request": {**question, "workflow": "no_such_workflow"}},
        ],
    )
    with MongoClient[dict[str, Any]](running.mongo_url) as connected:
        mongo = connected[reached["database"]]
        run = mongo["runs"].find_one({"_id": submitted["value"]})
        rejected = mongo["runs"].find_one({"metadata.task_id": refused["task_id"]})
    assert run is not None
    assert run["input"] == question["input"]
    assert asked["value"]["status"] == "succeeded"
    assert "19.90 USD" in asked["value"]["answer"]
    assert refused["error"] == "FAILURE"
    assert refused["type"] == "UnknownWorkflow"
    assert rejected is not None
    assert (rejected["status"], rejected["error"]["code"]) == ("rejected", "unknown_workflow")
