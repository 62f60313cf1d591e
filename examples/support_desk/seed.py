"""(Re)load the desk's data: ``python -m examples.support_desk.seed [--mongo-url URL] [--database NAME]``.

Loading replaces everything in the desk's own database, so running it again gives the same state.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml
from pymongo.database import Database

from examples.support_desk.desk import Doc, database

DATA = Path(__file__).with_name("data.yaml")
_DAYS = ("placed", "shipped", "delivered", "expected", "cancelled", "lost", "returned")


def documents(data: Path = DATA) -> dict[str, list[Doc]]:
    """The documents of every collection, from the data file. Pure but for reading the file."""
    raw = yaml.safe_load(data.read_text(encoding="utf-8"))
    products = {sku: {"_id": sku, "name": name, "price_usd": price} for sku, (name, price) in raw["products"].items()}
    orders = [_order(number, order, products) for number, order in raw["orders"].items()]
    owner = {order["_id"]: order["customer_id"] for order in orders}
    paid = {order["_id"]: order["paid_with"] for order in orders}
    return {
        "clock": [{"_id": "today", "date": str(raw["today"])}],
        "products": list(products.values()),
        "customers": [
            {"_id": name, "name": person, "email": email, "plus": plus}
            for name, (person, email, plus) in raw["customers"].items()
        ],
        "orders": orders,
        "refunds": [
            {
                "_id": number, "order_id": refund["order"], "customer_id": owner[refund["order"]],
                "amount_usd": refund["amount"], "paid_to": paid[refund["order"]], "reason": refund["reason"],
                "issued": str(refund["issued"]), "key": f"seed:{number}",
            }
            for number, refund in raw["refunds"].items()
        ],
        "tickets": [
            {
                "_id": number, "customer_id": ticket["customer"], "order_id": ticket["order"],
                "subject": ticket["subject"], "description": ticket["subject"], "priority": ticket["priority"],
                "status": ticket["status"], "opened": str(ticket["opened"]), "notes": [], "key": f"seed:{number}",
            }
            for number, ticket in raw["tickets"].items()
        ],
        "counters": [_counter("T", raw["tickets"]), _counter("R", raw["refunds"])],
    }  # fmt: skip


def _order(number: str, order: Doc, products: dict[str, Doc]) -> Doc:
    items = [
        {"sku": sku, "name": products[sku]["name"], "qty": qty, "price_usd": products[sku]["price_usd"]}
        for sku, qty in order["items"].items()
    ]
    total = round(sum(item["qty"] * item["price_usd"] for item in items) + order["shipping"], 2)
    return {
        "_id": number,
        "customer_id": order["customer"],
        "items": items,
        "shipping_usd": float(order["shipping"]),
        "total_usd": total,
        "paid_with": order["paid_with"],
        "status": order["status"],
        "carrier": order.get("carrier"),
        "tracking": order.get("tracking"),
        **{day: str(order[day]) for day in _DAYS if day in order},
    }


def _counter(prefix: str, numbered: dict[str, Any]) -> Doc:
    return {"_id": prefix, "value": max(int(number.split("-")[1]) for number in numbered)}


def seed(db: Database[Doc]) -> dict[str, int]:
    """Replace the content of the desk's database; gives the number of documents by collection. Safe to repeat."""
    loaded = documents()
    for name, content in loaded.items():
        db[name].delete_many({})
        db[name].insert_many(content)
    # What keeps a repeated call from doing something twice, and an order from being refunded twice.
    db["refunds"].create_index("key", unique=True)
    db["refunds"].create_index("order_id", unique=True)
    db["tickets"].create_index("key", unique=True)
    db["orders"].create_index("customer_id")
    return {name: len(content) for name, content in loaded.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.support_desk.seed", description=__doc__)
    parser.add_argument("--mongo-url", help="default: AGENTQ_MONGO_URL")
    parser.add_argument("--database", help="default: AGENTQ_SUPPORT_DESK_DB, else support_desk")
    arguments = parser.parse_args(argv)
    loaded = seed(database(arguments.mongo_url, arguments.database))
    print(", ".join(f"{count} {name}" for name, count in loaded.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
