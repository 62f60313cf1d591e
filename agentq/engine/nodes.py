"""The node types: what entering one opens, and what an outcome of its steps means. One pair of functions a type.

A handler gives a ``Progress``: the new state and either a node to go to (``go``), steps to open (``opened``), a
reason to stop (``stop``), or none of these (it waits for parallel steps).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, assert_never

from agentq.canonical import sha256
from agentq.engine import budget, parse, prompts
from agentq.engine.decision import Observed, Opening, Replied, event, state_of, tries
from agentq.event import NewEvent
from schemas.catalog import AgentNode, AgentSpec, Bundle, CriticNode, RouteNode, ToolNode
from schemas.chat import Message, ToolCall
from schemas.run import AgentVisit, RunDoc, State, Step

MAX_KEYED_ATTEMPTS = 3  # a time-out of a tool that honours our key is tried again this often before the model hears

UNKNOWN_OUTCOME = " It is not known whether it took effect. Do not call it again; say that a person will check."
NOT_CALLED = frozenset({"unknown_tool", "not_permitted", "bad_arguments"})  # a tool's result codes where nothing ran


@dataclass(frozen=True, slots=True)
class Progress:
    state: State
    events: list[NewEvent] = field(default_factory=list)
    go: str | None = None
    opened: dict[str, Opening] = field(default_factory=dict)
    stop: str | None = None


def number(state: State, openings: list[Opening]) -> tuple[State, dict[str, Opening]]:
    """Give the openings the run's next step ids."""
    first = state["next_step"]
    opened = {f"s{first + index}": opening for index, opening in enumerate(openings)}
    return {**state, "next_step": first + len(openings)}, opened


def enter(bundle: Bundle, run: RunDoc, state: State, name: str, at_ms: int) -> tuple[State, Opening]:
    """Go to a node: its first step, and the memory it starts with."""
    node = bundle.workflow.nodes[name]
    state = {**state, "node": name, "unusable": None}
    match node:
        case RouteNode():
            return state, Opening("route", "router", name, "retry")
        case AgentNode():
            agent = (state["route"] or "") if node.agent == "$route" else node.agent
            if name not in state["visits"]:
                visit = _new_visit(agent, state, at_ms)
                state = {**state, "visits": {**state["visits"], name: visit}}
            return state, Opening("turn", "specialist", name, "retry")
        case CriticNode():
            return state, Opening("critique", "critic", name, "retry")
        case ToolNode():
            payload = {"name": node.tool, "arguments": _resolve(node.args, run, state)}
            return state, Opening("tool", "tools", name, bundle.tools[node.tool].recovery, payload)
        case _:
            assert_never(node)


def _resolve(args: dict[str, Any], run: RunDoc, state: State) -> dict[str, Any]:
    """A tool node's arguments: ``{from: input|draft|route|user|conversation}`` is read from the run."""
    sources: dict[str, Any] = {
        "input": run["input"], "draft": state["draft"], "route": state["route"],
        "user": run["user"], "conversation": run["conversation"],
    }  # fmt: skip
    return {
        key: sources.get(value["from"]) if isinstance(value, dict) and set(value) == {"from"} else value
        for key, value in args.items()
    }


def _new_visit(agent: str, state: State, at_ms: int) -> AgentVisit:
    transcript: list[Message] = []
    for lookup in state["lookups"]:  # what tool nodes found before reads like a call of the agent's own
        call: ToolCall = {"id": lookup["id"], "name": lookup["name"], "arguments": lookup["arguments"]}
        transcript.append({"role": "assistant", "content": "", "tool_calls": [call]})
        transcript.append({"role": "tool", "content": lookup["content"], "tool_call_id": lookup["id"]})
    return {
        "agent": agent, "transcript": transcript, "calls": {}, "results": {}, "turns": 0, "tool_calls": 0,
        "tokens": 0, "cost_nano_usd": 0, "since_ms": at_ms,
    }  # fmt: skip


def on_route(bundle: Bundle, run: RunDoc, step_id: str, step: Step, outcome: Replied) -> Progress:
    """A choice goes on; an unusable answer is asked again once, then the default specialist takes it."""
    state, node = state_of(run), bundle.workflow.nodes[step["node"]]
    assert isinstance(node, RouteNode)
    chosen = parse.route(outcome.reply.text, node.agents)
    if chosen is not None:
        made = _called(outcome, step_id, "route.chosen", agent=chosen.choice, reason=chosen.reason, by="model")
        return Progress({**state, "route": chosen.choice, "unusable": None}, [made], go=node.next)
    if state["unusable"] is None:
        asked = _called(outcome, step_id, "route.unusable", answer_sha256=sha256(outcome.reply.text))
        again, opened = number(
            {**state, "unusable": outcome.reply.text}, [Opening("route", "router", step["node"], "retry")]
        )
        return Progress(again, [asked], opened=opened)
    fell_back = _called(
        outcome, step_id, "route.chosen", agent=node.default, reason="no usable answer from the model", by="default"
    )
    return Progress({**state, "route": node.default, "unusable": None}, [fell_back], go=node.next)


