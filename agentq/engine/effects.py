"""The one effect of a step: which model is asked what, or which tool is called. Pure; the runtime performs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agentq.engine import prompts
from agentq.engine.decision import state_of
from schemas.catalog import AgentNode, AgentSpec, Bundle, CriticNode, RouteNode, ToolNode, ToolSpec
from schemas.chat import ToolSchema
from schemas.llm import LlmCall
from schemas.run import RunDoc


@dataclass(frozen=True, slots=True)
class ToolCallEffect:
    """Call a tool. ``spec`` is None if the run's bundle has no such tool; ``allowed``: what the caller may call."""

    name: str
    arguments: dict[str, Any] | str
    spec: ToolSpec | None
    allowed: tuple[str, ...]
    agent: str | None


def effect(bundle: Bundle, run: RunDoc, step_id: str) -> LlmCall | ToolCallEffect:
    """What to do for an open step of an entered run. The key is stable over the attempts of the step."""
    step = run["steps"][step_id]
    node = bundle.workflow.nodes[step["node"]]
    key = f"{run['_id']}:{step_id}"
    if step["kind"] == "tool":
        return _tool_call(bundle, run, step_id)
    match node:
        case RouteNode():
            return _route_call(bundle, run, node, key)
        case AgentNode():
            return _turn_call(bundle, run, step["node"], key)
        case CriticNode():
            return _critic_call(bundle, run, node, key)
        case ToolNode():
            raise AssertionError("a tool node opens tool steps only")


def _route_call(bundle: Bundle, run: RunDoc, node: RouteNode, key: str) -> LlmCall:
    state, model = state_of(run), bundle.models[node.model]
    messages = prompts.route_messages(bundle, node, run["input"], state["history"], state["unusable"])
    schema = prompts.route_schema(node.agents) if model.structured_output else None
    return LlmCall(
        model, messages, schema=schema, schema_name=prompts.ROUTE_SCHEMA_NAME, max_output_tokens=200, key=key,
        purpose="route",
    )  # fmt: skip


def _turn_call(bundle: Bundle, run: RunDoc, node: str, key: str) -> LlmCall:
    state = state_of(run)
    visit = state["visits"][node]
    agent = bundle.agents[visit["agent"]]
    model = bundle.models[agent.model]
    tools = tool_schemas(bundle, agent)
    messages = prompts.agent_messages(agent, model, tools, run["input"], state["history"], visit["transcript"])
    return LlmCall(model, messages, tools=tools if model.native_tools else [], key=key, purpose="turn")


def tool_schemas(bundle: Bundle, agent: AgentSpec) -> list[ToolSchema]:
    """The agent's tools as its model sees them."""
    return [
        {"name": name, "description": bundle.tools[name].description, "parameters": bundle.tools[name].parameters}
        for name in agent.tools
    ]


def _critic_call(bundle: Bundle, run: RunDoc, node: CriticNode, key: str) -> LlmCall:
    state, model = state_of(run), bundle.models[node.model]
    messages = prompts.critic_messages(
        node, run["input"], state["visits"][node.revise]["transcript"], state["draft"] or "", state["unusable"]
    )
    schema = prompts.VERDICT_SCHEMA if model.structured_output else None
    return LlmCall(
        model, messages, schema=schema, schema_name=prompts.VERDICT_SCHEMA_NAME, max_output_tokens=500, key=key,
        purpose="critique",
    )  # fmt: skip


def _tool_call(bundle: Bundle, run: RunDoc, step_id: str) -> ToolCallEffect:
    step = run["steps"][step_id]
    name, arguments = step["payload"]["name"], step["payload"]["arguments"]
    node = bundle.workflow.nodes[step["node"]]
    if isinstance(node, ToolNode):
        return ToolCallEffect(name, arguments, bundle.tools.get(name), (node.tool,), None)
    agent = state_of(run)["visits"][step["node"]]["agent"]
    return ToolCallEffect(name, arguments, bundle.tools.get(name), tuple(bundle.agents[agent].tools), agent)
