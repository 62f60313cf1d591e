"""The example's files fit together: schemas, tools, articles, data and requests."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

import pytest
import yaml

from agentq.tools import load_toolbox
from examples.support_desk import knowledge, scorecard
from examples.support_desk.scorecard import load_requests
from examples.support_desk.seed import documents
from schemas.catalog import AgentSpec, RouteNode, WorkflowSpec

FOLDER = Path(knowledge.__file__).parent
AGENTS = {
    name: AgentSpec.model_validate(spec)
    for name, spec in yaml.safe_load((FOLDER / "agents.yaml").read_text())["agents"].items()
}
WORKFLOW = WorkflowSpec.model_validate(yaml.safe_load((FOLDER / "workflows" / "support_desk.yaml").read_text()))
TOOLS = load_toolbox(yaml.safe_load((FOLDER / "tools.yaml").read_text())["modules"]).specs
ARTICLES = {article.id: article for article in knowledge.articles()}
DATA = documents()
REQUESTS = load_requests()


def test_the_router_chooses_among_all_specialists() -> None:
    route = WORKFLOW.nodes["route"]
    assert isinstance(route, RouteNode)
    assert set(route.agents) == set(AGENTS) == {"billing", "orders", "technical", "general"}


def test_agents_may_call_declared_tools_only_and_only_billing_may_refund() -> None:
    assert all(name in TOOLS for agent in AGENTS.values() for name in agent.tools)
    assert [name for name, agent in AGENTS.items() if "process_refund" in agent.tools] == ["billing"]


def test_the_scorecard_knows_the_tools() -> None:
    assert set(TOOLS) == scorecard.TOOLS


def test_what_changes_something_honours_the_idempotency_key() -> None:
    effects = {name: (spec.effect, spec.keyed) for name, spec in TOOLS.items()}
    assert effects == {
        "search_knowledge_base": ("read", False),
        "get_order_status": ("read", False),
        "process_refund": ("irreversible", True),
        "create_ticket": ("write", True),
        "update_ticket": ("write", True),
    }


def test_there_are_enough_articles_of_a_readable_length() -> None:
    assert len(ARTICLES) == len(knowledge.articles()) >= 40
    lengths = {article.id: len(article.text.split()) for article in ARTICLES.values()}
    assert {name: length for name, length in lengths.items() if not 80 <= length <= 250} == {}
    assert all(re.fullmatch(r"KB-\d{3}", name) for name in ARTICLES)
    assert all(article.title and article.tags for article in ARTICLES.values())


def test_articles_state_the_rules_that_the_tools_enforce() -> None:
    assert "within 30 days of delivery" in ARTICLES["KB-001"].text
    assert "above 500 USD" in ARTICLES["KB-001"].text
    assert "each order can be refunded once" in ARTICLES["KB-001"].text


def test_the_data_covers_all_states() -> None:
    assert len(DATA["customers"]) >= 15
    assert len(DATA["orders"]) >= 30
    states = {"processing", "shipped", "delivered", "cancelled", "lost", "returned"}
    assert {order["status"] for order in DATA["orders"]} == states
    assert DATA["tickets"]
    assert DATA["refunds"]


def test_the_data_refers_to_what_exists() -> None:
    customers = {customer["_id"] for customer in DATA["customers"]}
    orders = {order["_id"]: order for order in DATA["orders"]}
    assert {order["customer_id"] for order in DATA["orders"]} <= customers
    assert {ticket["customer_id"] for ticket in DATA["tickets"]} <= customers
    for refund in DATA["refunds"]:
        assert refund["amount_usd"] <= orders[refund["order_id"]]["total_usd"]


def test_no_order_lives_in_the_future() -> None:
    today = date.fromisoformat(DATA["clock"][0]["date"])
    for order in DATA["orders"]:
        days = [order[key] for key in ("placed", "shipped", "delivered") if key in order]
        assert days == sorted(days), order["_id"]
        assert date.fromisoformat(days[-1]) <= today, order["_id"]


def test_shipping_is_charged_as_the_article_says() -> None:
    """Below 50 USD standard shipping costs 4.90 USD, members of Larkfield Plus pay none."""
    plus = {customer["_id"] for customer in DATA["customers"] if customer["plus"]}
    for order in DATA["orders"]:
        goods = order["total_usd"] - order["shipping_usd"]
        if goods < 50 and order["customer_id"] not in plus:
            assert order["shipping_usd"] == 4.90, order["_id"]


def test_there_are_enough_requests_and_each_can_be_checked() -> None:
    assert len(REQUESTS) >= 30
    customers = {customer["_id"] for customer in DATA["customers"]}
    for request in REQUESTS:
        expect = request.expect
        assert request.user in customers
        assert set(expect.specialists) <= set(AGENTS)
        assert {*(expect.tools or []), *expect.tools_include} <= set(TOOLS)
        assert set(expect.citations) <= set(ARTICLES)
        assert expect.facts, request.id
        for pattern in (*expect.facts, *expect.forbidden):
            re.compile(pattern)


@pytest.mark.parametrize("request_id", [request.id for request in REQUESTS if request.expect.citations])
def test_the_search_finds_an_article_that_a_request_needs(request_id: str) -> None:
    (request,) = (request for request in REQUESTS if request.id == request_id)
    found = {article.id for article in knowledge.index().search(request.text)}
    assert found & set(request.expect.citations)


def test_a_search_without_a_shared_word_finds_nothing() -> None:
    assert knowledge.index().search("xylophone zeppelin") == []


def test_an_article_without_front_matter_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "001-x.md"
    path.write_text("no front matter")
    with pytest.raises(ValueError, match=r"001-x\.md"):
        knowledge.read_article(path)
