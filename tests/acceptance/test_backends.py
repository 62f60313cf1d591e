"""The examples of other back ends (examples/backends), each started as its page says, against the running system."""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import requests
from cronsim import CronSim
from pymongo.database import Database

from agentq.embedded.process import Process, spawn, stop_process
from tests.acceptance.running import CHECKOUT, Running, until
from tests.acceptance.test_celery_node import node_folder, reached  # noqa: F401 - fixtures

EXAMPLES = CHECKOUT / "examples" / "backends"
QUESTION = "How much is express shipping and how long does it take?"
PRICE = "12.90 USD"
QUICK_MS = 50


@pytest.fixture
def env(running: Running) -> dict[str, str]:
    return environment(running)


def environment(running: Running) -> dict[str, str]:
    """What an example is told: where agentq is, and which workflow it asks."""
    return {
        **os.environ, "PYTHONPATH": str(CHECKOUT), "PYTHONUNBUFFERED": "1", "WORKFLOW": "support_desk",
        "AGENTQ_MONGO_URL": running.mongo_url, "AGENTQ_BROKER_URL": running.broker_url,
        "AGENTQ_MONGO_DATABASE": running.settings["mongo_database"], "BROKER_URL": running.broker_url,
    }  # fmt: skip


def python(file: str, *words: str, env: dict[str, str]) -> str:
    """Run an example; what it prints."""
    command = [sys.executable, str(EXAMPLES / file), *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- web back ends --------------------------------------------------------------------------------------------------

COMMANDS = {
    "flask": lambda port: ["-m", "flask", "--app", str(EXAMPLES / "flask_app.py"), "run", "--port", str(port)],
    "django": lambda port: [str(EXAMPLES / "django_app.py"), "runserver", "--noreload", f"127.0.0.1:{port}"],
}


@dataclass(frozen=True)
class Site:
    """A web back end that runs."""

    url: str

    def ask(self, text: Any = QUESTION, key: str | None = None) -> requests.Response:
        headers = {} if key is None else {"Idempotency-Key": key}
        body = {"text": text, "user": "cust-011"}
        return requests.post(f"{self.url}/questions", json=body, headers=headers, timeout=30)

    def look(self, path: str) -> requests.Response:
        return requests.get(self.url + path, timeout=30)


@contextmanager
def site(kind: str, env: dict[str, str], folder: Path) -> Iterator[Site]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = spawn([sys.executable, *COMMANDS[kind](port)], cwd=CHECKOUT, env=env, log_file=folder / f"{kind}.log")
    found = Site(f"http://127.0.0.1:{port}")

    def serves() -> bool:
        assert process.poll() is None, (folder / f"{kind}.log").read_text()
        try:
            return found.look("/questions").status_code == 405
        except requests.ConnectionError:
            return False

    try:
        until(serves, f"{kind} serves")
        yield found
    finally:
        stop_process(process, 10)


@pytest.fixture(scope="module", params=COMMANDS)
def web(request: pytest.FixtureRequest, running: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(request.param, environment(running), tmp_path_factory.mktemp(request.param)) as found:
        yield found


def test_a_view_hands_in_a_question_and_another_shows_its_answer(web: Site) -> None:
    accepted = web.ask()
    assert accepted.status_code == 202, accepted.text
    assert PRICE in answered(web, accepted)


def answered(web: Site, accepted: requests.Response) -> str:
    """Wait for the answer to a question."""
    url = accepted.json()["url"]
    ended = until(lambda: (now := web.look(url).json())["status"] == "succeeded" and now, "the question is answered")
    return str(ended["answer"])


def test_the_same_key_is_the_same_run_and_another_question_under_it_is_refused(web: Site) -> None:
    key = uuid4().hex
    first, again, other = web.ask(key=key), web.ask(key=key), web.ask("Where is my order?", key=key)
    assert first.json()["run_id"] == again.json()["run_id"]
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")


@pytest.mark.parametrize(
    ("text", "code"), [("", "empty_input"), (5, "wrong_type"), ("bell \x07", "control_characters")]
)
def test_a_bad_question_is_422_with_its_code_and_what_to_do(web: Site, text: Any, code: str) -> None:
    refused = web.ask(text)
    assert refused.status_code == 422
    error = refused.json()["error"]
    assert error["code"] == code
    assert error["hint"]


def test_a_body_that_is_no_json_is_422_and_an_unknown_run_404(web: Site) -> None:
    refused = requests.post(f"{web.url}/questions", data="{", timeout=30)
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "empty_input")
    listed = requests.post(f"{web.url}/questions", json=["How much?"], timeout=30)
    assert (listed.status_code, listed.json()["error"]["code"]) == (422, "empty_input")
    unknown = web.look("/questions/r0")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "not_found")


