"""Requests from applications that share no code with us: ``send_task("agentq.submit" | "agentq.ask")``.

The body of such a message is the caller's request, so nothing of it may show in Flower, in events or in logs. A bad
one ends as a visible run with status ``rejected``, whatever its shape; it is never redelivered.
"""

from __future__ import annotations

import logging
from typing import Any

from celery import Celery
from celery.exceptions import Ignore
from celery.worker.consumer import Consumer as CeleryConsumer
from celery.worker.request import Request as CeleryRequest

from agentq.errors import AgentqError, InvalidRequest
from agentq.protocol import ASK_TASK, INTAKE_QUEUE, SUBMIT_TASK, parse_request, rejected_run, sha256
from workers.host import EngineHost

log = logging.getLogger(__name__)
HIDDEN = "(hidden)"


class HiddenRequest(CeleryRequest):  # type: ignore[misc]
    """A task message whose arguments never show in events, inspection or logs, whatever its sender declared."""

    @property
    def argsrepr(self) -> str:
        return HIDDEN

    @property
    def kwargsrepr(self) -> str:
        return HIDDEN

    def info(self, safe: bool = False) -> Any:  # noqa: ARG002 - Celery's signature
        return super().info(safe=True)


class Consumer(CeleryConsumer):  # type: ignore[misc]
    """Celery's consumer, but for messages it cannot read: those are recorded as rejected, and no body is logged."""

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        self._refuse(message, exc, "undecodable", "The message could not be decoded.")

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:  # noqa: ARG002
        self._refuse(message, exc, "invalid_message", "The message is not a Celery task message.")

    def on_unknown_message(self, body: Any, message: Any) -> None:  # noqa: ARG002
        self._refuse(message, None, "invalid_message", "The message is not a Celery task message.")

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:  # noqa: ARG002
        self._refuse(message, exc, "unknown_task", "agentq has no task of that name.")

    def _refuse(self, message: Any, exc: Exception | None, code: str, said: str) -> None:
        cause = type(exc.__cause__ or exc).__name__ if exc else ""
        if cause == "RecursionError":
            code, said = "too_deep", "The message is nested too deeply."
        log.error("a message was refused: %s %s", code, cause)
        error = InvalidRequest(said, code=code, hint='Send kwargs={"request": {"input": "..."}} as JSON.')
        headers = message.headers if isinstance(message.headers, dict) else {}
        task_id = str(headers.get("id", ""))[:64]
        size = len(message.body) if isinstance(message.body, str | bytes) else 0
        try:
            refuse = self.app.conf["agentq_refuse"]
            refuse(error, task_id, {"task": str(headers.get("task", ""))[:64], "bytes": size})
        except AgentqError as failed:
            log.error("the refusal could not be recorded: %s", failed.code)
        message.ack_log_error(log, self.connection_errors)


def register(app: Celery, host: EngineHost) -> None:
    """The intake tasks, and what records a refusal."""

    def refuse(error: InvalidRequest, task_id: str, facts: dict[str, Any]) -> None:
        """Record the refusal (once a task id) and tell the caller, if it listens."""
        run_id = f"r{sha256('rejected:' + task_id)[:28]}"
        doc = rejected_run(error, run_id=run_id, now=host.store.now(), facts={"task_id": task_id, **facts})
        host.call(host.store.record(doc))  # type: ignore[arg-type]
        if task_id and app.conf.result_backend:
            app.backend.store_result(task_id, error, "FAILURE")

    def accept(task: Any, request: Any, waits: bool) -> str:
        task_id = task.request.id
        try:
            parsed = parse_request(request)
            if waits and not app.conf.result_backend:
                raise InvalidRequest(
                    "agentq.ask needs a result backend, and this agentq has none.",
                    code="no_result_backend",
                    hint="Set AGENTQ_RESULT_URL, or use agentq.submit.",
                )
            if parsed.idempotency_key is None:  # a redelivered message must not become a second run
                parsed = parsed.model_copy(update={"idempotency_key": f"celery:{task_id}"})
            return host.client.accept(parsed, reply={"task_id": task_id} if waits else None).run_id
        except InvalidRequest as error:
            refuse(error, task_id, {"task": task.name})
            raise

    options = {
        "bind": True,
        "ignore_result": False,
        "throws": (AgentqError,),
        "Request": "workers.intake:HiddenRequest",
    }

    @app.task(name=SUBMIT_TASK, queue=INTAKE_QUEUE, **options)
    def submit(self: Any, request: Any = None) -> str:
        """Accept a request; the result is the run's id."""
        return accept(self, request, waits=False)

    @app.task(name=ASK_TASK, queue=INTAKE_QUEUE, **options)
    def ask(self: Any, request: Any = None) -> None:
        """Accept a request; the result is the answer, stored when the run has ended."""
        accept(self, request, waits=True)
        raise Ignore

    app.conf["agentq_refuse"] = refuse
