"""A caller in another language: celery-node, by task name, through the same broker."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pymongo.database import Database

from tests.acceptance.running import Running

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


def node(running: Running, folder: Path, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    done = subprocess.run(
        ["node", "call.mjs"], cwd=folder, input=json.dumps({"url": running.broker_url, "calls": calls}),
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def test_another_language_submits_asks_and_is_refused(
    running: Running, node_folder: Path, mongo: Database[dict[str, Any]]
) -> None:
    """celery-node gets the run's id, the final answer, and an error with its reason for a bad request."""
    question = {"input": "Do you ship to Canada, and what does that cost?", "workflow": "support_desk"}
    submitted, asked, refused = node(
        running,
        node_folder,
        [
            {"task": "agentq.submit", "request": question},
            {"task": "agentq.ask", "request": question},
            {"task": "agentq.ask", "request": {**question, "workflow": "no_such_workflow"}},
        ],
    )
    run = mongo["runs"].find_one({"_id": submitted["value"]})
    assert run is not None
    assert run["input"] == question["input"]
    assert asked["value"]["status"] == "succeeded"
    assert "19.90 USD" in asked["value"]["answer"]
    assert refused["error"] == "FAILURE"
    assert refused["type"] == "UnknownWorkflow"
    rejected = mongo["runs"].find_one({"metadata.task_id": refused["task_id"]})
    assert rejected is not None
    assert (rejected["status"], rejected["error"]["code"]) == ("rejected", "unknown_workflow")
