"""Requests from applications that share no code with us: ``send_task("agentq.submit" | "agentq.ask")``.

The body of such a message is the caller's request, so nothing of it may show in Flower, in events or in logs. A bad
one ends as a visible run with status ``rejected``, whatever its shape; it is never redelivered.

RabbitMQ moves a message that was handed out too often without an end to the queue of dead letters, which the intake
reads as well: a request from there is rejected, hints are counted and dropped, since MongoDB has the truth.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, cast

from celery import Celery
from celery.exceptions import Ignore, InvalidTaskError, Reject
from celery.worker.consumer import Consumer as CeleryConsumer
from celery.worker.request import Request as CeleryRequest

from agentq.errors import AgentqError, Conflict, InvalidRequest, QueueFull, Unavailable
from agentq.protocol import ASK_TASK, INTAKE_QUEUE, POOLS, SUBMIT_TASK, Request, parse_request, task_name
from agentq.run import Reply, new_run_id, rejected_run
from schemas.run import RunDoc
from workers.host import EngineHost
from workers.queues import DEAD_QUEUE
from workers.refused import refused, refused_message
from workers.replies import by_queue, reply_queue, store

log = logging.getLogger(__name__)
HIDDEN = "(hidden)"
RETRY_S = 1.0  # how soon a request tries again that waits for MongoDB


class HiddenRequest(CeleryRequest):
    """A task message whose arguments never show in events, inspection or logs, whatever its sender declared.

    Celery reads the declared form from several places, all of them filled from the message's headers.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        body = self.message.payload
        embed = body[2] if isinstance(body, list | tuple) else {}
        if not (isinstance(self.args, list | tuple) and isinstance(self.kwargs, dict) and isinstance(embed, dict)):
            raise InvalidTaskError("the body is not [args, kwargs, embed]")
        if not (isinstance(self.request_dict.get("retries") or 0, int) and isinstance(self.name, str)):
            raise InvalidTaskError("the headers are not a task's")  # Celery's tracer would drop the message in silence
        self._argsrepr = self._kwargsrepr = HIDDEN
        reply_to = reply_queue(self.request_dict.get("reply_to"))
        self.request_dict.update(argsrepr=HIDDEN, kwargsrepr=HIDDEN, reply_to=reply_to)

    def info(self, safe: bool = False) -> Any:  # noqa: ARG002 - Celery's signature
        return super().info(safe=True)


class Consumer(CeleryConsumer):
    """Celery's consumer, but for messages it cannot read (recorded as rejected, no body logged), for dead letters and
    for late acks. It makes no queues for messages with a delay, since hints have none: Celery's step for quorum queues
    would declare 28 of them."""

    class Blueprint(CeleryConsumer.Blueprint):  # type: ignore[misc, valid-type]  # the stubs make it a variable
        """Celery's steps without that one."""

        default_steps = [
            step for step in CeleryConsumer.Blueprint.default_steps if not step.endswith(":DelayedDelivery")
        ]

    def call_soon_ack(self, p: Any, *args: Any, **kwargs: Any) -> Any:
        """Acknowledge soon. On Redis, kombu 5.7 meets an ack of a lost connection with an AttributeError, which
        Celery takes for unrecoverable and ends the consumer; the message is simply delivered again."""

        def acknowledge() -> None:
            try:
                p(*args, **kwargs)
            except AttributeError:
                log.warning("an acknowledgement came after its connection was lost")

        return super().call_soon_ack(acknowledge)  # type: ignore[misc]  # newer than the stubs

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Any:
        """Celery's handler, but for bodies it trips over: a JSON value that is no task's would end the consumer."""
        handle = super().create_task_handler(*args, **kwargs)

        def on_task_received(message: Any) -> Any:
            if message.delivery_info.get("routing_key") == DEAD_QUEUE:
                return self._bury(message)
            try:
                return handle(message)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                return self.on_invalid_task(None, message, error)

        return on_task_received

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        self._refuse(message, exc, "undecodable", "The message could not be decoded.")

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:  # noqa: ARG002
        self._refuse(message, exc, "invalid_message", "The message is not a Celery task message.")

    def on_unknown_message(self, body: Any, message: Any) -> None:  # noqa: ARG002
        self._refuse(message, None, "invalid_message", "The message is not a Celery task message.")

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:  # noqa: ARG002
        self._refuse(message, exc, "unknown_task", "agentq has no task of that name.")

    def _bury(self, message: Any) -> None:
        if message.headers.get("task") in {task_name(pool) for pool in POOLS}:
            log.error("a message of hints was dropped: it was handed out too often")
            self.app.conf["agentq_count"]("dead_hints")
            message.ack_log_error(log, self.connection_errors)  # type: ignore[attr-defined]
        else:
            self._refuse(message, None, "undeliverable", "The message was handed out too often and never finished.")

    def _refuse(self, message: Any, exc: BaseException | None, code: str, said: str) -> None:
        causes = [type(cause).__name__ for cause in _causes(exc)]
        if "RecursionError" in causes:
            code, said = "too_deep", "The message is nested too deeply."
        log.error("a message was refused: %s %s", code, " < ".join(causes))
        error = InvalidRequest(said, code=code, hint='Send kwargs={"request": {"input": "..."}} as JSON.')
        headers = message.headers if isinstance(message.headers, dict) else {}
        task_id = str(headers.get("id", ""))[:64]
        size = len(message.body) if isinstance(message.body, str | bytes) else 0
        facts = {"task": str(headers.get("task", ""))[:64], "bytes": size}
        try:
            self.app.conf["agentq_refuse"](error, task_id, facts, refused_message(code, message.body))
        except Unavailable as failed:
            log.warning("a refused message goes back to the queue: %s", failed.code)
            message.reject_log_error(log, self.connection_errors, requeue=True)  # type: ignore[attr-defined]
            return
        except AgentqError as failed:
            log.error("the refusal could not be recorded: %s", failed.code)
        if task_id and self.app.conf.result_backend:
            store(self.app, task_id, reply_queue(message.properties.get("reply_to")), _told(error), "FAILURE")
        message.ack_log_error(log, self.connection_errors)  # type: ignore[attr-defined]


