"""Who is told what of an end, and when it is tried again. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, cast
from urllib.parse import urlsplit

from agentq.protocol import FollowUp, Notify, Webhook
from schemas.batch import BatchDoc
from schemas.delivery import Delivery, DeliveryKind
from schemas.run import RunDoc

FIRST_DELAY_S = 5.0
GROWTH = 4.0
LONGEST_DELAY_S = 8 * 3600.0
MAX_ATTEMPTS = 10  # 5 s, 20 s, 80 s, 5 min, 21 min, 85 min, 5.7 h, 8 h, 8 h: about a day
SPREAD = 0.1


def of_run(run: RunDoc) -> list[Delivery]:
    """The deliveries of a run that has ended. The same each time it is asked for the same end; a run that was redriven
    ends again, and that is told as well."""
    assert run["ended_at"] is not None
    error = run["error"] or {}
    data = {
        "run_id": run["_id"], "status": run["status"], "workflow": run["workflow"].get("name"),
        "tenant": run["tenant"], "error": error.get("code"),
    }  # fmt: skip
    if "batch" in run:
        data |= {"batch_id": run["batch"]["id"], "custom_id": run["batch"]["custom_id"]}
    return _deliveries(run.get("notify", {}), run["_id"], run["tenant"], f"run.{run['status']}", data, run["ended_at"])


def of_batch(batch: BatchDoc) -> list[Delivery]:
    """The deliveries of a batch that has ended."""
    data = {
        "batch_id": batch["_id"], "status": batch["status"], "workflow": batch["workflow"], "tenant": batch["tenant"],
        "total": batch["total"], "counts": batch["counts"],
    }  # fmt: skip
    notify = batch.get("notify", {})
    ended_at = batch["at"][batch["status"]]
    return _deliveries(notify, batch["_id"], batch["tenant"], f"batch.{batch['status']}", data, ended_at)


def _deliveries(
    notify: Notify | Mapping[str, Any], subject: str, tenant: str, kind_of_end: str, data: dict[str, Any], at: datetime
) -> list[Delivery]:
    made: list[Delivery] = []
    if "webhook" in notify:
        hook: Webhook = notify["webhook"]
        lane = f"{tenant}|{_host(hook['url'])}"
        made.append(_delivery("webhook", subject, tenant, lane, hook, kind_of_end, data, at))
    if "follow_up" in notify:
        follow: FollowUp = notify["follow_up"]
        lane = f"{tenant}|queue {follow['queue']}"
        made.append(_delivery("follow_up", subject, tenant, lane, follow, kind_of_end, data, at))
    return made


def _delivery(
    kind: DeliveryKind, subject: str, tenant: str, lane: str, to: Webhook | FollowUp, kind_of_end: str,
    data: dict[str, Any], at: datetime,
) -> Delivery:  # fmt: skip
    return {
        "_id": f"{subject}:{int(at.timestamp() * 1000):x}:{kind}",
        "kind": kind,
        "subject": subject,
        "tenant": tenant,
        "lane": lane,
        "to": to,
        "type": kind_of_end,
        "data": data,
        "status": "pending",
        "attempts": 0,
        "not_before": at,
        "token": None,
        "created_at": at,
        "error": None,
        "ended_at": None,
    }


def _host(url: str) -> str:
    return (urlsplit(url).hostname or "").lower()


def receiver(delivery: Delivery) -> str:
    """Where it goes, for people: without the query, which may hold a secret of the receiver's."""
    if delivery["kind"] == "webhook":
        parts = urlsplit(cast("Webhook", delivery["to"])["url"])
        return f"{parts.scheme}://{parts.netloc}{parts.path}"
    to = cast("FollowUp", delivery["to"])
    return f"{to['task']} on {to['queue']}"


def retry_delay_s(attempts: int, chance: float) -> float | None:
    """How long to wait after so many tries, None if there is to be no other. ``chance``: 0 to 1, so that what failed
    together does not come back together."""
    if attempts >= MAX_ATTEMPTS:
        return None
    delay = min(FIRST_DELAY_S * GROWTH ** (attempts - 1), LONGEST_DELAY_S)
    return float(delay * (1 + SPREAD * chance))
