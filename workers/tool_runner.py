"""The tools pool: calls the tools that models ask for (``agentq.tools``; ``agentq.engine.nodes.on_tool`` decides)."""

from __future__ import annotations

from typing import Any

from celery import Celery

from workers.host import EngineHost


def register(app: Celery, host: EngineHost) -> None:
    """The task ``agentq.tools`` on the queue ``tools``."""

    @app.task(name="agentq.tools")
    def run_tools(hints: Any = None, at: Any = None) -> None:
        host.work("tools", hints, at)