def test_a_view_answers_at_once(web: Site) -> None:
    """Half of the requests within 50 ms, from the socket's opening to the answer's last byte; one run at a time."""
    took = []
    for _ in range(15):
        began = time.perf_counter()
        accepted = web.ask()
        took.append((time.perf_counter() - began) * 1000)
        answered(web, accepted)
    assert statistics.median(took) < QUICK_MS, f"{sorted(round(one) for one in took)} ms"


@pytest.mark.parametrize("kind", COMMANDS)
def test_without_a_database_the_view_says_503_soon_and_when_to_come_again(
    kind: str, env: dict[str, str], tmp_path: Path
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens on it
        env["AGENTQ_MONGO_URL"] = f"mongodb://127.0.0.1:{closed.getsockname()[1]}/?directConnection=true"
        with site(kind, env, tmp_path) as found:
            began = time.monotonic()
            refused = found.ask()
            assert time.monotonic() - began < 10
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "mongo_unavailable")
    assert refused.headers["Retry-After"] == "5"


# -- by task name ---------------------------------------------------------------------------------------------------


@pytest.fixture
def shop(env: dict[str, str], tmp_path: Path) -> Iterator[Path]:
    """The log of somebody else's Celery worker that serves the queue ``shop``."""
    log = tmp_path / "shop.log"
    words = ["-m", "celery", "-A", "examples.backends.celery_app", "worker", "-P", "threads", "-c", "1", "-Q", "shop"]
    process: Process = spawn([sys.executable, *words, "-l", "INFO"], cwd=CHECKOUT, env=env, log_file=log)
    try:
        until(lambda: " ready." in log.read_text(errors="replace"), "the shop's worker is ready")
        yield log
    finally:
        stop_process(process, 10)


def test_a_celery_application_asks_by_name_and_is_sent_its_follow_up_task(
    shop: Path, env: dict[str, str], mongo: Database[dict[str, Any]]
) -> None:
    """It shares no code; the follow-up comes to its own queue when the run has ended, with the run's id and status."""
    answer, run_id = python("celery_app.py", QUESTION, env=env).splitlines()
    assert json.loads(answer)["status"] == "succeeded"
    assert PRICE in json.loads(answer)["answer"]
    until(lambda: f"run {run_id} has succeeded" in shop.read_text(errors="replace"), "the follow-up has come")
    until(lambda: mongo["deliveries"].find_one({"subject": run_id, "status": "delivered"}), "its delivery is marked")
    assert PRICE not in shop.read_text(errors="replace"), "ids and the status travel, the answer does not"