def on_turn(bundle: Bundle, run: RunDoc, step_id: str, step: Step, outcome: Replied) -> Progress:
    """A turn ends with tool calls, with a draft, or with nothing usable (asked again while turns last)."""
    state, name = state_of(run), step["node"]
    node, visit, reply = bundle.workflow.nodes[name], state["visits"][name], outcome.reply
    assert isinstance(node, AgentNode)
    agent = bundle.agents[visit["agent"]]
    calls, text = _read_turn(bundle, agent, reply.text, reply.tool_calls, step_id)
    spent = reply.usage["input_tokens"] + reply.usage["output_tokens"]
    said: Message = {"role": "assistant", "content": reply.text}
    if calls:
        said["tool_calls"] = calls
    visit = {
        **visit,
        "transcript": [*visit["transcript"], said],
        "turns": visit["turns"] + 1,
        "tokens": visit["tokens"] + spent,
        "cost_nano_usd": visit["cost_nano_usd"] + reply.cost_nano_usd,
    }
    made = _called(
        outcome, step_id, "agent.turn", agent=visit["agent"], tool_calls=[call["name"] for call in calls],
        draft=bool(text and not calls),
    )  # fmt: skip
    if not calls and text:
        state = {**_with_visit(state, name, visit), "draft": text, "agent": visit["agent"]}
        return Progress({**state, "acceptance": "unreviewed"}, [made], go=node.next)
    if text:  # thinking aloud beside a tool call is the best draft until there is a better one
        state = {**state, "draft": state["draft"] or text, "agent": visit["agent"]}
    if stop := budget.visit_exhausted(agent.limits, visit, outcome.at_ms):
        return Progress(_with_visit(state, name, visit), [made], stop=stop)
    if calls:
        return _open_calls(bundle, agent, _with_visit(state, name, visit), name, calls, made)
    nudge: Message = {"role": "user", "content": "Your answer was empty. Write the answer for the customer."}
    visit = {**visit, "transcript": [*visit["transcript"], nudge]}
    state, opened = number(_with_visit(state, name, visit), [Opening("turn", "specialist", name, "retry")])
    return Progress(state, [made], opened=opened)


def _read_turn(
    bundle: Bundle, agent: AgentSpec, text: str, native: list[ToolCall], step_id: str
) -> tuple[list[ToolCall], str]:
    """The turn's tool calls, with ids that are unique in the run, and its text meant for the reader."""
    if bundle.models[agent.model].native_tools or not agent.tools:
        return [{**call, "id": f"{step_id}.{index}"} for index, call in enumerate(native)], text.strip()
    read = parse.react(text)
    if isinstance(read, str):
        return [], read
    return [{"id": f"{step_id}.0", "name": read.tool, "arguments": read.arguments}], ""


def _open_calls(
    bundle: Bundle, agent: AgentSpec, state: State, name: str, calls: list[ToolCall], made: NewEvent
) -> Progress:
    """One step a call. Calls past the agent's limit, and calls that may have taken effect already (a new step has
    a new key), are answered at once with a refusal the model can read."""
    visit = state["visits"][name]
    room = agent.limits.max_tool_calls - visit["tool_calls"]
    wanted: list[ToolCall] = []
    refused: dict[str, str] = {}
    for call in calls:
        if len(wanted) >= room:
            refused[call["id"]] = "Refused: no tool calls are left. Answer with what you know."
        elif _may_have_happened(visit, call):
            refused[call["id"]] = "Refused: the same call was made before." + UNKNOWN_OUTCOME
        else:
            wanted.append(call)
    openings = [
        Opening("tool", "tools", name, bundle.tools[call["name"]].recovery if call["name"] in bundle.tools else "retry",
                {"name": call["name"], "arguments": call["arguments"], "call": call["id"]})
        for call in wanted
    ]  # fmt: skip
    state, opened = number(state, openings)
    visit = {
        **visit,
        "calls": {step_id: opening.payload["call"] for step_id, opening in opened.items()},
        "results": refused,
        "tool_calls": visit["tool_calls"] + len(openings),
    }
    state = _with_visit(state, name, visit)
    if opened:
        return Progress(state, [made], opened=opened)
    state, opened = _next_turn(state, name)
    return Progress(state, [made], opened=opened)


def _may_have_happened(visit: AgentVisit, call: ToolCall) -> bool:
    """Was the same call made before in this visit, and its outcome unknown?"""
    asked = {made["id"]: made for message in visit["transcript"] for made in message.get("tool_calls", [])}
    return any(
        message["role"] == "tool"
        and message["content"].endswith(UNKNOWN_OUTCOME)
        and (made := asked[message["tool_call_id"]])["name"] == call["name"]
        and made["arguments"] == call["arguments"]
        for message in visit["transcript"]
    )


