"""What is said of an order: always true, and nothing private to a stranger."""

from __future__ import annotations

from datetime import date

import pytest

from examples.support_desk.desk import describe, refundable_until
from examples.support_desk.seed import documents

ORDERS = {order["_id"]: order for order in documents()["orders"]}
TODAY = date(2026, 11, 20)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        ("LF-1002", "was shipped on 2026-11-17 with DHL, tracking number JD014600003002, and is expected to arrive on"),
        ("LF-1003", "is being processed"),
        ("LF-1008", "is late: it was expected to arrive on 2026-11-13"),
        ("LF-1001", "was delivered on 2026-11-06"),
        ("LF-1001", "possible until 2026-12-06"),
        ("LF-1004", "was possible until 2026-10-05"),
        ("LF-1014", "was cancelled on 2026-11-02"),
        ("LF-1015", "declared lost by the carrier on 2026-11-14"),
        ("LF-1018", "came back to our warehouse on 2026-10-30"),
    ],
)
def test_an_order_is_described_by_its_state(number: str, said: str) -> None:
    assert said in describe(ORDERS[number], None, TODAY, private=True)


def test_a_stranger_hears_nothing_of_items_and_money() -> None:
    text = describe(ORDERS["LF-1001"], None, TODAY, private=False)
    assert "delivered" in text
    assert not any(word in text for word in ("Aria", "USD", "Visa", "refund"))


def test_an_issued_refund_is_told_instead_of_the_window() -> None:
    refund = {"_id": "R-1", "amount_usd": 5.0, "issued": "2026-11-10"}
    text = describe(ORDERS["LF-1001"], refund, TODAY, private=True)
    assert "A refund of 5.00 USD was issued on 2026-11-10 (refund number R-1)." in text
    assert "until" not in text


def test_the_window_ends_thirty_days_after_delivery() -> None:
    assert refundable_until(ORDERS["LF-1001"]) == date(2026, 12, 6)
    assert refundable_until(ORDERS["LF-1003"]) is None
