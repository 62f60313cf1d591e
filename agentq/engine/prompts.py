"""What the models are told, built from the state of a run. Pure: the same state gives the same prompt."""

from __future__ import annotations

import json
from typing import Any

from schemas.catalog import AgentSpec, Bundle, CriticNode, ModelSpec, RouteNode
from schemas.chat import Message, ToolSchema

ROUTE_SCHEMA_NAME = "route"
VERDICT_SCHEMA_NAME = "verdict"


def route_schema(choices: list[str]) -> dict[str, Any]:
    """The shape of a router's answer."""
    return _object({"route": {"type": "string", "enum": choices}, "reason": {"type": "string"}})


VERDICT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "verdict": {"type": "string", "enum": ["accept", "revise"]},
        "problems": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["verdict", "problems"],
    "additionalProperties": False,
}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def route_messages(
    bundle: Bundle, node: RouteNode, request: str, history: list[Message], unusable: str | None = None
) -> list[Message]:
    """The router's prompt; ``unusable`` is its first answer where that named no specialist (the one re-ask)."""
    choices = "\n".join(f"- {name}: {bundle.agents[name].description}" for name in node.agents)
    if bundle.models[node.model].structured_output:
        form = 'Answer with JSON: {"route": "<name of the specialist>", "reason": "<one sentence>"}.'
    else:
        form = "Answer in exactly two lines:\nROUTE_TO: <name of the specialist>\nREASON: <one sentence>"
    system = (
        "You route each request to the one specialist who can serve it best.\n\n"
        f"Specialists:\n{choices}\n\n" + (f"{node.instructions.strip()}\n\n" if node.instructions else "") + form
    )
    messages: list[Message] = [{"role": "system", "content": system}, *history, {"role": "user", "content": request}]
    if unusable is not None:
        messages += [
            {"role": "assistant", "content": unusable},
            {"role": "user", "content": f"That names no specialist. Choose one of: {', '.join(node.agents)}. {form}"},
        ]
    return messages


def agent_messages(
    agent: AgentSpec, model: ModelSpec, tools: list[ToolSchema], request: str, history: list[Message],
    transcript: list[Message],
) -> list[Message]:  # fmt: skip
    """A specialist's prompt: instructions, earlier turns of the conversation, the request, what happened so far."""
    system = agent.instructions.strip()
    if tools and not model.native_tools:
        system += "\n\n" + _react_instructions(tools)
        transcript = [_as_text(message) for message in transcript]
    return [{"role": "system", "content": system}, *history, {"role": "user", "content": request}, *transcript]


def _react_instructions(tools: list[ToolSchema]) -> str:
    described = "\n".join(
        f"- {tool['name']}: {tool['description']} Arguments (JSON Schema): "
        f"{json.dumps(tool['parameters'], separators=(',', ':'))}"
        for tool in tools
    )
    return (
        f"You can use these tools:\n{described}\n\n"
        "To use a tool, answer with:\nThought: <why>\nAction: <tool name>\nAction Input: <JSON object of arguments>\n"
        "and stop; the result comes back as an Observation. When you know the answer, write:\n"
        "Thought: <why you are done>\nFinal Answer: <the answer for the customer>"
    )


def _as_text(message: Message) -> Message:
    """A transcript message for a model without native tools: results become observations."""
    if message["role"] == "tool":
        return {"role": "user", "content": f"Observation: {message['content']}"}
    return {"role": message["role"], "content": message["content"]}


def revision_message(problems: list[str]) -> Message:
    """What the agent hears when the critic sends its draft back."""
    listed = "\n".join(f"- {problem}" for problem in problems)
    return {
        "role": "user",
        "content": f"A reviewer found problems with your draft:\n{listed}\n"
        "Write the corrected answer for the customer.",
    }


def critic_messages(
    node: CriticNode, request: str, transcript: list[Message], draft: str, unusable: str | None = None
) -> list[Message]:
    """The critic's prompt: the request, what the tools said, the draft; ``unusable``: its first answer, asked again."""
    form = 'Answer with JSON: {"verdict": "accept" or "revise", "problems": ["..."]}.'
    system = (
        "You review a draft answer before it is sent. Accept it if it answers every part of the request, states "
        "nothing that the tool results do not support, and hides no failure. Otherwise name each problem in one "
        "sentence that says what to change.\n\n"
        + (f"{node.instructions.strip()}\n\n" if node.instructions else "")
        + form
    )
    seen = "\n".join(_tool_lines(transcript)) or "(no tool was called)"
    user = f"## Request\n{request}\n\n## Tool results\n{seen}\n\n## Draft answer\n{draft}"
    messages: list[Message] = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    if unusable is not None:
        said = f"That is no verdict, or it asks for a revision and names no problem. {form}"
        messages += [{"role": "assistant", "content": unusable}, {"role": "user", "content": said}]
    return messages


def _tool_lines(transcript: list[Message]) -> list[str]:
    calls: dict[str, str] = {}
    lines: list[str] = []
    for message in transcript:
        for call in message.get("tool_calls", []):
            calls[call["id"]] = f"{call['name']}({json.dumps(call['arguments'], sort_keys=True)})"
        if message["role"] == "tool":
            lines.append(f"- {calls.get(message.get('tool_call_id', ''), 'tool')} -> {message['content']}")
    return lines