def on_tool(bundle: Bundle, run: RunDoc, step_id: str, step: Step, outcome: Observed) -> Progress:
    """A tool's result: kept until all parallel calls are in, then the agent's next turn; or a tool node is done."""
    state, name, payload = state_of(run), step["node"], step["payload"]
    if outcome.unknown and step["recovery"] == "keyed" and tries(step) < MAX_KEYED_ATTEMPTS:
        again = Opening(
            "tool", "tools", name, "keyed", payload, attempt=step["attempt"] + 1, delay_s=float(tries(step)),
            forgiven=step.get("forgiven", 0),
        )  # fmt: skip
        tried = event("tool.retried", outcome.at_ms, step_id, tool=payload["name"], code=outcome.code)
        return Progress(state, [tried], opened={step_id: again})
    tool = bundle.tools.get(payload["name"])
    made = event(
        "tool.called", outcome.at_ms, step_id, tool=payload["name"], arguments=_auditable(payload["arguments"]),
        ok=outcome.ok, code=outcome.code, effect=tool.effect if tool else None,
        result_sha256=sha256(outcome.content), latency_ms=outcome.latency_ms,
    )  # fmt: skip
    content = outcome.content
    if outcome.unknown:
        content += UNKNOWN_OUTCOME
    if outcome.code not in NOT_CALLED:
        state = {**state, "tools": [*state["tools"], payload["name"]]}
    node = bundle.workflow.nodes[name]
    if isinstance(node, ToolNode):
        lookup = {"id": step_id, "name": payload["name"], "arguments": payload["arguments"], "content": content}
        state = {**state, "lookups": [*state["lookups"], lookup]}
        return Progress(state, [made], go=node.next)
    visit = state["visits"][name]
    visit = {
        **visit,
        "calls": {key: call for key, call in visit["calls"].items() if key != step_id},
        "results": {**visit["results"], payload["call"]: content},
    }
    state = _with_visit(state, name, visit)
    if visit["calls"]:
        return Progress(state, [made])
    state, opened = _next_turn(state, name)
    return Progress(state, [made], opened=opened)


def _next_turn(state: State, name: str) -> tuple[State, dict[str, Opening]]:
    """All calls are answered: the observations enter the transcript in the order the model asked for them."""
    visit = state["visits"][name]
    asked = next(message for message in reversed(visit["transcript"]) if message["role"] == "assistant")
    observed: list[Message] = [
        {"role": "tool", "content": visit["results"][call["id"]], "tool_call_id": call["id"], "name": call["name"]}
        for call in asked["tool_calls"]
    ]
    visit = {**visit, "transcript": [*visit["transcript"], *observed], "results": {}}
    return number(_with_visit(state, name, visit), [Opening("turn", "specialist", name, "retry")])


def on_critique(bundle: Bundle, run: RunDoc, step_id: str, step: Step, outcome: Replied) -> Progress:
    """Accept ends the node; problems go back to the agent while revisions last; an unusable verdict is asked once."""
    state, node = state_of(run), bundle.workflow.nodes[step["node"]]
    assert isinstance(node, CriticNode)
    verdict = parse.verdict(outcome.reply.text)
    if verdict is None:
        made = _called(outcome, step_id, "critic.unusable", answer_sha256=sha256(outcome.reply.text))
        if state["unusable"] is not None:
            return Progress({**state, "unusable": None}, [made], go=node.next)
        state, opened = number(
            {**state, "unusable": outcome.reply.text}, [Opening("critique", "critic", step["node"], "retry")]
        )
        return Progress(state, [made], opened=opened)
    made = _called(
        outcome, step_id, "critic.verdict", verdict="accept" if verdict.accept else "revise", problems=verdict.problems
    )
    state = {**state, "problems": verdict.problems, "unusable": None}
    if verdict.accept:
        return Progress({**state, "acceptance": "critic"}, [made], go=node.next)
    if state["revisions"] >= node.max_revisions:
        return Progress({**state, "acceptance": "revisions_exhausted"}, [made], go=node.next)
    visit = state["visits"][node.revise]
    visit = {**visit, "transcript": [*visit["transcript"], prompts.revision_message(verdict.problems)]}
    state = {**_with_visit(state, node.revise, visit), "revisions": state["revisions"] + 1}
    return Progress(state, [made], go=node.revise)


def _with_visit(state: State, name: str, visit: AgentVisit) -> State:
    return {**state, "visits": {**state["visits"], name: visit}}


def _auditable(arguments: dict[str, Any] | str) -> dict[str, Any]:
    return arguments if isinstance(arguments, dict) else {"_unparsed_sha256": sha256(arguments)}


def _called(outcome: Replied, step_id: str, kind: str, **data: Any) -> NewEvent:
    """An event of a model call: what was decided, and what the call took."""
    reply = outcome.reply
    return event(
        kind, outcome.at_ms, step_id, **data, model=reply.model, input_tokens=reply.usage["input_tokens"],
        output_tokens=reply.usage["output_tokens"], cost_nano_usd=reply.cost_nano_usd, latency_ms=reply.latency_ms,
    )  # fmt: skip


ON_REPLY: dict[str, Callable[[Bundle, RunDoc, str, Step, Replied], Progress]] = {
    "route": on_route,
    "turn": on_turn,
    "critique": on_critique,
}
