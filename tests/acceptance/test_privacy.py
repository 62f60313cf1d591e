"""Nothing personal leaves MongoDB: a unique string in a request and in an answer is looked for everywhere else.

A request that comes through the Client or the command line never passes the broker. One that a foreign application
sends by task name necessarily does, once, as the body of its message (``send_task`` puts it there): it must be gone
from the broker's queues as soon as it is accepted, and it must not show in Flower or in a log at any time. The answer
of ``agentq.ask`` is stored in the result backend, where its caller fetches it; that is its purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery
from pymongo import MongoClient
from pymongo.database import Database

from agentq.client import Client
from tests.acceptance.running import INVENT, SLOWLY, Running, until

Places = dict[str, Callable[[], bytes]]


@pytest.fixture
def places(running: Running) -> Places:
    """Everywhere that something could have leaked to."""
    return {
        "the broker": running.broker_content,
        "the broker's file": running.broker_file,
        "Flower": running.flower_everything,
        "a log": running.logs,
    }


@pytest.fixture
def settled(running: Running) -> Callable[[], None]:
    """Waits until Flower has seen the end of every task that began since the test did."""
    before = set(running.flower_json("/api/tasks?limit=10000"))
    ended = {"SUCCESS", "FAILURE", "IGNORED", "REJECTED", "REVOKED"}

    def wait() -> None:
        until(lambda: all(one["state"] in ended for one in news()), "Flower has seen the end of every task")

    def news() -> list[dict[str, Any]]:
        return [one for name, one in running.flower_json("/api/tasks?limit=10000").items() if name not in before]

    return wait


def nowhere(canary: str, places: Places) -> None:
    for name, content in places.items():
        found = content()
        place = found.find(canary.encode())
        assert place < 0, f"it is in {name}: {found[max(0, place - 300) : place + 100]!r}"


def text(canary: str, how: str) -> str:
    return f"My name is {canary}. Do it {how}: how much is express shipping?"


def test_a_request_by_client_is_nowhere_but_in_mongodb(
    running: Running, client: Client, places: Places, settled: Callable[[], None], mongo: Database[dict[str, Any]]
) -> None:
    """Neither the request nor the answer, while an agent is at work on it and after it has ended."""
    canary = f"canary{uuid4().hex}"
    run = client.submit(text(canary, SLOWLY), workflow="support_desk", user="cust-011", metadata={"note": canary})
    until(lambda: _in_flight(mongo, run.run_id), "the agent is at work")
    nowhere(canary, places)
    assert run.status() == "running", "it was looked for while the run was at work"
    answered = client.submit(text(canary, INVENT), workflow="support_desk", user="cust-011")
    assert run.wait(90).status == "succeeded"
    outcome = answered.wait(90)
    assert running.invention in str(outcome.answer), "the answer has to carry what is looked for"
    settled()
    nowhere(canary, places)
    nowhere(running.invention, places)
    stored = mongo["runs"].find_one({"_id": run.run_id})
    assert canary in str(stored), "it has to be found where it belongs, or the search is worth nothing"


def test_a_request_by_command_line_is_nowhere_but_in_mongodb(
    running: Running, places: Places, settled: Callable[[], None]
) -> None:
    canary = f"canary{uuid4().hex}"
    done = running.agentq("submit", "--workflow", "support_desk", "--user", "cust-011", "--wait", text(canary, INVENT))
    assert done.returncode == 0, done.stderr
    settled()
    nowhere(canary, places)
    nowhere(running.invention, places)


@pytest.mark.parametrize("field", ["input", "inptu"], ids=["accepted", "rejected"])
def test_a_request_by_task_name_passes_the_broker_once_and_shows_nowhere(
    field: str, running: Running, places: Places, settled: Callable[[], None], mongo: Database[dict[str, Any]]
) -> None:
    """Its body is gone from the broker's queues once it was accepted or rejected, and never in Flower or in a log."""
    canary = f"canary{uuid4().hex}"
    app = Celery("shop", broker=running.broker_url, backend=running.result_backend, set_as_current=False)
    request = {field: text(canary, SLOWLY), "workflow": "support_desk", "user": "cust-011"}
    with app, ExitStack() as waiting:
        sent = app.send_task("agentq.submit", kwargs={"request": request}, **running.sending)
        if not running.on_redis:
            backend: Any = app.backend
            waiting.callback(backend.result_consumer.stop)  # Celery leaves its connection open
        sent.get(timeout=60, propagate=False)
        if field == "input":
            until(lambda: _in_flight(mongo, sent.result), "the agent is at work")
        in_file = places.pop("the broker's file")
        nowhere(canary, places)
        if field == "input":
            run_id = sent.result
            until(lambda: mongo["runs"].find_one({"_id": run_id, "status": "succeeded"}), "the run has ended")
        settled()
        nowhere(canary, places)
        assert canary.encode() in in_file(), "the message did pass through the broker: the search would have found it"


def test_mongodb_does_not_write_slow_commands_to_its_log(running: Running) -> None:
    """MongoDB logs a command that takes longer than ``slowms`` with what it was to write."""
    with MongoClient[dict[str, Any]](running.mongo_url) as mongo:
        profile = mongo["admin"].command("profile", -1)
    assert profile["was"] == 0
    assert profile["slowms"] >= 3_600_000, "a slow write would show the text of a run in mongodb.log"


def _in_flight(mongo: Database[dict[str, Any]], run_id: str) -> bool:
    """Does somebody hold the lease on an agent's turn?"""
    run = mongo["runs"].find_one({"_id": run_id})
    return run is not None and any(run["steps"].get(step, {}).get("kind") == "turn" for step in run["leases"])
