"""A Celery application of somebody else, with no code of ours: it sends tasks by name and gets its results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from kombu import Connection
from pymongo.database import Database
from redis import Redis

from agentq.protocol import INTAKE_QUEUE, MAX_INPUT_BYTES
from tests.acceptance.running import Running, until
from workers.queues import DEAD_QUEUE

# The whole program of the other back end.
FOREIGN = """
import json, sys, time, uuid
from celery import Celery

job = json.load(sys.stdin)
app = Celery("shop", broker=job["url"], backend=job["backend"])


def send(call):
    if "raw" not in call:
        return app.send_task(call["task"], args=call.get("args"), kwargs=call.get("kwargs"), **job["sending"])
    task_id = str(uuid.uuid4())
    headers = {"lang": "py", "task": call["task"], "id": task_id, "root_id": task_id, "retries": 0}
    with app.producer_pool.acquire() as producer:
        app.backend.on_task_call(producer, task_id)
        producer.publish(
            call["raw"], exchange="", routing_key="agentq", content_type="application/json", content_encoding="utf-8",
            headers=headers, correlation_id=task_id, reply_to=app.thread_oid,
        )
    return app.AsyncResult(task_id)


def outcome(result):
    try:
        return {"task_id": result.id, "value": result.get(timeout=max(1, until - time.monotonic()))}
    except Exception as error:
        return {"task_id": result.id, "error": type(error).__name__, "message": str(error)}


until = time.monotonic() + 40
sent = [send(call) for call in job["calls"]]
outcomes = [outcome(result) for result in sent]
ours = [name for name in sys.modules if name.split(".")[0] in ("agentq", "workers", "schemas", "config")]
json.dump({"outcomes": outcomes, "ours": ours}, sys.stdout)
"""


def foreign(running: Running, folder: Path, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each call gave the foreign application: ``task_id`` and ``value``, or ``error`` and ``message``."""
    script = folder / "shop.py"
    script.write_text(FOREIGN, encoding="utf-8")
    job = json.dumps(
        {"url": running.broker_url, "backend": running.result_backend, "sending": running.sending, "calls": calls}
    )
    done = subprocess.run(
        [sys.executable, str(script)], cwd=folder, input=job, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["ours"] == [], "the foreign application must share no code with us"
    return list(answer["outcomes"])


QUESTION = {
    "input": "How much is express shipping and how long does it take?",
    "workflow": "support_desk",
    "user": "cust-011",
}


def test_submit_by_name_gives_the_run_and_ask_by_name_the_answer(
    running: Running, tmp_path: Path, mongo: Database[dict[str, Any]]
) -> None:
    """``agentq.submit`` answers with the run's id at once, ``agentq.ask`` with the run's outcome when it has ended."""
    submitted, asked = foreign(
        running,
        tmp_path,
        [
            {"task": "agentq.submit", "kwargs": {"request": QUESTION}},
            {"task": "agentq.ask", "kwargs": {"request": QUESTION}},
        ],
    )
    run = mongo["runs"].find_one({"_id": submitted["value"]})
    assert run is not None
    assert run["input"] == QUESTION["input"]
    answer = asked["value"]
    assert answer["status"] == "succeeded"
    assert "12.90 USD" in answer["answer"]
    assert answer["citations"] == ["KB-013"]
    assert answer["agent"] == "orders"
    assert answer["error"] is None
    assert answer["cost_usd"] > 0


def test_an_application_that_declares_our_queue_as_its_own_is_told_so(running: Running, tmp_path: Path) -> None:
    """Celery declares the queue it sends to, as a plain one. On RabbitMQ that is an error at the caller, who finds in
    docs/brokers.md to add ``declare=[]``; nothing else suffers. Redis has only one kind of queue."""
    script = tmp_path / "careless.py"
    script.write_text(
        "import sys\nfrom celery import Celery\napp = Celery('shop', broker=sys.argv[1])\n"
        "app.send_task('agentq.submit', kwargs={'request': {'input': ''}}, queue='agentq', ignore_result=True)\n"
    )
    argv = [sys.executable, str(script), running.broker_url]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    if running.on_redis:
        assert done.returncode == 0, done.stderr
    else:
        assert "PRECONDITION_FAILED" in done.stderr
    good = {"task": "agentq.ask", "kwargs": {"request": QUESTION}}
    assert foreign(running, tmp_path, [good])[0]["value"]["status"] == "succeeded"


def test_a_request_by_name_is_accepted_once_for_its_idempotency_key(running: Running, tmp_path: Path) -> None:
    """The same key gives the same run; another body under that key is refused."""
    keyed = {**QUESTION, "idempotency_key": f"mail-{tmp_path.name}"}
    calls = [keyed, keyed, {**keyed, "input": "Something else"}]
    first, again, other = foreign(
        running, tmp_path, [{"task": "agentq.submit", "kwargs": {"request": request}} for request in calls]
    )
    values = {outcome["value"] for outcome in (first, again, other) if "value" in outcome}
    assert len(values) == 1
    refused = [outcome for outcome in (first, again, other) if "error" in outcome]
    assert [outcome["error"] for outcome in refused] == ["IdempotencyConflict"]


def _request(**fields: Any) -> dict[str, Any]:
    return {"kwargs": {"request": {"input": "Hello", **fields}}}


DEEP = 10_000
# What is sent, and the code that the visible, rejected run carries.
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "too_large": (_request(input="x" * (MAX_INPUT_BYTES + 1)), "input_too_large"),
    "metadata_too_large": (_request(metadata={"note": "x" * 20_000}), "metadata_too_large"),
    "request_is_text": ({"kwargs": {"request": "Hello"}}, "wrong_type"),
    "request_is_a_list": ({"kwargs": {"request": ["Hello"]}}, "wrong_type"),
    "input_is_a_number": (_request(input=5), "wrong_type"),
    "no_input": ({"kwargs": {"request": {}}}, "missing_field"),
    "empty": (_request(input=""), "empty_input"),
    "only_blanks": (_request(input=" \n\t "), "empty_input"),
    "unknown_field": (_request(inptu="typo"), "unknown_field"),
    "unknown_workflow": (_request(workflow="no_such_workflow"), "unknown_workflow"),
    "not_a_budget": (_request(budget_usd=-1), "invalid_value"),
    "control_character": (_request(input="bell \x07"), "control_characters"),
    "zero_character": (_request(metadata={"note": "a\x00b"}), "control_characters"),
    "lone_surrogate": (_request(input="\ud800"), "control_characters"),
    "deep": (_request(metadata=json.loads('{"a":' * 40 + "1" + "}" * 40)), "too_deep"),
    "very_deep": (
        {"raw": '[[], {"request": {"input": "Hello", "metadata": {"a": ' + "[" * DEEP + "]" * DEEP + "}}}, {}]"},
        "too_deep",
    ),
    "no_json": ({"raw": '[[], {"request": '}, "undecodable"),
    "no_arguments": ({}, "wrong_arguments"),
    "positional_text": ({"args": ["Hello"]}, "wrong_type"),
    "too_many_arguments": ({"args": [{"input": "Hello"}, {"input": "Hello"}]}, "wrong_arguments"),
    "mistyped_argument": ({"kwargs": {"reqest": {"input": "Hello"}}}, "wrong_arguments"),
    "unknown_task": ({"task": "agentq.sumbit", **_request()}, "unknown_task"),
}


