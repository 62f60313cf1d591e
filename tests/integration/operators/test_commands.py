"""The operators' commands beside a running system, as a person uses them: another process, its output, its exit code.

The page docs/operations.md shows these commands; what it promises of each is checked here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from celery import Celery
from kombu import Connection
from pymongo import MongoClient

from agentq.client import Client, Handle
from agentq.embedded.stack import Stack
from agentq.errors import ConfigError
from agentq.protocol import INTAKE_QUEUE
from config.settings import load_settings
from tests.integration.operators.tools import POSTED

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[2]
BROKEN = "the model is broken today"
SLOWLY = "in-your-own-time"
RULES = [
    {"match": {"model": "flaky-1"}, "action": {"status": 400}},
    {"match": {"contains": BROKEN}, "action": {"status": 400}, "times": 3},
    {"match": {"contains": SLOWLY}, "action": {"latency_ms": 4000}},
]

pytestmark = [pytest.mark.servers, pytest.mark.slow]


@dataclass(frozen=True)
class System:
    """A running system with its client and its command line."""

    settings: dict[str, str]
    data_dir: Path
    posted: Path
    client: Client

    def agentq(self, *words: str, editor: str | None = None) -> subprocess.CompletedProcess[str]:
        environ = {**os.environ, "AGENTQ_DATA_DIR": str(self.data_dir), "COLUMNS": "200"}
        for name in ("EDITOR", "VISUAL"):
            environ.pop(name, None)
        if editor is not None:
            environ |= {"EDITOR": editor, "VISUAL": editor}
        return subprocess.run(
            [sys.executable, "-m", "agentq.cli", *words],
            cwd=CHECKOUT, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100,
            check=False,
        )  # fmt: skip

    def ok(self, *words: str, **options: Any) -> str:
        """What a command prints that must succeed."""
        done = self.agentq(*words, **options)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def wrong(self, *words: str) -> str:
        """The one sentence (and its hint) of a command that is refused."""
        done = self.agentq(*words)
        assert done.returncode == 2, f"{words}: {done.returncode} {done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
        return re.sub(r"\x1b\[[0-9;]*m", "", done.stderr)

    def letters(self, *words: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.ok("dlq", "list", "--json", *words).splitlines()]

    def audited(self, run_id: str) -> list[str]:
        return [event["type"] for event in self.client.events(run_id)]


def until(condition: Callable[[], Any], what: str, timeout_s: float = 60) -> Any:
    deadline, pause = time.monotonic() + timeout_s, threading.Event()
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        pause.wait(0.05)
    return value


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    home = tmp_path_factory.mktemp("operators")
    scenario = home / "scenario.yaml"
    scenario.write_text(yaml.safe_dump({"rules": RULES}), encoding="utf-8")
    settings = load_settings(environ={}, cwd=home, data_dir=home / "data", app_dir=HERE / "app", lease_s=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(POSTED, str(home / "posted"))
        try:
            stack = Stack(settings, scenario=scenario)
        except ConfigError as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"needs the embedded servers: {error}")
        with stack:
            at = stack.settings
            with Client(at["mongo_url"], at["broker_url"], at["mongo_database"]) as client:
                yield System(at, home / "data", home / "posted", client)


def failed(system: System, workflow: str, text: str = "How are you?", **fields: Any) -> Handle:
    run = system.client.submit(text, workflow=workflow, **fields)
    assert run.wait(60).status == "failed"
    return run


def test_a_failed_run_is_listed_shown_edited_and_goes_on(system: System) -> None:
    """The model of its agent fails for good; another model of the catalog finishes the run."""
    tenant = f"t{uuid4().hex[:8]}"
    run = failed(system, "trial", tenant=tenant)
    (letter,) = system.letters("--tenant", tenant)
    assert (letter["run_id"], letter["kind"], letter["step"]) == (run.run_id, "quarantined", "s1 turn")
    assert system.letters("--tenant", tenant, "--code", "other") == []
    assert len(system.letters("--tenant", tenant, "--since", "1h", "--workflow", "trial")) == 1
    shown = system.ok("dlq", "show", run.run_id)
    assert "model: flaky" in shown
    assert f"agentq dlq retry {run.run_id}" in shown
    assert "nothing was changed" in system.ok("dlq", "retry", run.run_id, "--dry-run")
    assert run.status() == "failed"
    assert "no model 'nobody'" in system.wrong("dlq", "edit", run.run_id, "--model", "nobody")
    system.ok("dlq", "edit", run.run_id, "--model", "strong")
    assert run.wait(60).status == "succeeded"
    assert system.letters("--tenant", tenant) == []
    assert system.audited(run.run_id)[-3:] == ["run.redriven", "agent.turn", "run.succeeded"]
    told = next(event for event in system.client.events(run.run_id) if event["type"] == "run.redriven")
    assert told["data"]["by"]
    assert "every chain is whole" in system.ok("audit", "verify", run.run_id)
    assert "no dead letter" in system.wrong("dlq", "show", run.run_id)


def test_many_are_retried_behind_a_canary_that_tells_whether_the_cause_is_gone(system: System) -> None:
    tenant = f"t{uuid4().hex[:8]}"
    runs = [failed(system, "desk", f"Hello {number}, {BROKEN}.", tenant=tenant) for number in range(3)]
    dry = system.ok("dlq", "retry", "--tenant", tenant, "--dry-run")
    assert "3 would be retried" in dry
    assert "--yes" in system.wrong("dlq", "retry", "--tenant", tenant)
    assert "Which ones?" in system.wrong("dlq", "retry")
    done = system.ok("dlq", "retry", "--tenant", tenant, "--canary", "1", "--rate", "20", "--yes")
    assert "3 of 3 go on" in done
    assert [run.wait(60).status for run in runs] == ["succeeded"] * 3

    for _ in range(2):
        failed(system, "trial", tenant=tenant)
    stopped = system.agentq("dlq", "retry", "--tenant", tenant, "--canary", "1", "--yes")
    assert stopped.returncode == 1
    assert "stopped after the canaries" in stopped.stderr
    assert len(system.letters("--tenant", tenant)) == 2, "one failed again, one was left alone"
    system.ok("dlq", "drop", "--tenant", tenant, "--reason", "no such model", "--yes")
    assert system.letters("--tenant", tenant) == []


def test_a_run_that_a_limit_stopped_goes_on_under_a_higher_one_from_the_editor(system: System) -> None:
    run = failed(system, "short")
    assert "would stop again" in system.wrong("dlq", "retry", run.run_id)
    assert "What is to be edited?" in system.wrong("dlq", "edit", run.run_id)
    assert system.agentq("dlq", "edit", run.run_id, editor="true").returncode == 2, "nothing was saved"
    system.ok("dlq", "edit", run.run_id, editor="sed -i s/run.max_steps:.*/run.max_steps:\\ 9/")
    assert run.wait(60).status == "succeeded"
    assert system.audited(run.run_id).count("tool.called") == 1


@pytest.mark.parametrize("happened", [True, False])
def test_a_call_of_which_nobody_knows_waits_for_a_person(system: System, happened: bool) -> None:
    """The worker dies in the tool. The step is held; a person says whether it happened."""
    tenant, text = f"t{uuid4().hex[:8]}", f"letter {uuid4().hex}"
    run = system.client.submit(text, workflow="letter", tenant=tenant)
    until(lambda: system.letters("--tenant", tenant), "the step is held")
    (letter,) = system.letters("--tenant", tenant, "--kind", "held")
    assert (letter["code"], letter["step"]) == ("outcome_unknown", "s1 post_letter")
    assert text in system.ok("dlq", "show", run.run_id)
    stuck = system.ok("runs", "--stuck")
    assert f"agentq dlq resolve {run.run_id} --step s1 --result TEXT" in stuck
    if happened:
        system.ok("dlq", "resolve", run.run_id, "--result", "posted, says the clerk")
    else:
        system.ok("dlq", "retry", run.run_id)
    assert run.wait(60).status == "succeeded"
    posted = system.posted.read_text(encoding="utf-8").splitlines()
    assert posted.count(text) == (1 if happened else 2)
    assert system.audited(run.run_id)[1:5] == ["step.lost", "step.held", "step.released", "tool.called"]


def test_a_paused_run_stands_still_until_it_is_resumed(system: System) -> None:
    run = system.client.submit(f"Answer {SLOWLY}.", workflow="relay")
    until(lambda: run.status() == "running", "somebody works on it")
    system.ok("pause", run.run_id, "--reason", "maintenance")
    until(lambda: "agent.turn" in system.audited(run.run_id), "the step that was under way is finished and kept")
    assert run.status() == "paused"
    assert "paused already" in system.wrong("pause", run.run_id)
    assert f"agentq resume {run.run_id}" in system.ok("runs", "--stuck")
    assert "maintenance" in system.ok("show", run.run_id)
    system.ok("resume", run.run_id)
    assert run.wait(60).status == "succeeded"
    assert "not paused" in system.wrong("resume", run.run_id)
    assert system.audited(run.run_id)[1:5] == ["run.paused", "agent.turn", "run.resumed", "agent.turn"]


def test_a_fork_begins_in_the_middle_and_leaves_its_original_alone(system: System, tmp_path: Path) -> None:
    run = system.client.submit("What is the capital of France?", workflow="short")
    assert run.wait(60).status == "failed"
    with MongoClient[dict[str, Any]](system.settings["mongo_url"], tz_aware=True) as mongo:
        runs = mongo[system.settings["mongo_database"]]["runs"]
        until(lambda: (runs.find_one({"_id": run.run_id}) or {})["next_due"] is None, "the original is settled")
        before = runs.find_one({"_id": run.run_id})
        prompt = tmp_path / "prompt.txt"
        prompt.write_text("Answer in one word.", encoding="utf-8")
        forked = system.agentq("fork", run.run_id, "--from", "s1", "--limit", "max_steps=9", "--wait", "--json")
        assert forked.returncode == 0, forked.stderr
        assert "called again, for real (look_up at once)" in forked.stderr
        new = json.loads(forked.stdout)
        assert new["status"] == "succeeded"
        assert runs.find_one({"_id": run.run_id}) == before
    assert system.audited(new["run_id"])[0] == "run.forked"
    assert f"of {run.run_id}, from step s1" in system.ok("show", new["run_id"])
    assert "no step 's9'" in system.wrong("fork", run.run_id, "--from", "s9")
    once = system.ok("fork", new["run_id"], "--from", "s2", "--prompt-file", str(prompt)).strip()
    assert system.client.run(once).wait(60).status == "succeeded"


def test_a_refused_request_is_corrected_and_handed_in_again(system: System) -> None:
    """Its body is kept in MongoDB, shown, edited, accepted; the record of the refusal names the new run."""
    celery = Celery("elsewhere", broker=system.settings["broker_url"], set_as_current=False)
    celery.send_task("agentq.submit", kwargs={"request": {"input": "Hello", "workflow": "dask"}}, queue=INTAKE_QUEUE)
    code = ("--kind", "rejected", "--code", "unknown_workflow")
    (letter,) = until(lambda: system.letters(*code), "the refusal is recorded")
    run_id = letter["run_id"]
    assert "workflow: dask" in system.ok("dlq", "show", run_id)
    assert "no workflow 'dask'" in system.wrong("dlq", "retry", run_id)
    new_id = system.ok("dlq", "edit", run_id, "--set", "request.workflow=desk").strip()
    assert system.client.run(new_id).wait(60).status == "succeeded"
    assert system.letters(*code) == []
    assert f"handed in again as run {new_id}" in system.ok("dlq", "show", run_id)
    assert system.audited(run_id) == ["run.rejected", "run.handed_in_again"]


def test_what_is_no_json_is_not_kept_and_the_list_says_so(system: System) -> None:
    with Connection(system.settings["broker_url"]) as connection, connection.Producer() as producer:
        producer.publish(
            b"\xff\xfe not json", routing_key=INTAKE_QUEUE, exchange="", content_type="application/json",
            content_encoding="utf-8", headers={"task": "agentq.submit", "id": f"poison-{uuid4()}"},
        )  # fmt: skip

    def poison() -> list[dict[str, Any]]:
        return [one for one in system.letters("--kind", "rejected") if one["code"] != "unknown_workflow"]

    letter = until(poison, "the poison is recorded")[0]
    assert "not kept: it was no JSON" in system.ok("dlq", "show", letter["run_id"])
    assert "was not kept" in system.wrong("dlq", "retry", letter["run_id"])
    system.ok("dlq", "drop", letter["run_id"])
    assert poison() == []


def test_nothing_is_settled_after_a_restore_while_the_system_runs(system: System) -> None:
    assert "Still alive" in system.wrong("restore-check", "--apply")


def test_mistakes_are_said_in_one_sentence(system: System) -> None:
    for words, said in (
        (("pause", "r0"), "no run 'r0'"),
        (("dlq", "show", "r0"), "no run 'r0'"),
        (("dlq", "retry", "r0"), "no run 'r0'"),
        (("dlq", "resolve", "r0", "--result", "x"), "no run 'r0'"),
        (("dlq", "list", "--since", "soon"), "is no time"),
        (("fork", "r0", "--from", "s1", "--limit", "many"), "NAME=VALUE"),
    ):
        assert said in system.wrong(*words), words
