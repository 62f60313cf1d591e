"""A run through each kind of model over real HTTP: native tools on both wire formats, and ReAct text."""

from __future__ import annotations

from typing import Annotated

import pytest
from pydantic import Field

from agentq.llm.endpoints import Provider
from agentq.llm.http import HttpLlm
from agentq.offline.server import offline_server
from agentq.tools import tool
from agentq.tools.declare import declared_tool
from agentq.tools.toolbox import Toolbox
from schemas.catalog import Bundle
from tests.unit.runtime.world import World, make_bundle

Number = Annotated[str, Field(pattern=r"^[A-Z]-\d{4}$", description="Order number, for example A-1702.")]


@tool()
def get_order_status(order_number: Number) -> str:
    """Look up an order by its number: its status, items and delivery."""
    return f"Order {order_number} was shipped on Monday."


def toolbox() -> Toolbox:
    found = declared_tool(get_order_status)
    assert found is not None
    return Toolbox([found])


def bundle(**changes: object) -> Bundle:
    made = make_bundle(toolbox(), tools=["get_order_status"])
    return made.model_copy(update={"models": {"m": made.models["m"].model_copy(update=changes)}})


@pytest.mark.parametrize(
    "kind",
    [
        {"provider": "openai"},
        {"provider": "anthropic"},
        {"provider": "openai", "native_tools": False, "structured_output": False},
        {"provider": "anthropic", "native_tools": False, "structured_output": False},
    ],
    ids=["openai", "anthropic", "openai-react", "anthropic-react"],
)
async def test_every_kind_of_model_routes_calls_the_tool_and_answers(kind: dict[str, object]) -> None:
    """The same request, whatever the provider's format: routed, looked up, answered from the result, reviewed."""
    async with offline_server() as server:
        llm = HttpLlm({"openai": Provider(f"{server.url}/v1"), "anthropic": Provider(server.url)})
        world = World(llm, bundle=bundle(**kind))  # type: ignore[arg-type]
        world.toolbox = toolbox()
        world.submit("What is the status of my order A-1702?")
        await world.run_all()
        await llm.close()
    run = world.run()
    assert run["status"] == "succeeded", run["error"]
    assert run["result"] is not None
    assert run["result"]["tools"] == ["get_order_status"]
    assert "A-1702 was shipped on Monday" in run["result"]["answer"]
    assert run["usage"]["input_tokens"] > 0
