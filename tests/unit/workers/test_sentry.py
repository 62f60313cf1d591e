"""Error reports hold no text of a run."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import sentry_sdk
from sentry_sdk.integrations.logging import EventHandler
from sentry_sdk.transport import Transport

from config.settings import Settings
from workers import sentry

CANARY = "zKANARIENVOGELz"
DSN = "http://public@127.0.0.1:9/1"


class Kept(Transport):
    """Keeps what would be sent."""

    def __init__(self) -> None:
        super().__init__({"dsn": DSN})
        self.sent: list[str] = []

    def capture_envelope(self, envelope: Any) -> None:
        self.sent += [item.payload.get_bytes().decode() for item in envelope.items]


def client(**options: Any) -> tuple[sentry_sdk.Client, Kept]:
    """A client with our filter that collects all it can, so that the filter alone must keep the text out."""
    kept = Kept()
    collected: Any = {"user_info": True, "queues": True, "stack_frame_variables": True}
    made = sentry_sdk.Client(
        dsn=DSN, transport=kept, before_send=sentry.scrub, default_integrations=False,
        auto_enabling_integrations=False, include_local_variables=True, data_collection=collected, **options,
    )  # fmt: skip
    return made, kept


def refuse(request: str, *, order: dict[str, str]) -> None:
    copied = [request]
    try:
        raise KeyError(copied[0])
    except KeyError as error:
        error.add_note(f"while working on {request}")
        raise ValueError(f"cannot read {request!r}: {order}", request) from error


def report(made: sentry_sdk.Client) -> None:
    with sentry_sdk.isolation_scope() as scope:
        scope.set_client(made)
        scope.set_extra("celery-job", {"kwargs": CANARY})
        scope.set_context("run", {"input": CANARY})
        scope.set_user({"id": CANARY})
        scope.add_breadcrumb(message=CANARY)
        try:
            refuse(CANARY, order={"id": CANARY})
        except ValueError as error:
            sentry_sdk.capture_exception(error)


def test_a_report_of_a_real_exception_holds_its_types_and_places_and_no_text() -> None:
    """Message, notes, arguments, locals, causes, extras, contexts, users and breadcrumbs are all gone."""
    made, kept = client()
    report(made)
    (sent,) = kept.sent
    assert CANARY not in sent
    values = json.loads(sent)["exception"]["values"]
    assert [value["type"] for value in values] == ["KeyError", "ValueError"]
    assert {frame["function"] for value in values for frame in value["stacktrace"]["frames"]} == {"report", "refuse"}


def logged(name: str, message: str, *arguments: Any, **more: Any) -> str:
    made, kept = client()
    handler = EventHandler()
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        with sentry_sdk.isolation_scope() as scope:
            scope.set_client(made)
            logger.error(message, *arguments, **more)
    finally:
        logger.removeHandler(handler)
    (sent,) = kept.sent
    return sent


def test_a_logged_error_keeps_its_words_without_its_arguments() -> None:
    sent = logged("agentq.runtime.runtime", "run %s stays due", CANARY, extra={"data": {"kwargs": CANARY}})
    assert CANARY not in sent
    assert "run %s stays due" in sent


def test_what_other_libraries_put_into_their_messages_is_not_sent() -> None:
    """asyncio writes the exception into the message itself: "Task exception was never retrieved ...ValueError(...)"."""
    assert CANARY not in logged("asyncio", f"Task exception was never retrieved\nfuture: <exception={CANARY}>")


def test_without_a_dsn_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentry.sentry_sdk, "init", lambda **_: pytest.fail("started"))
    sentry.start(Settings(_env_file=None))  # type: ignore[call-arg]


def test_with_a_dsn_the_filter_is_on_and_nothing_personal_is_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(
        sentry.sentry_sdk, "init", lambda **options: made.append(sentry_sdk.Client(**options, transport=Kept()))
    )
    sentry.start(Settings(_env_file=None, sentry_dsn=DSN))  # type: ignore[call-arg]
    options = made[0].options
    assert options["before_send"] is sentry.scrub
    assert (options["include_local_variables"], options["max_breadcrumbs"]) == (False, 0)
    collected = options["data_collection"]
    names = ("user_info", "queues", "http_bodies", "database_query_data", "stack_frame_variables")
    assert not any(collected[name] for name in names)
    assert options["traces_sample_rate"] == 0.0
