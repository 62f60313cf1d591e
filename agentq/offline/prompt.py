"""A prompt as the brain reads it, whatever wire format it came in; and what the brain says back."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from agentq.engine import parse
from schemas.chat import Message, ToolCall, ToolSchema

Purpose = Literal["route", "turn", "critique", "other", "embed"]

_REACT_TOOL = re.compile(r"^- ([\w.-]+): (.*) Arguments \(JSON Schema\): (\{.*\})$", re.MULTILINE)
_OBSERVATION = re.compile(r"^\s*Observation:\s*")
_REVIEW = re.compile(r"\bproblems? (?:with|in) (?:your|the) (?:draft|answer)", re.IGNORECASE)
_NUDGE = re.compile(r"^Your answer was empty", re.IGNORECASE)
_LISTED = re.compile(r"^[ \t]{0,8}[-*][ \t]+(.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One call. ``messages`` are those without the system prompt; ``schema`` is the shape asked of the answer."""

    model: str
    system: str
    messages: tuple[Message, ...]
    tools: tuple[ToolSchema, ...] = ()
    schema: dict[str, Any] | None = None

    @property
    def purpose(self) -> Purpose:
        """What is asked for, by the answer's shape first and the system prompt's words second."""
        properties = (self.schema or {}).get("properties", {})
        if "verdict" in properties or (not self.schema and '"verdict":' in self.system):
            return "critique"
        if choice_property(self.schema) or (not self.schema and re.search(r'ROUTE_TO:|"route":', self.system)):
            return "route"
        return "turn" if self.tools or _REACT_TOOL.search(self.system) else "other"

    @property
    def last_user_text(self) -> str:
        return next((message["content"] for message in reversed(self.messages) if message["role"] == "user"), "")


@dataclass(frozen=True, slots=True)
class Reply:
    """The brain's answer: text, or tool calls, or both."""

    text: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Called:
    """A tool call of the transcript with its result, None while it has none."""

    name: str
    arguments: dict[str, Any]
    result: str | None


@dataclass(frozen=True, slots=True)
class Turn:
    """An agent's turn, read from a prompt: the request, what came before it and what happened since."""

    system: str
    tools: tuple[ToolSchema, ...]
    request: str
    history: tuple[Message, ...] = ()
    calls: tuple[Called, ...] = ()
    draft: str | None = None
    problems: tuple[str, ...] = ()
    react: bool = field(default=False)


def choice_property(schema: dict[str, Any] | None) -> str | None:
    """The name of the first property that is a choice of strings, if the schema has one."""
    for name, value in (schema or {}).get("properties", {}).items():
        if isinstance(value, dict) and isinstance(value.get("enum"), list):
            return str(name)
    return None


def read_turn(prompt: Prompt) -> Turn:
    """Find the request (the last user message that is no observation, review or reminder) and what followed it."""
    messages = prompt.messages
    start = next((i for i in range(len(messages) - 1, -1, -1) if _is_request(messages[i])), 0)
    after = messages[start + 1 :]
    reviews = [m["content"] for m in after if m["role"] == "user" and _REVIEW.search(m["content"])]
    return Turn(
        system=prompt.system,
        tools=prompt.tools or _described_tools(prompt.system),
        request=messages[start]["content"] if messages else "",
        history=messages[:start],
        calls=tuple(_calls(after)),
        draft=_last_draft(after) if reviews else None,
        problems=tuple(_LISTED.findall(reviews[-1])) if reviews else (),
        react=not prompt.tools,
    )


def _is_request(message: Message) -> bool:
    text = message["content"]
    return message["role"] == "user" and not any(p.search(text) for p in (_OBSERVATION, _REVIEW, _NUDGE))


def _last_draft(messages: tuple[Message, ...]) -> str | None:
    for message in reversed(messages):
        if message["role"] == "assistant" and not message.get("tool_calls"):
            read = parse.react(message["content"])
            if isinstance(read, str):
                return read
    return None


def _calls(messages: tuple[Message, ...]) -> list[Called]:
    """Native calls are matched to their results by id, ReAct actions to the observation that follows."""
    results = {m.get("tool_call_id", ""): m["content"] for m in messages if m["role"] == "tool"}
    found: list[Called] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if native := message.get("tool_calls", []):
            found += [Called(c["name"], _object(c["arguments"]), results.get(c["id"])) for c in native]
            continue
        action = parse.react(message["content"])
        if isinstance(action, parse.Action):
            following = messages[index + 1]["content"] if index + 1 < len(messages) else ""
            seen = _OBSERVATION.match(following)
            found.append(Called(action.tool, _object(action.arguments), following[seen.end() :] if seen else None))
    return found


def _object(arguments: dict[str, Any] | str) -> dict[str, Any]:
    return arguments if isinstance(arguments, dict) else {"": arguments}


def _described_tools(system: str) -> tuple[ToolSchema, ...]:
    """The tools of a prompt that describes them in text."""
    found: list[ToolSchema] = []
    for name, description, parameters in _REACT_TOOL.findall(system):
        try:
            found.append({"name": name, "description": description, "parameters": json.loads(parameters)})
        except ValueError:
            continue  # a line that only looks like a tool
    return tuple(found)
