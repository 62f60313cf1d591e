"""A Django back end that hands requests to agentq; one file, settings included. The same two addresses as in
``flask_app.py``, and the same promises.

    AGENTQ_MONGO_URL=... AGENTQ_BROKER_URL=... python examples/backends/django_app.py runserver --noreload
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import django
import pymongo
from django.conf import settings
from django.core.management import execute_from_command_line
from django.http import HttpRequest, JsonResponse
from django.urls import path, reverse
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_GET, require_POST

from agentq.client import Client
from agentq.errors import AgentqError, Conflict, IdempotencyConflict, InvalidRequest, NotFound, QueueFull

PATIENCE_S = 2.0  # a page that cannot be stored is refused after that; the caller repeats it with its key
# The first that fits; whatever else there is means that a server of agentq's does not answer.
STATUS: list[tuple[type[AgentqError], int]] = [
    (IdempotencyConflict, 409), (InvalidRequest, 422), (NotFound, 404), (Conflict, 409), (QueueFull, 429),
]  # fmt: skip

settings.configure(
    SECRET_KEY=secrets.token_hex(), ROOT_URLCONF=__name__, ALLOWED_HOSTS=["127.0.0.1", "localhost"], USE_TZ=True,
    MIDDLEWARE=["django.middleware.common.CommonMiddleware"], APPEND_SLASH=False,
)  # fmt: skip
django.setup()
agentq = Client(
    os.environ["AGENTQ_MONGO_URL"],
    os.environ.get("AGENTQ_BROKER_URL"),
    os.environ.get("AGENTQ_MONGO_DATABASE", "agentq"),
)  # connects at first use, and anew in each process that the server forks


def refusing(view: Callable[..., JsonResponse]) -> Callable[..., JsonResponse]:
    """What agentq refuses becomes an HTTP error with its code and hint."""

    @wraps(view)
    def answer(request: HttpRequest, **given: Any) -> JsonResponse:
        try:
            with pymongo.timeout(PATIENCE_S):
                return view(request, **given)
        except AgentqError as error:
            status = next((status for kind, status in STATUS if isinstance(error, kind)), 503)
            headers = {"Retry-After": str(round(error.details.get("retry_after_s", 5)))} if error.retryable else {}
            told = {"code": error.code, "message": error.message, "hint": error.hint}
            return JsonResponse({"error": told}, status=status, headers=headers)

    return answer


@csrf_exempt
@require_POST
@refusing
def ask(request: HttpRequest) -> JsonResponse:
    try:
        body = json.loads(request.body)
    except ValueError:
        body = None
    body = body if isinstance(body, dict) else {}
    run = agentq.submit(
        body.get("text", ""),
        workflow=os.environ.get("WORKFLOW", "default"),
        user=body.get("user"),
        idempotency_key=request.headers.get("Idempotency-Key"),
    )
    return JsonResponse({"run_id": run.run_id, "url": reverse(answer, args=[run.run_id])}, status=202)


@require_GET
@refusing
def answer(_: HttpRequest, run_id: str) -> JsonResponse:
    outcome = agentq.run(run_id).outcome()
    return JsonResponse({"status": outcome.status, "answer": outcome.answer, "error": outcome.error})


urlpatterns = [path("questions", ask), path("questions/<str:run_id>", answer)]

if __name__ == "__main__":
    execute_from_command_line(sys.argv)
