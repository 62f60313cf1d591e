"""Anthropic's messages on the wire (``POST {base_url}/v1/messages``, base_url without ``/v1``). Pure.

Structured output is asked for with ``output_config.format``. The older way, a forced tool call, is refused by the
models that always think (from Claude Opus 5.5 and Fable 5.1 on: 400); an answer given that way is still understood.
"""

from __future__ import annotations

import json
from typing import Any

from agentq.llm import errors, wire
from agentq.llm.types import LlmCall, LlmReply
from schemas.chat import Message, ToolCall

PATH = "/v1/messages"
VERSION = "2023-06-01"
_FINISH = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "tool_use": "tool_calls",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "content_filter",
}


def auth(api_key: str) -> dict[str, str]:
    return {"x-api-key": api_key}


def encode(call: LlmCall) -> tuple[str, dict[str, str], dict[str, Any]]:
    """Path, headers (without the key) and body of a call."""
    body: dict[str, Any] = {
        "model": call.model.model,
        "messages": _messages(call.messages),
        "max_tokens": call.max_output_tokens or call.model.max_output_tokens,
    }
    system = "\n\n".join(m["content"] for m in call.messages if m["role"] == "system" and m["content"].strip())
    if system:
        body["system"] = system
    if call.model.temperature is not None:
        body["temperature"] = call.model.temperature
    if call.tools and call.model.native_tools:
        body["tools"] = [
            {"name": tool["name"], "description": tool["description"], "input_schema": tool["parameters"]}
            for tool in call.tools
        ]
    if call.schema is not None and call.model.structured_output and _is_closed(call.schema):
        body["output_config"] = {"format": {"type": "json_schema", "schema": call.schema}}
    return PATH, {"anthropic-version": VERSION}, body


def _is_closed(schema: dict[str, Any]) -> bool:
    """Whether Anthropic takes the schema: it refuses objects that allow more properties than they name. Such a
    schema is not sent; the prompt asks for the shape all the same."""
    return all(part.get("additionalProperties") is False for part in wire.object_schemas(schema))


def _messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Turns that alternate: neighbours of one role become one turn, so all results of a turn's tools stand together."""
    turns: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "system":
            continue
        role = "assistant" if message["role"] == "assistant" else "user"
        blocks = _blocks(message)
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        elif blocks:
            turns.append({"role": role, "content": blocks})
    return turns


def _blocks(message: Message) -> list[dict[str, Any]]:
    if message["role"] == "tool":
        result = {"type": "tool_result", "tool_use_id": message.get("tool_call_id", ""), "content": message["content"]}
        return [result]
    # A blank text block is refused.
    blocks: list[dict[str, Any]] = [{"type": "text", "text": message["content"]}] if message["content"].strip() else []
    for wish in message.get("tool_calls", ()):
        blocks.append(
            {
                "type": "tool_use",
                "id": wish["id"],
                "name": wish["name"],
                "input": wire.arguments_object(wish["arguments"]),
            }
        )
    return blocks


def decode(call: LlmCall, body: bytes, *, latency_ms: int = 0) -> LlmReply:
    """The answer in the body of a successful response. Raises ``ProviderError`` (``bad_response``), nothing else."""
    answer = wire.loads(body)
    content = answer.get("content")
    if not isinstance(content, list):
        raise errors.bad_response("it is an error object" if "error" in answer else "it has no content")
    provider_id = wire.text_of(answer.get("id"))
    text, tool_calls = _read(content, provider_id or "call")
    finish = _FINISH.get(wire.text_of(answer.get("stop_reason")), "stop")
    if call.schema is not None:
        text, tool_calls = _unwrap(call.schema_name, text, tool_calls)
    if tool_calls and finish == "stop":
        finish = "tool_calls"
    elif not tool_calls and finish == "tool_calls":
        finish = "stop"
    return wire.reply(
        call,
        text=text,
        tool_calls=tool_calls,
        finish=finish,
        tokens=_tokens(answer.get("usage")),
        model=answer.get("model"),
        provider_id=provider_id,
        latency_ms=latency_ms,
    )


def _read(content: list[Any], prefix: str) -> tuple[str, list[ToolCall]]:
    """Text and tool calls; blocks of other types (thinking) are not for us."""
    texts: list[str] = []
    tool_calls: list[ToolCall] = []
    for index, block in enumerate(content):
        if not isinstance(block, dict):
            raise errors.bad_response("a content block is no object")
        if block.get("type") == "text":
            texts.append(wire.text_of(block.get("text")))
        elif block.get("type") == "tool_use":
            tool_calls.append(
                wire.tool_call(block.get("id"), block.get("name"), block.get("input"), f"{prefix}-{index}")
            )
    return "".join(texts), tool_calls


def _unwrap(schema_name: str, text: str, tool_calls: list[ToolCall]) -> tuple[str, list[ToolCall]]:
    """The input of a tool call named like the schema is the answer itself, as JSON text."""
    for wish in tool_calls:
        if wish["name"] == schema_name:
            arguments = wish["arguments"]
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return text, [wish for wish in tool_calls if wish["name"] != schema_name]


def _tokens(usage: Any) -> tuple[Any, Any]:
    """Input and output counts. Anthropic counts cached input apart; all of it was read, so all of it counts."""
    if not isinstance(usage, dict):
        return None, None
    given = usage.get("input_tokens")
    for name in ("cache_creation_input_tokens", "cache_read_input_tokens"):
        if isinstance(given, int) and isinstance(usage.get(name), int):
            given += usage[name]
    return given, usage.get("output_tokens")
