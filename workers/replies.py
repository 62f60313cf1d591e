"""Answers for foreign Celery applications: stored under their task id when the run has ended; no worker waits."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from typing import Any

from celery import Celery

from schemas.run import RunDoc


class Replies:
    """``await replies(run)`` stores the answer of an ended run in the Celery result backend. Safe to repeat."""

    def __init__(self, app: Celery, executor: Executor) -> None:
        self._app = app
        self._executor = executor

    async def __call__(self, run: RunDoc) -> None:
        if run["reply"] is not None:
            await asyncio.get_running_loop().run_in_executor(
                self._executor, self._app.backend.store_result, run["reply"]["task_id"], answer(run), "SUCCESS"
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
