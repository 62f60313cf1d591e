"""The critic pool: a model accepts a draft or names its problems (``agentq.engine.nodes.on_critique`` decides)."""

from __future__ import annotations

from typing import Any

from celery import Celery

from workers.host import EngineHost


def register(app: Celery, host: EngineHost) -> None:
    """The task ``agentq.critic`` on the queue ``critic``."""

    @app.task(name="agentq.critic")
    def criticise(hints: Any = None, at: Any = None) -> None:
        host.work("critic", hints, at)
