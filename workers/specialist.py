"""The specialist pool: an agent's turns, each one model call (``agentq.engine.nodes.on_turn`` decides)."""

from __future__ import annotations

from typing import Any

from celery import Celery

from workers.host import EngineHost


def register(app: Celery, host: EngineHost) -> None:
    """The task ``agentq.specialist`` on the queue ``specialist``."""

    @app.task(name="agentq.specialist")
    def take_turn(hints: Any = None, at: Any = None) -> None:
        host.work("specialist", hints, at)
