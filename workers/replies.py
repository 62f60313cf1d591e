"""Answers for foreign Celery applications: stored under their task id when the run has ended; no worker waits.

With the result backend ``rpc://`` "stored" means sent to the queue that the caller named: a caller that is gone by then
has lost its answer, the run has not.
"""

from __future__ import annotations

import asyncio
import re
from concurrent.futures import Executor
from typing import Any

from celery import Celery
from celery.app.task import Context

from schemas.run import RunDoc

# Celery's reply queues are called by a UUID. Any other name would let a caller write into other people's queues with
# our rights.
_REPLY_QUEUE = re.compile(r"[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12}")


def reply_queue(reply_to: Any) -> str | None:
    """The queue that a caller waits at, if it is one that may be answered to."""
    return reply_to if isinstance(reply_to, str) and _REPLY_QUEUE.fullmatch(reply_to) else None


def store(app: Celery, task_id: str, reply_to: str | None, value: Any, state: str) -> None:
    """Store a result by hand, without the message that asked for it. Safe to repeat."""
    if not by_queue(app):
        app.backend.store_result(task_id, value, state)
    elif reply_to:
        app.backend.store_result(task_id, value, state, request=Context(reply_to=reply_to, correlation_id=task_id))


def by_queue(app: Celery) -> bool:
    """Do answers go to a queue of the caller's, rather than into a store that it looks into?"""
    return str(app.conf.result_backend).startswith("rpc")


class Replies:
    """``await replies(run)`` stores the answer of an ended run in the Celery result backend. Safe to repeat."""

    def __init__(self, app: Celery, executor: Executor) -> None:
        self._app = app
        self._executor = executor

    async def __call__(self, run: RunDoc) -> None:
        if run["reply"] is not None:
            where = run["reply"]
            await asyncio.get_running_loop().run_in_executor(
                self._executor, store, self._app, where["task_id"], where.get("reply_to"), answer(run), "SUCCESS"
            )


def answer(run: RunDoc) -> dict[str, Any]:
    """What ``agentq.ask`` returns: the run's outcome as plain JSON, ``error`` set unless it succeeded."""
    result = run["result"]
    return {
        "run_id": run["_id"],
        "status": run["status"],
        "answer": result["answer"] if result else None,
        "agent": result["agent"] if result else None,
        "acceptance": result["acceptance"] if result else None,
        "citations": result["citations"] if result else [],
        "cost_usd": (run["usage"].get("cost_nano_usd", 0) + run["waste"].get("cost_nano_usd", 0)) / 1e9,
        "error": run["error"],
    }
