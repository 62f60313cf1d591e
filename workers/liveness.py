"""A worker's life on Celery's signals and steps: refuse unfit pools, start the engine, show signs of life, drain."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

from celery import Celery, bootsteps, signals
from celery.exceptions import WorkerShutdown

from agentq.errors import AgentqError, Unavailable
from workers.host import EngineHost
from workers.queues import with_dead_letters

log = logging.getLogger(__name__)
BEAT_S = 5.0


def register(app: Celery, host: EngineHost) -> None:
    """Connect ``host`` to the life of the worker process."""

    @signals.celeryd_after_setup.connect(weak=False)
    def set_up(instance: Any, **_: Any) -> None:
        if any(kind in instance.pool_cls.__module__ for kind in ("gevent", "eventlet")):
            # They lose acknowledged tasks on cold shutdown and fail acks on Redis (docs/adr/0004-pool-kind.md).
            raise SystemExit(
                "agentq: the gevent and eventlet pools are not supported. Start the worker with -P threads."
            )
        with_dead_letters(instance.app)
        host.serve(list(instance.app.amqp.queues.consume_from))

    @signals.after_setup_logger.connect(weak=False)
    def set_level(**_: Any) -> None:
        for name in ("agentq", "workers"):  # Celery's own loggers follow its -l
            logging.getLogger(name).setLevel(host.settings.log_level)

    @signals.worker_ready.connect(weak=False)
    def ready(**_: Any) -> None:
        beat()

    @signals.worker_shutting_down.connect(weak=False)
    def shutting_down(**_: Any) -> None:
        host.drain()

    @signals.worker_shutdown.connect(weak=False)
    def shut_down(**_: Any) -> None:
        host.stop()

    class Engine(bootsteps.StartStopStep):
        """Starts the engine, before the worker consumes anything: what it takes it must be able to work on."""

        requires = ("celery.worker.components:Pool",)

        def start(self, parent: Any) -> None:  # noqa: ARG002 - Celery's signature
            _start(host)

    class Beat(bootsteps.StartStopStep):
        """Touches the ready file from Celery's own timer, so that a consumer that hangs is seen from outside."""

        requires = ("celery.worker.consumer.tasks:Tasks",)

        def start(self, parent: Any) -> None:
            parent.timer.call_repeatedly(BEAT_S, beat)

    app.steps["worker"].add(Engine)
    app.steps["consumer"].add(Beat)


def _start(host: EngineHost) -> None:
    """Start the engine, or end the worker: with 0 if it was told to stop meanwhile, with 2 where settings are wrong."""
    try:
        host.engine()
    except Unavailable as error:
        log.warning("agentq: %s", error)
        raise WorkerShutdown(0) from None
    except AgentqError as error:
        log.critical("agentq: %s", error)
        os._exit(2)  # Celery would end with a code that says less


def beat() -> None:
    """A sign of life: the file named by AGENTQ_READY_FILE gets the time of now."""
    ready_file = os.environ.get("AGENTQ_READY_FILE")
    if ready_file:
        Path(ready_file).write_text(f"{time.time():.0f}\n")
