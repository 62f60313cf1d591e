"""The Python client against the whole running system."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from pymongo.database import Database

from agentq.client import Client, Handle
from agentq.errors import AgentqError, Conflict, IdempotencyConflict, NotFound, UnknownWorkflow

QUESTION = "Where is my order LF-1002?"


def test_a_request_goes_through_router_specialist_tool_and_critic(client: Client) -> None:
    """The answer comes from the tool's data, was accepted by the critic, and the audit names every step on the way."""
    run = client.submit(QUESTION, workflow="support_desk", user="cust-001")
    outcome = run.wait(60)
    assert outcome.status == "succeeded"
    assert outcome.agent == "orders"
    assert outcome.acceptance == "critic"
    assert outcome.tools == ["get_order_status"]
    assert "2026-11-24" in str(outcome.answer)
    assert outcome.cost_usd > 0
    events = run.events()
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    types = [event["type"] for event in events]
    assert types[0] == "run.accepted"
    assert types[-1] == "run.succeeded"
    assert len([event for event in events if event["step"]]) >= 5, types


def test_the_same_key_and_body_is_the_same_run_and_another_body_is_refused(client: Client) -> None:
    key = f"mail-{uuid4()}"
    first = client.submit(QUESTION, workflow="support_desk", user="cust-001", idempotency_key=key)
    again = client.submit(QUESTION, workflow="support_desk", user="cust-001", idempotency_key=key)
    assert again.run_id == first.run_id
    with pytest.raises(IdempotencyConflict) as caught:
        client.submit(QUESTION, workflow="support_desk", user="cust-002", idempotency_key=key)
    assert caught.value.details["run_id"] == first.run_id
    elsewhere = client.submit(QUESTION, workflow="support_desk", tenant="other", user="cust-001", idempotency_key=key)
    assert elsewhere.run_id != first.run_id, "a key belongs to its tenant"
    assert first.wait(60).status == elsewhere.wait(60).status == "succeeded"


def test_many_requests_are_handed_in_with_one_error_each_for_the_bad_ones(client: Client) -> None:
    """``submit_many`` keeps the order; a bad request costs its own place only."""
    good = {"input": "How long is a gift card valid, and can it be refunded?", "workflow": "support_desk"}
    bodies: list[dict[str, Any]] = [good, {"input": ""}, good, {**good, "workflow": "no_such_workflow"}, good]
    results = list(client.submit_many(bodies, chunk=2))
    handles = [result for result in results if isinstance(result, Handle)]
    errors = {place: result.code for place, result in enumerate(results) if isinstance(result, AgentqError)}
    assert errors == {1: "empty_input", 3: "unknown_workflow"}
    assert len({handle.run_id for handle in handles}) == 3
    assert {handle.wait(60).status for handle in handles} == {"succeeded"}


def test_runs_of_one_conversation_see_what_was_said_before(client: Client, mongo: Database[dict[str, Any]]) -> None:
    """A request gets the messages of the runs before it, question and answer; another conversation's never."""
    name = f"chat-{uuid4().hex}"
    first = client.submit(QUESTION, workflow="support_desk", user="cust-001", conversation=name).wait(60)
    more = "How much is express shipping?"
    second = client.submit(more, workflow="support_desk", user="cust-001", conversation=name)
    other = client.submit(more, workflow="support_desk", user="cust-001", conversation=f"{name}-2")
    assert [run.wait(60).status for run in (second, other)] == ["succeeded", "succeeded"]
    found = {run["_id"]: run for run in mongo["runs"].find({"_id": {"$in": [second.run_id, other.run_id]}})}
    assert (found[second.run_id]["turn"], found[other.run_id]["turn"]) == (2, 1)
    history = [message["content"] for message in found[second.run_id]["state"]["history"]]
    assert history == [QUESTION, first.answer]
    assert found[other.run_id]["state"]["history"] == []


def test_what_does_not_exist_is_said_so(client: Client) -> None:
    with pytest.raises(NotFound):
        client.run("r0")
    with pytest.raises(UnknownWorkflow, match="support_desk"):
        client.submit(QUESTION, workflow="suport_desk")


def test_an_ended_run_cannot_be_cancelled(client: Client) -> None:
    run = client.submit(QUESTION, workflow="support_desk", user="cust-001")
    assert run.wait(60).status == "succeeded"
    with pytest.raises(Conflict):
        run.cancel()