def test_a_node_program_asks_by_name(env: dict[str, str], node_folder: Path, reached: dict[str, str]) -> None:  # noqa: F811
    ours, theirs = (
        json.loads((folder / "package-lock.json").read_text()) for folder in (EXAMPLES / "node", node_folder)
    )
    assert ours["packages"].keys() == theirs["packages"].keys(), "it runs with the packages of its own lock file"
    shutil.copy(EXAMPLES / "node" / "ask.mjs", node_folder)
    env |= {"BROKER_URL": reached["url"], "RESULT_URL": reached["backend"]}

    def ask(text: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["node", "ask.mjs", text],
            cwd=node_folder,
            env=env,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    answered, refused = ask(QUESTION), ask(" ")
    assert answered.returncode == 0, answered.stderr
    assert PRICE in json.loads(answered.stdout)["answer"]
    assert refused.returncode == 1
    assert "empty_input" in refused.stderr


def test_a_plain_message_is_enough_and_its_repetition_is_one_run(
    env: dict[str, str], mongo: Database[dict[str, Any]]
) -> None:
    key = f"mail-{uuid4().hex}"
    for _ in range(2):
        python("raw_kombu.py", key, QUESTION, env=env)
    run = until(lambda: mongo["runs"].find_one({"idempotency_key": key, "status": "succeeded"}), "the run has ended")
    assert PRICE in run["result"]["answer"]
    assert mongo["runs"].count_documents({"idempotency_key": key}) == 1


@pytest.mark.parametrize(("file", "words"), [("raw_kombu.py", ["mail-1"]), ("celery_app.py", [])])
def test_an_example_without_its_arguments_says_how_it_is_called(file: str, words: list[str]) -> None:
    for env in ({"BROKER_URL": "redis://127.0.0.1:1/0"}, {"BROKER_URL": ""}):
        command = [sys.executable, str(EXAMPLES / file), *words]
        done = subprocess.run(
            command, env={**os.environ, **env}, capture_output=True, text=True, timeout=100, check=False
        )
        assert done.returncode == 1
        assert done.stderr.startswith("usage: BROKER_URL=")
        assert len(done.stderr.splitlines()) == 1


# -- cron -----------------------------------------------------------------------------------------------------------


def test_cron_hands_in_a_file_once(running: Running, tmp_path: Path, mongo: Database[dict[str, Any]]) -> None:
    """The script of the crontab line: the file becomes a batch and is moved; after a crash before that it is the same
    batch, on another day another one. A file that is empty or refused stops no other."""
    [line] = [line for line in (EXAMPLES / "cron" / "crontab").read_text().splitlines() if not line.startswith("#")]
    *fields, command = line.split(None, 5)
    assert next(CronSim(" ".join(fields), datetime.now(UTC))), "cron understands when"
    assert command.endswith("examples/backends/cron/hand_in.sh")
    env = {
        **os.environ, "AGENTQ": str(CHECKOUT / "bin" / "agentq"), "OUTBOX": str(tmp_path),
        "AGENTQ_DATA_DIR": str(running.data_dir), "WORKFLOW": "support_desk",
    }  # fmt: skip
    questions = tmp_path / "questions.jsonl"

    def hand_in(code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [str(EXAMPLES / "cron" / "hand_in.sh")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == code, done.stderr
        return done

    def names(folder: str) -> set[str]:
        return {file.name for file in (tmp_path / folder).iterdir()}

    shutil.copy(EXAMPLES / "cron" / "questions.jsonl", questions)
    first = hand_in().stdout.strip()
    assert names("done") == {f"questions.{first}.jsonl"}
    (tmp_path / "done" / f"questions.{first}.jsonl").rename(questions)  # as if killed before it was moved
    assert hand_in().stdout.strip() == first

    days = [first]
    for day in (2, 3):
        shutil.copy(EXAMPLES / "cron" / "questions.jsonl", questions)
        (tmp_path / "a-empty.jsonl").touch()
        (tmp_path / "b-refused.jsonl").mkdir()
        done = hand_in(1)
        days.append(done.stdout.strip())
        assert names("done") == {f"questions.{batch}.jsonl" for batch in days}
        assert len(days) == len(set(days)) == day
        for name in ("a-empty.jsonl", "b-refused.jsonl"):
            assert f"{name} was not handed in" in done.stderr
            assert name in names("failed")
        (tmp_path / "failed" / "b-refused.jsonl").rmdir()
    assert "a-empty.jsonl.~1~" in names("failed"), "what failed earlier is not overwritten"

    last = tmp_path / "done" / f"questions.{days[-1]}.jsonl"
    last.rename(questions)
    assert hand_in().stdout.strip() == days[-1], "killed before the move, it is the same batch on another day as well"
    for batch in days:
        until(lambda batch=batch: mongo["batches"].find_one({"_id": batch, "status": "completed"}), "the batch is done")  # type: ignore[misc]
        answers = [run["result"]["answer"] for run in mongo["runs"].find({"batch.id": batch})]
        assert len(answers) == 2
        assert any(PRICE in answer for answer in answers)

    questions.touch()
    env["AGENTQ_DATA_DIR"] = str(tmp_path / "nobody")
    assert "No agentq is running" in hand_in(2).stderr
    assert questions.exists(), "where nobody answers, the files stay"