def _causes(exc: BaseException | None) -> Iterator[BaseException]:
    while exc is not None:
        yield exc
        exc = exc.__cause__ or exc.__context__


def _told(error: InvalidRequest | Conflict | QueueFull) -> AgentqError:
    """The error as a caller sees it who gets only its class name and text: the code goes first."""
    said = f"{error.code}: {error}"
    if isinstance(error, QueueFull):
        return QueueFull(said, retry_after_s=error.retry_after_s)
    return type(error)(said, code=error.code)


class Intake:
    """Accepts requests through the client, or records why not."""

    def __init__(self, app: Celery, host: EngineHost) -> None:
        self._app = app
        self._host = host

    def refuse(self, error: AgentqError, task_id: str, facts: dict[str, Any], kept: dict[str, Any]) -> None:
        """Record the refusal with what is kept of the request, once a task id; counted in the worker's sign of life."""
        self._host.count(f"refused_{error.code}")
        facts = {"task_id": task_id, **facts}
        doc = rejected_run(error, run_id=new_run_id(), now=self._host.store.now(), facts=facts, refused=kept)
        if task_id:
            doc["idempotency_key"] = f"celery:{task_id}"
        self._host.call(self._host.store.record(cast("RunDoc", doc)))

    def accept(self, task: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, waits: bool) -> str:
        """The run's id. A refusal is recorded and raised. With MongoDB out of reach the message waits here, and goes
        back to the queue only when the worker stops: each way back brings it nearer to becoming a dead letter."""
        task_id = task.request.id
        while True:
            try:
                request = self._request(args, kwargs, task_id)
                return self._host.client.accept(request, reply=self._reply(task.request) if waits else None).run_id
            except (InvalidRequest, Conflict, QueueFull) as error:
                self.refuse(error, task_id, {"task": task.name}, refused(error.code, args, kwargs))
                raise _told(error) from None
            except Unavailable as error:
                log.warning("a request waits for MongoDB: %s", error.code)
                if self._host.stopping.wait(RETRY_S):
                    raise Reject(error.code, requeue=True) from None

    def _reply(self, message: Any) -> Reply:
        """Where the answer goes."""
        if not by_queue(self._app):
            return Reply(task_id=message.id)
        if message.reply_to is None:
            raise InvalidRequest(
                "agentq.ask answers to a queue of the caller's, and the message names none.",
                code="no_reply_to",
                hint="Give the calling application the result backend rpc://, or use agentq.submit.",
            )
        return Reply(task_id=message.id, reply_to=message.reply_to)

    def _request(self, args: tuple[Any, ...], kwargs: dict[str, Any], task_id: str) -> Request:
        request = _request(args, kwargs)
        if request.idempotency_key is None:  # a redelivered message must not become a second run
            request = request.model_copy(update={"idempotency_key": f"celery:{task_id}"})
        return request


def register(app: Celery, host: EngineHost) -> None:
    """The intake tasks, and what records a refusal."""
    intake = Intake(app, host)

    @app.task(
        name=SUBMIT_TASK, queue=INTAKE_QUEUE, bind=True, acks_late=True, ignore_result=False, throws=(AgentqError,)
    )
    def submit(self: Any, *args: Any, **kwargs: Any) -> str:
        """Accept a request; the result is the run's id."""
        return intake.accept(self, args, kwargs, waits=False)

    @app.task(name=ASK_TASK, queue=INTAKE_QUEUE, bind=True, acks_late=True, ignore_result=False, throws=(AgentqError,))
    def ask(self: Any, *args: Any, **kwargs: Any) -> None:
        """Accept a request; the result is the answer, stored when the run has ended."""
        intake.accept(self, args, kwargs, waits=True)
        raise Ignore

    for task in (submit, ask):
        task.Request = "workers.intake:HiddenRequest"
    app.conf["agentq_refuse"] = intake.refuse
    app.conf["agentq_count"] = host.count


def _request(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Request:
    """The request of a task message: ``kwargs={"request": {...}}``, or the object as the only argument."""
    if set(kwargs) == {"request"} and not args:
        return parse_request(kwargs["request"])
    if len(args) == 1 and not kwargs:
        return parse_request(args[0])
    raise InvalidRequest(
        f"The task takes one argument 'request', got {len(args)} positional and {len(kwargs)} named.",
        code="wrong_arguments",
        hint='Send kwargs={"request": {"input": "..."}}.',
    )
