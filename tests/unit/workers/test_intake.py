"""Requests by task name: what a caller wrote shows nowhere."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery

from agentq.errors import InvalidRequest
from workers import intake

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


def test_a_foreign_caller_reads_the_code_first() -> None:
    """Celery gives it the class name and the text only."""
    told = intake._told(InvalidRequest("The input is empty.", code="empty_input", hint="Send text."))
    assert str(told) == "empty_input: The input is empty. Send text."
