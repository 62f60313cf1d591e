"""What the desk's agents may do. Each function checks for itself who asks; writes honour the idempotency key."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal

from pydantic import Field
from pymongo import ReturnDocument
from pymongo.database import Database
from pymongo.errors import DuplicateKeyError

from agentq.tools import ToolContext, ToolError, tool
from examples.support_desk import knowledge
from examples.support_desk.desk import (
    APPROVAL_ABOVE_USD,
    REFUND_DAYS,
    Doc,
    database,
    describe,
    next_id,
    refundable_until,
    today,
    usd,
)

OrderId = Annotated[str, Field(pattern=r"^LF-[0-9]{4}$", description="The order number, for example LF-1001.")]
TicketId = Annotated[str, Field(pattern=r"^T-[0-9]{4,}$", description="The ticket number, for example T-2001.")]


@tool(effect="read", timeout_s=5)
def search_knowledge_base(
    query: Annotated[str, Field(min_length=2, max_length=300, description="What to look for, in plain words.")],
) -> dict[str, Any]:
    """Search the shop's knowledge base. Use it for every question about policies, how something works, prices,
    payment, shipping, warranty, accounts and privacy, and for the troubleshooting of devices. It gives up to three
    articles; cite the id of each article that the answer uses, like [KB-001].
    """
    found = knowledge.index().search(query)
    return {"articles": [{"id": article.id, "title": article.title, "text": article.text} for article in found]}


@tool(effect="read", timeout_s=5)
def get_order_status(order_id: OrderId, context: ToolContext) -> dict[str, Any]:
    """Look up one order: where the parcel is and whether it was shipped, arrived, delivered, is late or lost,
    tracking number, carrier and expected day of arrival; the items, total and payment; whether a return or refund is
    possible until when, or was issued.
    """
    db = database()
    order, now = _own_order(db, order_id, context), today(db)
    private = context.user is not None
    refund = db["refunds"].find_one({"order_id": order_id}) if private else None
    shown = ("status", "placed", "shipped", "delivered", "expected", "cancelled", "lost", "returned")
    result: dict[str, Any] = {"order_id": order_id, **{key: order[key] for key in shown if order.get(key)}}
    if private:
        until = refundable_until(order)
        result |= {
            "carrier": order["carrier"],
            "tracking_number": order["tracking"],
            "items": [f"{item['qty']} x {item['name']}" for item in order["items"]],
            "total_usd": order["total_usd"],
            "paid_with": order["paid_with"],
            "refund_possible_until": str(until) if until else None,
            "refund": {"id": refund["_id"], "amount_usd": refund["amount_usd"], "issued": refund["issued"]}
            if refund
            else None,
        }
    return {**result, "summary": describe(order, refund, now, private=private)}


@tool(effect="irreversible", keyed=True, timeout_s=10)
def process_refund(
    order_id: OrderId,
    reason: Annotated[str, Field(min_length=3, max_length=200, description="Why, in the customer's words.")],
    context: ToolContext,
    amount_usd: Annotated[
        float | None, Field(gt=0, description="The amount in USD; leave it out to refund the whole order.")
    ] = None,
) -> dict[str, Any]:
    """Refund an order (money back, reimburse, repay), wholly or in part, to the payment method it was paid with; an
    order that is still being processed is cancelled by it (cancel, call off). Call get_order_status first.
    Do not use it for questions about refunds.
    """
    db = database()
    done = db["refunds"].find_one({"key": context.idempotency_key})
    if done is None:
        order = _own_order(db, order_id, context)
        amount = _allowed_amount(db, order, amount_usd, context)
        done = _issue(db, order, amount, reason, context)
    _cancel_if_processing(db, done)
    paypal = done["paid_to"] == "PayPal"
    return {
        "refund_id": done["_id"],
        "order_id": done["order_id"],
        "amount_usd": done["amount_usd"],
        "paid_to": done["paid_to"],
        "summary": (
            f"We have refunded {usd(done['amount_usd'])} for order {done['order_id']} to {done['paid_to']}; the refund "
            f"number is {done['_id']}.{' The order is cancelled.' if done['cancels'] else ''} It takes "
            f"{'1 to 2' if paypal else '5 to 7'} business days until you see the money."
        ),
    }


@tool(effect="write", keyed=True, timeout_s=10)
def create_ticket(
    subject: Annotated[str, Field(min_length=3, max_length=120, description="One line that says what it is about.")],
    description: Annotated[str, Field(min_length=3, max_length=4000, description="All a colleague needs to know.")],
    context: ToolContext,
    priority: Annotated[
        Literal["normal", "high"],
        Field(
            description="high: the customer is angry, complains, or asks for a person, human, manager or supervisor, "
            "or it is urgent; normal: everything else."
        ),
    ] = "normal",
    order_id: Annotated[
        str | None, Field(pattern=r"^LF-[0-9]{4}$", description="The order number, if it is about an order.")
    ] = None,
) -> dict[str, Any]:
    """Open a new ticket for a colleague, when the customer asks for a human (person, manager, supervisor, real agent,
    somebody to speak or talk to), wants to complain (complaint) or escalate, claims the warranty (claim, repair,
    replacement), asks for a change that only people can make (another delivery address, company data on an invoice),
    or when another result says that a person must decide.
    """
    db = database()
    if order_id is not None:
        _own_order(db, order_id, context)
    ticket = db["tickets"].find_one({"key": context.idempotency_key})
    if ticket is None:
        ticket = {
            "_id": next_id(db, "T"), "customer_id": context.user, "order_id": order_id, "subject": subject,
            "description": description, "priority": priority, "status": "open", "opened": str(today(db)), "notes": [],
            "key": context.idempotency_key, "run_id": context.run_id,
        }  # fmt: skip
        ticket = _insert_once(db, "tickets", ticket)
    within = "4 working hours" if ticket["priority"] == "high" else "one business day"
    return {
        "ticket_id": ticket["_id"],
        "status": ticket["status"],
        "priority": ticket["priority"],
        "summary": f"We have opened ticket {ticket['_id']} with {ticket['priority']} priority for you. A colleague "
        f"answers by e-mail within {within}.",
    }


@tool(effect="write", keyed=True, timeout_s=10)
def update_ticket(
    ticket_id: TicketId,
    note: Annotated[str, Field(min_length=3, max_length=4000, description="What to add, in the customer's words.")],
    context: ToolContext,
    status: Annotated[
        Literal["open", "closed"] | None,
        Field(description="closed: it is solved, settled, or the customer wants to close it; open: reopen it."),
    ] = None,
) -> dict[str, Any]:
    """Add a note to an existing ticket (append, attach), or close or reopen it, when the customer names its number."""
    db = database()
    mine = {"_id": ticket_id, "customer_id": context.user}
    if context.user is None or db["tickets"].find_one(mine) is None:
        raise ToolError(
            f"There is no ticket {ticket_id} in this account.", code="ticket_not_found",
            hint="Please check the ticket number.",
        )  # fmt: skip
    key = context.idempotency_key
    change: dict[str, Any] = {"$push": {"notes": {"key": key, "text": note, "day": str(today(db))}}}
    if status is not None:
        change["$set"] = {"status": status}
    # The filter makes a repeated call with the same key a no-op.
    db["tickets"].update_one({**mine, "notes.key": {"$ne": key}}, change)
    ticket = db["tickets"].find_one(mine) or {}
    return {
        "ticket_id": ticket_id,
        "status": ticket["status"],
        "notes": len(ticket["notes"]),
        "summary": f"We have added your note to ticket {ticket_id}, which is now {ticket['status']}. It is about: "
        f"{ticket['subject']}.",
    }


def _own_order(db: Database[Doc], order_id: str, context: ToolContext) -> Doc:
    """The order, if it is the customer's. Another customer's order is answered like one that does not exist."""
    wanted: Doc = {"_id": order_id}
    if context.user is not None:
        wanted["customer_id"] = context.user
    order = db["orders"].find_one(wanted)
    if order is None:
        raise ToolError(
            f"There is no order {order_id} in this account.", code="order_not_found",
            hint="Please check the order number; it is in the order confirmation and looks like LF-1001.",
        )  # fmt: skip
    return order


def _allowed_amount(db: Database[Doc], order: Doc, wished: float | None, context: ToolContext) -> float:
    """The amount to refund; a ToolError says which rule forbids it and what is possible instead."""
    if context.user is None:
        raise ToolError("A refund is not possible without signing in.", hint="Please sign in and ask again.")
    earlier = db["refunds"].find_one({"order_id": order["_id"]})
    if earlier is not None and earlier["key"] == context.idempotency_key:
        return float(earlier["amount_usd"])  # the same call, made at the same time, was faster
    if earlier is not None:
        raise _refunded_before(earlier)
    _refuse_state(order, today(db))
    total = float(order["total_usd"])
    amount = total if wished is None else round(wished, 2)
    if amount > total:
        raise ToolError(
            f"A refund of {usd(amount)} is not possible: the total of order {order['_id']} is {usd(total)}.",
            code="amount_too_high",
            hint=f"At most {usd(total)} can be refunded.",
        )
    if amount > APPROVAL_ABOVE_USD:
        raise ToolError(
            f"A refund of {usd(amount)} for order {order['_id']} is above {usd(APPROVAL_ABOVE_USD)} and cannot be "
            "issued without the approval of a person, who decides within one business day.",
            code="approval_needed",
            hint="Open a ticket with create_ticket so that a person can approve it.",
        )
    return amount


def _refunded_before(refund: Doc) -> ToolError:
    return ToolError(
        f"Order {refund['order_id']} was already refunded: {usd(refund['amount_usd'])} on {refund['issued']} (refund "
        f"number {refund['_id']}), paid to {refund['paid_to']}. A second refund is not possible.",
        code="already_refunded",
    )


def _refuse_state(order: Doc, now: date) -> None:
    """Raise if the order's state or age forbids a refund."""
    number, status, until = order["_id"], order["status"], refundable_until(order)
    if status in ("processing", "lost"):
        return
    if status == "shipped":
        raise ToolError(
            f"Order {number} is on its way and cannot be refunded before it is delivered.",
            code="on_its_way",
            hint="The parcel can be refused at the door, or returned after delivery.",
        )
    if status == "cancelled":
        raise ToolError(
            f"Order {number} was cancelled and nothing was charged, so there is nothing to refund.", code="cancelled"
        )
    if until is None or now > until:
        raise ToolError(
            f"Order {number} was delivered on {order.get('delivered')}; the {REFUND_DAYS} days for a refund ended on "
            f"{until}, so a refund is no longer possible.",
            code="too_late",
            hint="A defective device is still covered by the warranty of two years.",
        )