@pytest.fixture(scope="module")
def refused(running: Running, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the foreign application got for each bad request, all sent at once, a good one behind them."""
    calls = [{"task": "agentq.submit", **call} for call, _ in BAD.values()]
    good = {"task": "agentq.ask", "kwargs": {"request": QUESTION}}
    pid = running.pids()["router"]
    outcomes = foreign(running, tmp_path_factory.mktemp("bad"), [*calls, good])
    assert outcomes[-1]["value"]["status"] == "succeeded", "the worker must go on serving"
    assert running.pids()["router"] == pid, "the worker must not have died"
    return dict(zip(BAD, outcomes, strict=False))


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_ends_as_a_visible_rejected_run_and_its_caller_hears_it(
    name: str, refused: dict[str, dict[str, Any]], mongo: Database[dict[str, Any]]
) -> None:
    """Whatever its shape: a rejected run with a stable code, an exception at the caller. The body is kept in one place
    only, where an operator can correct it."""
    outcome = refused[name]
    assert "error" in outcome, f"the caller was told nothing but {outcome}"
    assert "TimeoutError" not in outcome["error"]
    run = mongo["runs"].find_one({"metadata.task_id": outcome["task_id"]})
    assert run is not None, f"no run was recorded; the caller got {outcome}"
    assert run["status"] == "rejected"
    assert run["error"]["code"] == BAD[name][1]
    assert run["error"]["hint"]
    kept = run.pop("refused")
    assert kept["code"] == BAD[name][1]
    assert "Hello" not in json.dumps(run, default=str), run


# Bodies that are JSON but no Celery message of protocol 2, [args, kwargs, embed]. One of them in a queue must not
# become the death of every worker that takes it up.
POISON = {
    "object": '{"request": {"input": "Hello"}}',
    "null": "null",
    "number": "5",
    "text": '"Hello"',
    "short": "[[]]",
    "arguments_are_numbers": "[5, 5, {}]",
    "arguments_are_swapped": '[{"request": {"input": "Hello"}}, [], {}]',
    "embed_is_text": '[[], {"request": {"input": "Hello"}}, "x"]',
}


@pytest.mark.parametrize("shape", POISON)
def test_a_poison_message_is_refused_and_its_worker_lives_on(
    shape: str, running: Running, tmp_path: Path, mongo: Database[dict[str, Any]]
) -> None:
    """A body of the wrong shape under the name of a real task: a visible rejected run, and the same worker goes on."""
    pid, task_id = running.pids()["router"], str(uuid4())

    def rejected() -> dict[str, Any] | None:
        if running.pids()["router"] != pid:
            _remove_poison(running)  # so that it fails this test only, not all that follow
            pytest.fail("the message killed the worker")
        return mongo["runs"].find_one({"metadata.task_id": task_id})

    _send_raw(running, POISON[shape], task_id)
    run = until(rejected, "the message is recorded as rejected", 20)
    assert run is not None
    assert run["status"] == "rejected"
    assert run["error"]["code"] in {"invalid_message", "wrong_arguments", "wrong_type"}
    good = {"task": "agentq.ask", "kwargs": {"request": QUESTION}}
    assert foreign(running, tmp_path, [good])[0]["value"]["status"] == "succeeded"
    assert running.pids()["router"] == pid


# Messages whose envelope is wrong, whatever is in them: options for the publisher.
ENVELOPES: dict[str, dict[str, Any]] = {
    "pickle": {"content_type": "application/x-python-serialize", "content_encoding": "binary"},
    "unknown_content_type": {"content_type": "application/x-nothing"},
    "unknown_encoding": {"content_encoding": "martian"},
    "no_content_type": {"content_type": "", "content_encoding": ""},
    "not_compressed": {"headers": {"compression": "application/x-gzip"}},
    "no_task": {"headers": {"task": None}},
    "task_is_an_object": {"headers": {"task": {"a": [1]}}},
    "time_is_text": {"headers": {"eta": "yesterday", "expires": "never"}},
    "time_is_a_list": {"headers": {"eta": [1]}},
    "limits_are_text": {"headers": {"timelimit": "soon"}},
    "retries_is_text": {"headers": {"retries": "many"}},
    "group_is_a_number": {"headers": {"group": 5}},
    "shadow_is_an_object": {"headers": {"shadow": {"a": 1}}},
    "answers_into_a_pool": {"reply_to": "router"},
    "ten_megabytes": {"padding": 10_000_000},
}


@pytest.mark.parametrize("shape", ENVELOPES)
def test_a_poison_envelope_does_no_harm(
    shape: str, running: Running, tmp_path: Path, mongo: Database[dict[str, Any]]
) -> None:
    """A message whose headers or properties are wrong: refused visibly, or accepted where it can be."""
    pid, task_id = running.pids()["router"], str(uuid4())
    options = dict(ENVELOPES[shape])
    text = "x" * options.pop("padding", 0)
    _send_raw(running, json.dumps([[], {"request": {"input": f"Hello {text}"}}, {}]), task_id, **options)
    key = {"$or": [{"metadata.task_id": task_id}, {"idempotency_key": f"celery:{task_id}"}]}

    def recorded() -> dict[str, Any] | None:
        if running.pids()["router"] != pid:
            _remove_poison(running)
            pytest.fail("the message killed the worker")
        return mongo["runs"].find_one(key)

    run = until(recorded, "the message is recorded", 20)
    assert run is not None
    if shape not in ("unknown_encoding", "group_is_a_number", "answers_into_a_pool"):
        assert run["status"] == "rejected", run["status"]
        assert run["error"]["code"] in {"undecodable", "invalid_message", "unknown_task", "input_too_large"}
    good = {"task": "agentq.ask", "kwargs": {"request": QUESTION}}
    assert foreign(running, tmp_path, [good])[0]["value"]["status"] == "succeeded"
    assert running.pids()["router"] == pid


def test_what_rabbitmq_handed_out_too_often_is_a_rejected_run_or_a_dropped_hint(
    running: Running, mongo: Database[dict[str, Any]]
) -> None:
    """Redis has no such limit. Requests exist nowhere else, so a dead one is recorded; a hint is only a hint."""
    if running.on_redis:
        pytest.skip("only RabbitMQ counts how often it hands a message out")
    request, hints = str(uuid4()), str(uuid4())
    good = json.dumps([[], {"request": {"input": "Hello"}}, {}])
    _send_raw(running, json.dumps([[], {"hints": []}, {}]), hints, queue=DEAD_QUEUE, headers={"task": "agentq.router"})
    _send_raw(running, good, request, queue=DEAD_QUEUE)
    run = until(lambda: mongo["runs"].find_one({"metadata.task_id": request}), "the dead request is recorded")
    assert run is not None
    assert (run["status"], run["error"]["code"]) == ("rejected", "undeliverable")
    assert running.waiting(DEAD_QUEUE) == 0
    assert mongo["runs"].find_one({"metadata.task_id": hints}) is None


def _send_raw(running: Running, body: str, task_id: str, queue: str = INTAKE_QUEUE, **options: Any) -> None:
    headers = {"lang": "py", "task": "agentq.submit", "id": task_id, "root_id": task_id, "retries": 0}
    properties = {"content_type": "application/json", "content_encoding": "utf-8", "correlation_id": task_id, **options}
    properties["headers"] = headers | options.get("headers", {})
    with Connection(running.broker_url) as connection:
        connection.Producer().publish(body.encode(), exchange="", routing_key=queue, **properties)


def _remove_poison(running: Running) -> None:
    if running.on_redis:
        with Redis.from_url(running.broker_url) as broker:
            broker.delete("agentq", "unacked", "unacked_index")
    else:
        with Connection(running.broker_url) as connection, connection.channel() as channel:
            amqp: Any = channel
            until(lambda: amqp.queue_purge(INTAKE_QUEUE) > 0, "the message is back in the queue, and out of it")
    until(lambda: running.state("router") == "up", "the router is up again", 90)
