"""The desk's own database: connection, documents, and the sentences that describe an order."""

from __future__ import annotations

import os
import threading
from datetime import date, timedelta
from typing import Any

from pymongo import MongoClient
from pymongo.database import Database

Doc = dict[str, Any]

DEFAULT_DATABASE = "support_desk"
REFUND_DAYS = 30
APPROVAL_ABOVE_USD = 500.0

_clients: dict[tuple[int, str], MongoClient[Doc]] = {}
_lock = threading.Lock()


def database(url: str | None = None, name: str | None = None) -> Database[Doc]:
    """The desk's database, by default the one named in AGENTQ_MONGO_URL and AGENTQ_SUPPORT_DESK_DB.

    This example is an application, and this is the one place where it reads the environment. Clients are kept by
    process id, because a client must not be used across a fork.
    """
    url = url or os.environ.get("AGENTQ_MONGO_URL")
    if not url:
        raise RuntimeError("AGENTQ_MONGO_URL is not set; the support desk needs its MongoDB.")
    with _lock:
        key = (os.getpid(), url)
        if key not in _clients:
            _clients[key] = MongoClient(url, tz_aware=True, serverSelectionTimeoutMS=5000, w="majority")
        client = _clients[key]
    return client[name or os.environ.get("AGENTQ_SUPPORT_DESK_DB", DEFAULT_DATABASE)]


def today(db: Database[Doc]) -> date:
    """The day the desk lives on, as stored with its data."""
    clock = db["clock"].find_one({"_id": "today"})
    if clock is None:
        raise RuntimeError("The support desk has no data; run 'python -m examples.support_desk.seed'.")
    return date.fromisoformat(clock["date"])


def next_id(db: Database[Doc], prefix: str) -> str:
    """The next number of a series, ``T-2006``. A number is never given twice; gaps are possible."""
    counter = db["counters"].find_one_and_update({"_id": prefix}, {"$inc": {"value": 1}}, return_document=True)
    if counter is None:
        raise RuntimeError("The support desk has no data; run 'python -m examples.support_desk.seed'.")
    return f"{prefix}-{counter['value']}"


def refundable_until(order: Doc) -> date | None:
    """The last day on which the order can be refunded or returned; None if that does not depend on a day."""
    delivered = order.get("delivered")
    return date.fromisoformat(delivered) + timedelta(days=REFUND_DAYS) if delivered else None


def usd(amount: float) -> str:
    return f"{amount:.2f} USD"


def describe(order: Doc, refund: Doc | None, now: date, *, private: bool) -> str:
    """An order in sentences; ``private`` adds what only its owner may see: items, total, payment, refund."""
    lines = [_state(order, now)]
    if private:
        items = ", ".join(f"{item['qty']} x {item['name']}" for item in order["items"])
        lines.append(f"The order contains {items}.")
        lines.append(f"The total is {usd(order['total_usd'])}, paid with {order['paid_with']}.")
        lines.append(_money_back(order, refund, now))
    return " ".join(line for line in lines if line)


def _state(order: Doc, now: date) -> str:
    name, by = f"Order {order['_id']}", f"{order.get('carrier')}, tracking number {order.get('tracking')}"
    expected = order.get("expected")
    sent = f"{name} was shipped on {order.get('shipped')} with {by}, and is"
    late = expected is not None and date.fromisoformat(expected) < now
    return {
        "processing": f"{name} is being processed: it is not shipped yet and is expected to arrive on {expected}.",
        "shipped": f"{sent} late: it was expected to arrive on {expected}."
        if late
        else f"{sent} expected to arrive on {expected}.",
        "delivered": f"{name} was delivered on {order.get('delivered')} by {by}.",
        "cancelled": f"{name} was cancelled on {order.get('cancelled')} and is not delivered; nothing was charged.",
        "lost": f"The parcel of order {order['_id']} ({by}) was declared lost by the carrier on {order.get('lost')}.",
        "returned": f"{name} was returned: it came back to our warehouse on {order.get('returned')}.",
    }[str(order["status"])]


def _money_back(order: Doc, refund: Doc | None, now: date) -> str:
    if refund is not None:
        return (
            f"A refund of {usd(refund['amount_usd'])} was issued on {refund['issued']} (refund number {refund['_id']})."
        )
    until = refundable_until(order)
    if order["status"] == "lost":
        return "For a lost parcel a full refund or a free replacement is possible."
    if order["status"] == "processing":
        return "Until it is shipped, the order can be cancelled with a full refund."
    if order["status"] != "delivered" or until is None:
        return ""
    if now <= until:
        return f"A return or refund is possible until {until}, which is {REFUND_DAYS} days after delivery."
    return f"A return or refund was possible until {until}, {REFUND_DAYS} days after delivery, and no longer is."
