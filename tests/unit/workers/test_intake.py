"""Requests by task name: what a caller wrote shows nowhere."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import pytest
from celery import Celery
from celery.exceptions import Reject

from agentq.errors import InvalidRequest, Unavailable
from workers import intake
from workers.replies import reply_queue

CANARY = "zKANARIENVOGELz"


@pytest.fixture
def request_of_a_foreign_sender() -> intake.HiddenRequest:
    """A message as Celery's own client sends it: with the arguments' repr in its headers."""
    app = Celery("test", broker="memory://", set_as_current=False)

    @app.task(name="test.hidden", shared=False)
    def submit(*args: Any, **kwargs: Any) -> None:
        """Never run here."""

    app.finalize()
    headers = {
        "lang": "py", "task": "test.hidden", "id": "t-1", "root_id": "t-1", "parent_id": None, "group": None,
        "argsrepr": f"('{CANARY}',)", "kwargsrepr": f"{{'request': '{CANARY}'}}", "origin": "elsewhere",
    }  # fmt: skip
    message = SimpleNamespace(
        headers=headers, body=json.dumps([[CANARY], {"request": CANARY}, {}]), payload=[[CANARY], {}, {}],
        content_type="application/json", content_encoding="utf-8", delivery_info={}, properties={},
        decode=lambda: [[CANARY], {"request": CANARY}, {}], acknowledged=False,
    )  # fmt: skip
    return intake.HiddenRequest(message, app=app, task=submit, decoded=False, on_ack=None)


@pytest.mark.parametrize("safe", [True, False])
def test_inspection_never_shows_the_arguments(request_of_a_foreign_sender: intake.HiddenRequest, safe: bool) -> None:
    """``inspect active`` and ``query_task``, which Flower asks for, take this."""
    shown = request_of_a_foreign_sender.info(safe=safe)
    assert CANARY not in repr(shown)
    assert shown["id"] == "t-1"


def test_events_and_logs_never_show_the_arguments(request_of_a_foreign_sender: intake.HiddenRequest) -> None:
    """What the sender declared as repr of its arguments is what Celery would send in its task-received event."""
    hidden = request_of_a_foreign_sender
    assert (hidden.argsrepr, hidden.kwargsrepr) == (intake.HIDDEN, intake.HIDDEN)
    assert CANARY not in f"{hidden} {hidden!r}"


def test_what_the_tracer_logs_of_a_task_never_shows_the_arguments(
    request_of_a_foreign_sender: intake.HiddenRequest,
) -> None:
    """Celery's tracer puts the headers' argsrepr and kwargsrepr into its log records."""
    headers = request_of_a_foreign_sender.request_dict
    assert CANARY not in f"{headers.get('argsrepr')} {headers.get('kwargsrepr')}"


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {"request": {"input": "x"}}), (({"input": "x"},), {})],
)
def test_the_request_is_the_keyword_or_the_only_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert intake._request(args, kwargs).input == "x"


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {}), (({"input": "x"}, 1), {}), (({"input": "x"},), {"request": {}}), ((), {"input": CANARY})],
)
def test_other_arguments_are_refused_without_quoting_them(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        intake._request(args, kwargs)
    assert caught.value.code == "wrong_arguments"
    assert CANARY not in str(caught.value)


class Host:
    """An engine host whose MongoDB is away for a while."""

    def __init__(self, outages: int) -> None:
        self.stopping = threading.Event()
        self.client = self
        self.outages = outages
        self.replies: list[Any] = []

    def accept(self, request: Any, reply: Any) -> Any:
        if self.outages:
            self.outages -= 1
            raise Unavailable("MongoDB does not answer.")
        self.replies.append(reply)
        return SimpleNamespace(run_id="r1")


def accept(host: Host, *, waits: bool = False, reply_to: str | None = None) -> str:
    app = Celery("test", broker="amqp://", backend="rpc://", set_as_current=False)
    task = SimpleNamespace(name="agentq.ask", request=SimpleNamespace(id="t-1", reply_to=reply_to))
    return intake.Intake(app, cast("Any", host)).accept(task, (), {"request": {"input": "x"}}, waits=waits)


def test_a_request_waits_for_mongodb_in_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not go back to the queue: RabbitMQ would count that as one delivery in vain."""
    monkeypatch.setattr(intake, "RETRY_S", 0.0)
    assert accept(Host(outages=50)) == "r1"


def test_a_request_goes_back_to_the_queue_when_its_worker_stops() -> None:
    host = Host(outages=50)
    host.stopping.set()
    with pytest.raises(Reject) as caught:
        accept(host)
    raised: Any = caught.value
    assert raised.requeue


def test_an_answer_goes_to_the_queue_that_the_caller_named() -> None:
    host = Host(outages=0)
    queue = str(uuid4())
    accept(host, waits=True, reply_to=queue)
    assert host.replies == [{"task_id": "t-1", "reply_to": queue}]


@pytest.mark.parametrize("name", ["router", "agentq.dead", "", None, 5, "e94651e8-b28c-44c5-8cd1-74ac05bff8edx"])
def test_only_a_reply_queue_is_answered_to(name: Any) -> None:
    """Any other name would let a caller write into other people's queues with our rights."""
    assert reply_queue(name) is None
    assert reply_queue(str(uuid4())) is not None


def test_a_foreign_caller_reads_the_code_first() -> None:
    """Celery gives it the class name and the text only."""
    told = intake._told(InvalidRequest("The input is empty.", code="empty_input", hint="Send text."))
    assert str(told) == "empty_input: The input is empty. Send text."
