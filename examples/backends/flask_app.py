"""A Flask back end that hands requests to agentq.

    POST /questions      {"text": "...", "user": "..."}   with an Idempotency-Key: 202 {"run_id": ..., "url": ...}
    GET  /questions/ID   200 {"status": ..., "answer": ...}

The view waits for nothing but the request's being on disk. Whoever repeats it with the same key gets the same run.

    AGENTQ_MONGO_URL=... AGENTQ_BROKER_URL=... flask --app examples/backends/flask_app run
"""

from __future__ import annotations

import os
from typing import Any

import pymongo
from flask import Flask, Response, jsonify, request, url_for

from agentq.client import Client
from agentq.errors import AgentqError, Conflict, IdempotencyConflict, InvalidRequest, NotFound, QueueFull

PATIENCE_S = 2.0  # a page that cannot be stored is refused after that; the caller repeats it with its key
# The first that fits; whatever else there is means that a server of agentq's does not answer.
STATUS: list[tuple[type[AgentqError], int]] = [
    (IdempotencyConflict, 409), (InvalidRequest, 422), (NotFound, 404), (Conflict, 409), (QueueFull, 429),
]  # fmt: skip

app = Flask(__name__)
agentq = Client(
    os.environ["AGENTQ_MONGO_URL"],
    os.environ.get("AGENTQ_BROKER_URL"),
    os.environ.get("AGENTQ_MONGO_DATABASE", "agentq"),
)  # connects at first use, and anew in each process that the server forks


@app.post("/questions")
def ask() -> tuple[Response, int]:
    body: Any = request.get_json(silent=True)
    body = body if isinstance(body, dict) else {}
    with pymongo.timeout(PATIENCE_S):
        run = agentq.submit(
            body.get("text", ""),
            workflow=os.environ.get("WORKFLOW", "default"),
            user=body.get("user"),
            idempotency_key=request.headers.get("Idempotency-Key"),
        )
    return jsonify(run_id=run.run_id, url=url_for("answer", run_id=run.run_id)), 202


@app.get("/questions/<run_id>")
def answer(run_id: str) -> Response:
    with pymongo.timeout(PATIENCE_S):
        outcome = agentq.run(run_id).outcome()
    return jsonify(status=outcome.status, answer=outcome.answer, error=outcome.error)


@app.errorhandler(AgentqError)
def refuse(error: AgentqError) -> tuple[Response, int, dict[str, str]]:
    status = next((status for kind, status in STATUS if isinstance(error, kind)), 503)
    headers = {"Retry-After": str(round(error.details.get("retry_after_s", 5)))} if error.retryable else {}
    return jsonify(error={"code": error.code, "message": error.message, "hint": error.hint}), status, headers
