"""The desk's tools on a real MongoDB: ownership, refund rules, and effects that happen once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from pymongo.database import Database

from agentq.client import Outcome
from agentq.tools import ToolContext, ToolError
from examples.support_desk import desk, tools
from examples.support_desk.scorecard import DatabaseExpectation, DeskRequest, Expectation, faults
from examples.support_desk.seed import documents, seed

pytestmark = pytest.mark.servers

By = Callable[..., ToolContext]


@pytest.fixture
def db(mongo_url: str, database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database[desk.Doc]]:
    """A freshly loaded desk in a database of its own, found the way the tools find it."""
    monkeypatch.setenv("AGENTQ_MONGO_URL", mongo_url)
    monkeypatch.setenv("AGENTQ_SUPPORT_DESK_DB", database)
    found = desk.database()
    seed(found)
    yield found
    found.client.drop_database(database)


def by(user: str | None, key: str = "r1:s1") -> ToolContext:
    return ToolContext(
        run_id=key.split(":", maxsplit=1)[0], step_id="s1", attempt=1, tenant="default", user=user, conversation=None,
        agent="billing", idempotency_key=key, deadline=time.monotonic() + 30,
    )  # fmt: skip


def test_loading_twice_gives_the_same_state(db: Database[desk.Doc]) -> None:
    tools.create_ticket("Hello", "A ticket to be forgotten", by("cust-001"))
    seed(db)
    assert {name: db[name].count_documents({}) for name in documents()} == {
        name: len(content) for name, content in documents().items()
    }


def test_a_customer_sees_the_own_order(db: Database[desk.Doc]) -> None:
    order = tools.get_order_status("LF-1001", by("cust-001"))
    assert (order["status"], order["total_usd"], order["refund_possible_until"]) == ("delivered", 129.0, "2026-12-06")


def test_another_customers_order_looks_like_none(db: Database[desk.Doc]) -> None:
    said = []
    for number in ("LF-1010", "LF-9999"):
        with pytest.raises(ToolError) as refusal:
            tools.get_order_status(number, by("cust-001"))
        said.append(str(refusal.value).replace(number, "LF"))
    assert said[0] == said[1]


def test_who_is_not_signed_in_sees_no_private_data(db: Database[desk.Doc]) -> None:
    order = tools.get_order_status("LF-1001", by(None))
    assert order["status"] == "delivered"
    assert not {"items", "total_usd", "paid_with", "tracking_number", "refund"} & set(order)


def test_a_refund_is_paid_once_for_one_key(db: Database[desk.Doc]) -> None:
    first = tools.process_refund("LF-1001", "too tight", by("cust-001"))
    again = tools.process_refund("LF-1001", "too tight", by("cust-001"))
    assert first == again
    assert first["amount_usd"] == 129.0
    assert db["refunds"].count_documents({"order_id": "LF-1001"}) == 1


def test_many_calls_at_once_with_one_key_pay_once(db: Database[desk.Doc]) -> None:
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(tools.process_refund, "LF-1001", "too tight", by("cust-001")) for _ in range(16)]
    assert len({future.result()["refund_id"] for future in futures}) == 1
    assert db["refunds"].count_documents({"order_id": "LF-1001"}) == 1


def test_many_calls_at_once_with_different_keys_pay_once(db: Database[desk.Doc]) -> None:
    def refund(number: int) -> str:
        try:
            return str(tools.process_refund("LF-1001", "too tight", by("cust-001", f"r{number}:s1"))["refund_id"])
        except ToolError as refusal:
            return refusal.code

    with ThreadPoolExecutor(8) as pool:
        ended = sorted(pool.map(refund, range(16)))
    assert ended.count("already_refunded") == 15
    assert db["refunds"].count_documents({"order_id": "LF-1001"}) == 1


@pytest.mark.parametrize(
    ("user", "order", "amount", "code"),
    [
        ("cust-002", "LF-1004", None, "too_late"),
        ("cust-010", "LF-1020", None, "already_refunded"),
        ("cust-008", "LF-1016", 200.0, "amount_too_high"),
        ("cust-006", "LF-1011", None, "approval_needed"),
        ("cust-012", "LF-1024", None, "on_its_way"),
        ("cust-007", "LF-1014", None, "cancelled"),
        ("cust-001", "LF-1011", None, "order_not_found"),
        (None, "LF-1001", None, "tool_error"),
    ],
)
def test_a_refund_that_a_rule_forbids_is_refused_and_not_made(
    db: Database[desk.Doc], user: str | None, order: str, amount: float | None, code: str
) -> None:
    before = db["refunds"].count_documents({})
    with pytest.raises(ToolError) as refusal:
        tools.process_refund(order, "I want it", by(user), amount)
    assert refusal.value.code == code
    assert db["refunds"].count_documents({}) == before


@pytest.mark.parametrize(("amount", "paid"), [(None, 118.0), (118.0, 118.0), (0.01, 0.01)])
def test_up_to_the_total_can_be_refunded(db: Database[desk.Doc], amount: float | None, paid: float) -> None:
    assert tools.process_refund("LF-1016", "crackles", by("cust-008"), amount)["amount_usd"] == paid


def test_the_last_day_of_the_window_counts(db: Database[desk.Doc]) -> None:
    db["clock"].update_one({"_id": "today"}, {"$set": {"date": "2026-12-06"}})
    assert tools.process_refund("LF-1001", "too tight", by("cust-001"))["refund_id"]
    db["clock"].update_one({"_id": "today"}, {"$set": {"date": "2026-12-15"}})
    with pytest.raises(ToolError, match="ended on 2026-12-14"):
        tools.process_refund("LF-1016", "crackles", by("cust-008", "r2:s1"))


def test_refunding_what_was_not_shipped_cancels_it(db: Database[desk.Doc]) -> None:
    said = tools.process_refund("LF-1003", "changed my mind", by("cust-002"))["summary"]
    assert "The order is cancelled." in said
    assert tools.get_order_status("LF-1003", by("cust-002"))["status"] == "cancelled"


def test_a_crash_between_refund_and_cancellation_is_mended_by_the_next_attempt(
    db: Database[desk.Doc], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any) -> None:
        raise ConnectionError

    with monkeypatch.context() as patched:
        patched.setattr(tools, "_cancel_if_processing", crash)
        with pytest.raises(ConnectionError):
            tools.process_refund("LF-1003", "changed my mind", by("cust-002"))
    tools.process_refund("LF-1003", "changed my mind", by("cust-002"))
    assert db["orders"].find_one({"_id": "LF-1003"}, {"status": 1}) == {"_id": "LF-1003", "status": "cancelled"}
    assert db["refunds"].count_documents({"order_id": "LF-1003"}) == 1


def test_a_ticket_is_opened_once_for_one_key(db: Database[desk.Doc]) -> None:
    with ThreadPoolExecutor(8) as pool:
        futures = [
            pool.submit(tools.create_ticket, "Late", "It is late", by("cust-004"), "high", "LF-1008") for _ in range(16)
        ]
    assert len({future.result()["ticket_id"] for future in futures}) == 1
    stored = list(db["tickets"].find({"run_id": "r1"}))
    assert [(one["customer_id"], one["priority"], one["order_id"]) for one in stored] == [
        ("cust-004", "high", "LF-1008")
    ]


def test_a_ticket_about_another_customers_order_is_refused(db: Database[desk.Doc]) -> None:
    with pytest.raises(ToolError, match="There is no order LF-1008"):
        tools.create_ticket("Late", "It is late", by("cust-001"), "normal", "LF-1008")


def test_a_note_is_added_once_for_one_key(db: Database[desk.Doc]) -> None:
    for key in ("r1:s1", "r1:s1", "r2:s1"):
        tools.update_ticket("T-2002", "Still dark", by("cust-009", key))
    ticket = tools.update_ticket("T-2002", "Solved", by("cust-009", "r3:s1"), "closed")
    assert (ticket["notes"], ticket["status"]) == (3, "closed")


@pytest.mark.parametrize("user", ["cust-001", None])
def test_another_customers_ticket_is_neither_shown_nor_changed(db: Database[desk.Doc], user: str | None) -> None:
    with pytest.raises(ToolError, match="There is no ticket T-2002") as refusal:
        tools.update_ticket("T-2002", "Mine now", by(user), "closed")
    assert "Pulse" not in str(refusal.value)
    assert db["tickets"].count_documents({"_id": "T-2002", "status": "open", "notes": []}) == 1


def test_without_data_the_tools_say_how_to_load_it(db: Database[desk.Doc]) -> None:
    db["clock"].delete_many({})
    with pytest.raises(RuntimeError, match=r"examples\.support_desk\.seed"):
        tools.get_order_status("LF-1001", by("cust-001"))


@pytest.mark.parametrize(
    ("wanted", "fault"),
    [
        (DatabaseExpectation(collection="tickets", filter={"_id": "T-2002"}, count=1, fields={"status": "open"}), None),
        (DatabaseExpectation(collection="tickets", filter={"run_id": "$run"}, count=1), "0 tickets match"),
        (
            DatabaseExpectation(collection="tickets", filter={"_id": "T-2002"}, count=1, fields={"status": "x"}),
            "status",
        ),
    ],
)
def test_the_scorecard_looks_into_the_database(
    db: Database[desk.Doc], wanted: DatabaseExpectation, fault: str | None
) -> None:
    expect = Expectation(specialist="general", acceptance=None, database=[wanted])
    outcome = Outcome(run_id="r1", status="succeeded", agent="general")
    found = faults(DeskRequest(id="a", text="x", expect=expect), outcome, db)
    assert (found == []) if fault is None else any(fault in one for one in found)
