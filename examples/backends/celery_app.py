"""Somebody else's Celery application: it knows two task names and a queue of agentq, and shares no code with it.

BROKER_URL=... celery -A examples.backends.celery_app worker -P threads -Q shop   # gets the follow-ups
BROKER_URL=... python examples/backends/celery_app.py "Where is my order LF-1002?"
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from celery import Celery

USAGE = "usage: BROKER_URL=... python examples/backends/celery_app.py TEXT"
URL = os.environ.get("BROKER_URL") or sys.exit(USAGE)
app = Celery("shop", broker=URL, backend=URL if URL.startswith("redis") else "rpc://")
# The queue is agentq's: without ``declare=[]`` Celery would declare it as its own, which RabbitMQ refuses.
TO_AGENTQ: dict[str, Any] = {"queue": "agentq", "declare": []}


@app.task(name="shop.on_answer")
def on_answer(run_id: str, status: str) -> None:
    """Sent by agentq when the run has ended, at least once: do nothing that must not be done twice for a run."""
    print(f"run {run_id} has {status}", flush=True)


def ask(text: str, **request: Any) -> dict[str, Any]:
    """Wait for the answer. Repeats are safe with an ``idempotency_key``."""
    sent = app.send_task("agentq.ask", kwargs={"request": {"input": text, **request}}, **TO_AGENTQ)
    answer: dict[str, Any] = sent.get(timeout=120)
    return answer


def hand_in(text: str, **request: Any) -> str:
    """Wait for nothing but the run's id; ``shop.on_answer`` comes to the queue ``shop`` when the run has ended."""
    follow_up = {"task": "shop.on_answer", "queue": "shop"}
    request = {"input": text, "follow_up": follow_up, **request}
    run_id: str = app.send_task("agentq.submit", kwargs={"request": request}, **TO_AGENTQ).get(timeout=30)
    return run_id


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(USAGE)
    workflow = os.environ.get("WORKFLOW", "default")
    print(json.dumps(ask(sys.argv[1], workflow=workflow)))
    print(hand_in(sys.argv[1], workflow=workflow))
