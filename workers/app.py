"""The composition root: settings in, a Celery application with one task a pool out.

``celery -A workers.app worker -Q specialist`` starts a specialist pool; ``-Q router,agentq`` the router with the
intake of foreign applications; several queues make one process serve several pools. Importing this module connects
to nothing.
"""

from __future__ import annotations

import os

from celery import Celery

from agentq.protocol import INTAKE_QUEUE
from config.settings import Settings, load_settings
from workers import critic, intake, liveness, router, sentry, specialist, tool_runner
from workers.host import EngineHost
from workers.queues import on_redis, task_queues


def make_app(settings: Settings) -> Celery:
    """A Celery application by these settings; see ``config.settings`` for what each means."""
    for name in ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL", "CELERY_RESULT_BACKEND"):
        os.environ.pop(name, None)  # Celery would prefer them to our settings, in silence
    broker = settings.broker_url.get_secret_value() if settings.broker_url else "redis://127.0.0.1:6379/0"
    app = Celery("agentq", broker=broker, set_as_current=False)
    app.conf.update(_conf(settings, broker))
    sentry.start(settings)
    host = EngineHost(app, settings)
    for role in (router, specialist, critic, tool_runner):
        role.register(app, host)
    intake.register(app, host)
    liveness.register(app, host)
    return app


def _conf(settings: Settings, broker: str) -> dict[str, object]:
    """Why each is so: docs/adr/0004-pool-kind.md, 0005-hints-need-no-acknowledgement.md and, for RabbitMQ,
    0007-rabbitmq-quorum-queues.md.

    On Redis, hints are not acknowledged: the broker may lose them anyway, the bookkeeping costs two round trips a
    message, and an acknowledgement that fails when the connection is lost ends Celery's consumer for good.
    ``worker_disable_prefetch`` keeps a worker from taking more than it can work on. RabbitMQ's prefetch needs them.
    """
    redis = on_redis(broker)
    result = settings.result_url.get_secret_value() if settings.result_url else (broker if redis else "rpc://")
    return {
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,  # a worker outlives any outage of its broker
        "broker_transport_options": _redis_options() if redis else {"confirm_publish": True, "max_retries": 1},
        "task_serializer": "json",
        "result_serializer": "json",
        "accept_content": ["json"],
        "task_queues": task_queues(broker),
        "task_default_queue": INTAKE_QUEUE,
        "task_create_missing_queues": False,  # a mistyped queue fails loudly
        "task_acks_late": not redis,
        "task_reject_on_worker_lost": True,
        "task_publish_retry": False,  # the scheduler is the retry
        "task_ignore_result": True,
        "result_backend": result,
        "result_expires": 86_400,
        "worker_pool": "threads",
        "worker_concurrency": settings.worker_concurrency,
        "worker_prefetch_multiplier": 1,
        "worker_disable_prefetch": redis,
        "worker_send_task_events": settings.task_events,
        "worker_hijack_root_logger": True,
        "worker_consumer": "workers.intake:Consumer",
        "worker_cancel_long_running_tasks_on_connection_loss": False,  # a paid call is not thrown away
        "worker_detect_quorum_queues": not redis,  # their prefetch is each consumer's, not the channel's
    }


def _redis_options() -> dict[str, object]:
    return {
        "visibility_timeout": 900,
        "unacked_restore_interval": 5,
        "unacked_restore_throttle": 1,
        "socket_timeout": 3,
        "socket_connect_timeout": 3,
        "socket_keepalive": True,
        "health_check_interval": 10,
        "max_connections": 64,
        "retry_on_timeout": False,
    }


app = make_app(load_settings())
