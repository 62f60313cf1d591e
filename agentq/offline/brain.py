"""Answers a prompt without any model: one pure function."""

from __future__ import annotations

import json

from agentq.canonical import canonical_json, sha256
from agentq.offline import critic, route
from agentq.offline.compose import compose
from agentq.offline.plan import Want, make_plan
from agentq.offline.prompt import Prompt, Reply, Turn, read_turn

STAND_IN = (
    "I am agentq's offline stand-in, not a language model: I route, call tools, extract and check, and without tools I "
    "cannot answer. Set OPENAI_API_KEY or OPENAI_BASE_URL to use a real model."
)


def answer(prompt: Prompt) -> Reply:
    """The answer to a prompt; the same prompt has the same answer."""
    match prompt.purpose:
        case "route":
            return route.answer(prompt)
        case "critique":
            return critic.answer(prompt)
        case "turn":
            return take_turn(read_turn(prompt))
        case _:
            return Reply(STAND_IN)


def take_turn(turn: Turn) -> Reply:
    """An agent's turn: the tools that are needed now, in parallel where the form allows it, else the answer."""
    plan = make_plan(turn)
    if plan.ready:
        return _react_call(plan.ready[0]) if turn.react else _native_calls(turn, plan.ready)
    text = compose(turn, plan)
    return Reply(f"Thought: I have what the request needs.\nFinal Answer: {text}" if turn.react else text)


def _native_calls(turn: Turn, wants: tuple[Want, ...]) -> Reply:
    first = len(turn.calls)
    return Reply(
        tool_calls=tuple(
            {"id": f"call_{sha256(f'{first + place}{want.key}')[:20]}", "name": want.tool, "arguments": want.arguments}
            for place, want in enumerate(wants)
        )
    )


def _react_call(want: Want) -> Reply:
    return Reply(
        f"Thought: The request calls for {want.tool}.\nAction: {want.tool}\nAction Input: {json.dumps(want.arguments)}"
    )


def estimate_tokens(text: str) -> int:
    """Tokens of a text, estimated from its length: four characters a token."""
    return (len(text) + 3) // 4


def prompt_tokens(prompt: Prompt) -> int:
    """Tokens of a prompt: its texts, its tool calls and schemas, and four for each message's frame."""
    total = estimate_tokens(prompt.system) + 4
    for message in prompt.messages:
        calls = canonical_json(message["tool_calls"]) if message.get("tool_calls") else ""
        total += estimate_tokens(message["content"] + calls) + 4
    if prompt.tools:
        total += estimate_tokens(json.dumps(prompt.tools))
    return total + (estimate_tokens(json.dumps(prompt.schema)) if prompt.schema else 0)


def reply_tokens(reply: Reply) -> int:
    """Tokens of a reply, at least one."""
    calls = "".join(call["name"] + json.dumps(call["arguments"]) for call in reply.tool_calls)
    return max(1, estimate_tokens(reply.text + calls))
