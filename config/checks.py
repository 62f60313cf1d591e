"""Do the entries of the catalog fit together? Each check yields a fault per wrong reference, with its line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from config.entries import Entry, Written
from config.faults import Fault, suggest
from schemas.catalog import (
    END,
    AgentNode,
    Bundle,
    CriticNode,
    NodeSpec,
    RouteNode,
    ToolNode,
    ToolSpec,
    WorkflowSpec,
)

ROUTED = "$route"  # an agent node's agent: whoever the last route chose
_READABLE = {"input", "draft", "route", "user", "conversation"}  # what a tool node's argument may be read {from: ...}

Tools = Mapping[str, ToolSpec]


def cross_check(written: Written, tools: Tools | None) -> Iterator[Fault]:
    """Every reference to a name that does not exist, and every workflow that cannot end. ``tools`` None: not loaded."""
    yield from _check_agents(written, tools)
    if tools is not None:
        for name, limits in written.limits.items():
            if name not in tools:
                yield Fault(limits.where(key=True), f"limits: there is no tool '{name}'", _tools(name, tools))
    for entry in written.workflows.values():
        if entry.spec is not None:
            yield from _check_nodes(entry, entry.spec, written, tools)
            yield from _check_graph(entry, entry.spec)


def reachable_bundle(workflow: WorkflowSpec, written: Written, tools: Tools) -> Bundle:
    """The workflow with the agents, models and tools it can reach. The catalog has no faults."""
    nodes = workflow.nodes.values()
    agents = {name for node in nodes if isinstance(node, RouteNode) for name in node.agents}
    agents |= {node.agent for node in nodes if isinstance(node, AgentNode)} - {ROUTED}
    specs = {name: spec for name in sorted(agents) if (spec := written.agents[name].spec)}
    models = {node.model for node in nodes if isinstance(node, RouteNode | CriticNode)}
    models |= {spec.model for spec in specs.values()}
    called = {node.tool for node in nodes if isinstance(node, ToolNode)}
    called |= {tool for spec in specs.values() for tool in spec.tools}
    return Bundle(
        workflow=workflow,
        agents=specs,
        models={name: model for name in sorted(models) if (model := written.models[name].spec)},
        tools={name: tools[name] for name in sorted(called)},
    )


def _tools(name: str, tools: Tools) -> str:
    return suggest(name, tools, what="tools") if tools else "List the module that declares it in tools.yaml."


def _check_agents(written: Written, tools: Tools | None) -> Iterator[Fault]:
    for name, entry in written.agents.items():
        if entry.spec is None:
            continue
        model = entry.spec.model
        if model not in written.models:
            reason = f"agent '{name}': there is no model '{model}'"
            yield Fault(entry.where("model"), reason, suggest(model, written.models, what="models"))
        for index, tool in enumerate(entry.spec.tools):
            if tools is not None and tool not in tools:
                yield Fault(
                    entry.where("tools", index), f"agent '{name}': there is no tool '{tool}'", _tools(tool, tools)
                )


def _check_nodes(
    entry: Entry[WorkflowSpec], workflow: WorkflowSpec, written: Written, tools: Tools | None
) -> Iterator[Fault]:
    for name, node in workflow.nodes.items():
        if isinstance(node, RouteNode | CriticNode) and node.model not in written.models:
            mend = suggest(node.model, written.models, what="models")
            yield Fault(entry.where("nodes", name, "model"), f"node '{name}': there is no model '{node.model}'", mend)
        for place, agent in _named_agents(node):
            if agent not in written.agents:
                mend = suggest(agent, written.agents, what="agents")
                yield Fault(entry.where("nodes", name, *place), f"node '{name}': there is no agent '{agent}'", mend)
        if isinstance(node, ToolNode) and tools is not None:
            yield from _check_tool_node(entry, name, node, tools)


def _named_agents(node: NodeSpec) -> Iterator[tuple[tuple[str | int, ...], str]]:
    if isinstance(node, RouteNode):
        for index, agent in enumerate(node.agents):
            yield ("agents", index), agent
    elif isinstance(node, AgentNode) and node.agent != ROUTED:
        yield ("agent",), node.agent


def _check_tool_node(entry: Entry[WorkflowSpec], name: str, node: ToolNode, tools: Tools) -> Iterator[Fault]:
    if node.tool not in tools:
        mend = _tools(node.tool, tools)
        yield Fault(entry.where("nodes", name, "tool"), f"node '{name}': there is no tool '{node.tool}'", mend)
        return
    schema = tools[node.tool].parameters
    parameters = schema.get("properties", {})
    for argument, value in node.args.items():
        where = entry.where("nodes", name, "args", argument, key=True)
        if argument not in parameters:
            mend = suggest(argument, parameters, what="parameters")
            yield Fault(where, f"node '{name}': tool '{node.tool}' has no parameter '{argument}'", mend)
        if isinstance(value, dict) and set(value) == {"from"} and value["from"] not in _READABLE:
            mend = suggest(str(value["from"]), _READABLE, what="sources")
            yield Fault(where, f"node '{name}': '{argument}' is read from unknown '{value['from']}'", mend)
    for missing in sorted(set(schema.get("required", ())) - node.args.keys()):
        where = entry.where("nodes", name, "args", key=True)
        yield Fault(where, f"node '{name}': tool '{node.tool}' needs '{missing}'", f"Add '{missing}' to args.")


def _check_graph(entry: Entry[WorkflowSpec], workflow: WorkflowSpec) -> Iterator[Fault]:
    nodes = workflow.nodes
    reached = _reached(workflow)
    for name in nodes:
        if name not in reached:
            mend = f"Lead to it from '{workflow.start}' on, or remove it."
            yield Fault(entry.where("nodes", name, key=True), f"node '{name}' is never reached", mend)
    for name in sorted(_reached(workflow, past_routes=False)):
        node = nodes[name]
        if isinstance(node, AgentNode) and node.agent == ROUTED:
            reason = f"node '{name}': agent {ROUTED} is reached without a route node before it"
            yield Fault(entry.where("nodes", name, "agent"), reason, "Put a route node before it, or name an agent.")
    yield from _endless(entry, workflow)


def _reached(workflow: WorkflowSpec, *, past_routes: bool = True) -> set[str]:
    """The nodes on paths from the start; ``past_routes`` False: on paths that pass no route node."""
    reached: set[str] = set()
    ahead = [workflow.start]
    while ahead:
        name = ahead.pop()
        if name == END or name in reached:
            continue
        reached.add(name)
        node = workflow.nodes[name]
        if past_routes or not isinstance(node, RouteNode):
            ahead += [node.next, *([node.revise] if isinstance(node, CriticNode) else [])]
    return reached


def _endless(entry: Entry[WorkflowSpec], workflow: WorkflowSpec) -> Iterator[Fault]:
    """Circles of ``next`` edges. A node has one way on, so such a circle has no exit; only ``revise`` is bounded."""
    ends: set[str] = {END}
    for start in workflow.nodes:
        path: list[str] = []
        name = start
        while name not in ends and name not in path:
            path.append(name)
            name = workflow.nodes[name].next
        if name not in ends:
            circle = [*path[path.index(name) :], name]
            yield Fault(
                entry.where("nodes", path[-1], "next"),
                f"the nodes {' -> '.join(circle)} go round for ever",
                f"Lead one of them to '{END}', or go back by a critic's 'revise', which max_revisions bounds.",
            )
        ends.update(path)