def _issue(db: Database[Doc], order: Doc, amount: float, reason: str, context: ToolContext) -> Doc:
    refund: Doc = {
        "_id": next_id(db, "R"), "order_id": order["_id"], "customer_id": order["customer_id"], "amount_usd": amount,
        "paid_to": order["paid_with"], "reason": reason, "issued": str(today(db)), "key": context.idempotency_key,
        "cancels": order["status"] == "processing", "run_id": context.run_id,
    }  # fmt: skip
    stored = _insert_once(db, "refunds", refund)
    if stored["key"] != context.idempotency_key:
        raise _refunded_before(stored)
    return stored


def _insert_once(db: Database[Doc], collection: str, document: Doc) -> Doc:
    """Insert, or give what a unique index says is there already (the same call before, or another refund)."""
    try:
        db[collection].insert_one(document)
    except DuplicateKeyError:
        same: list[Doc] = [{"key": document["key"]}]
        if collection == "refunds":
            same.append({"order_id": document["order_id"]})
        found = db[collection].find_one({"$or": same})
        if found is None:
            raise
        return found
    return document


def _cancel_if_processing(db: Database[Doc], refund: Doc) -> None:
    """The order follows its refund; repeated after a crash between the two writes."""
    if refund.get("cancels"):
        db["orders"].find_one_and_update(
            {"_id": refund["order_id"], "status": "processing"},
            {"$set": {"status": "cancelled", "cancelled": refund["issued"]}},
            return_document=ReturnDocument.AFTER,
        )
