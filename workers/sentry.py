"""Error reports to Sentry: off without a DSN, and never any text of a run in them.

A report keeps the exception's type, its stack and the ids; messages, local variables, arguments and breadcrumbs may
hold what a customer wrote and are removed before anything leaves the process.
"""

from __future__ import annotations

from typing import Any

import sentry_sdk
from sentry_sdk.integrations.celery import CeleryIntegration

from config.settings import Settings


def start(settings: Settings) -> None:
    """Report errors if a DSN is set."""
    if settings.sentry_dsn is None:
        return
    sentry_sdk.init(
        dsn=settings.sentry_dsn.get_secret_value(),
        data_collection={
            "user_info": False,
            "queues": False,
            "http_bodies": [],
            "database_query_data": False,
            "stack_frame_variables": False,
        },
        include_local_variables=False,
        max_breadcrumbs=0,
        traces_sample_rate=0.0,
        before_send=scrub,
        integrations=[CeleryIntegration(propagate_traces=False)],
    )


def scrub(event: Any, _hint: Any = None) -> Any:
    """What is left of an event: types, stacks, tags. Everything that can carry text of a run goes."""
    for name in ("extra", "breadcrumbs", "request", "user", "contexts", "message"):
        event.pop(name, None)
    words = event.pop("logentry", None)
    if words is not None and str(event.get("logger", "")).startswith(("agentq.", "workers.")):
        event["logentry"] = {"message": words.get("message", "")}  # our templates; others write values into theirs
    for exception in event.get("exception", {}).get("values", []):
        exception["value"] = ""
        for frame in (exception.get("stacktrace") or {}).get("frames", []):
            frame.pop("vars", None)
    return event
