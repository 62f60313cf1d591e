"""The router pool: asks a model which specialist takes a request (``agentq.engine.nodes.on_route`` decides)."""

from __future__ import annotations

from typing import Any

from celery import Celery

from workers.host import EngineHost


def register(app: Celery, host: EngineHost) -> None:
    """The task ``agentq.router`` on the queue ``router``."""

    @app.task(name="agentq.router")
    def route(hints: Any = None, at: Any = None) -> None:
        host.work("router", hints, at)
