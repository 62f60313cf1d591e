"""OpenAI's chat completions on the wire (``POST {base_url}/chat/completions``, base_url ends in ``/v1``). Pure.

Also spoken by vLLM, Ollama, llama.cpp, OpenRouter and many more; where they differ from OpenAI, ``decode`` is lenient.
"""

from __future__ import annotations

import json
from typing import Any

from agentq.llm import errors, wire
from agentq.llm.types import LlmCall, LlmReply
from schemas.chat import Message, ToolCall

PATH = "/chat/completions"
_FINISH = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
}


def auth(api_key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"}


def encode(call: LlmCall) -> tuple[str, dict[str, str], dict[str, Any]]:
    """Path, headers (without the key) and body of a call."""
    body: dict[str, Any] = {
        "model": call.model.model,
        "messages": [_message(message) for message in call.messages],
        # Not max_tokens: that is deprecated and refused by every reasoning model, this is taken by all chat models.
        "max_completion_tokens": call.max_output_tokens or call.model.max_output_tokens,
    }
    if call.model.temperature is not None:
        body["temperature"] = call.model.temperature
    if call.tools and call.model.native_tools:
        body["tools"] = [{"type": "function", "function": tool} for tool in call.tools]
    if call.schema is not None and call.model.structured_output:
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": call.schema_name, "schema": call.schema, "strict": _is_strict(call.schema)},
        }
    return PATH, {}, body


def _is_strict(schema: dict[str, Any]) -> bool:
    """Whether OpenAI takes the schema in strict mode: it wants every object closed and every property required."""
    return all(
        part.get("additionalProperties") is False and set(part.get("required", ())) == set(part.get("properties", ()))
        for part in wire.object_schemas(schema)
    )


def _message(message: Message) -> dict[str, Any]:
    out: dict[str, Any] = {"role": message["role"], "content": message["content"]}
    if message["role"] == "tool":
        out["tool_call_id"] = message.get("tool_call_id", "")
    if message.get("tool_calls"):
        out["content"] = message["content"] or None
        out["tool_calls"] = [
            {
                "id": wish["id"],
                "type": "function",
                "function": {
                    "name": wish["name"],
                    "arguments": json.dumps(wire.arguments_object(wish["arguments"]), ensure_ascii=False),
                },
            }
            for wish in message["tool_calls"]
        ]
    return out


def decode(call: LlmCall, body: bytes, *, latency_ms: int = 0) -> LlmReply:
    """The answer in the body of a successful response. Raises ``ProviderError`` (``bad_response``), nothing else."""
    return read(call, wire.loads(body), latency_ms=latency_ms)


def read(call: LlmCall, answer: dict[str, Any], *, latency_ms: int = 0) -> LlmReply:
    """The same, of a body that has been parsed."""
    choice = _first_choice(answer)
    message = choice.get("message")
    if not isinstance(message, dict):
        raise errors.bad_response("the choice has no message")
    provider_id = wire.text_of(answer.get("id"))
    tool_calls = _tool_calls(message.get("tool_calls"), provider_id or "call")
    finish = _FINISH.get(wire.text_of(choice.get("finish_reason")), "stop")
    text = _text(message.get("content"))
    refusal = wire.text_of(message.get("refusal"))
    if text is None and refusal:
        text, finish = refusal, "content_filter"
    if text is None and not tool_calls and finish not in {"length", "content_filter"}:
        raise errors.bad_response("the message has neither content nor tool calls")
    if tool_calls and finish == "stop":  # some servers say so
        finish = "tool_calls"
    usage = answer.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return wire.reply(
        call,
        text=text or "",
        tool_calls=tool_calls,
        finish=finish,
        tokens=(usage.get("prompt_tokens"), usage.get("completion_tokens")),
        model=answer.get("model"),
        provider_id=provider_id,
        latency_ms=latency_ms,
    )


def _first_choice(answer: dict[str, Any]) -> dict[str, Any]:
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        # Gateways report an error of the provider behind them with status 200.
        raise errors.bad_response("it is an error object" if "error" in answer else "it has no choices")
    choice: dict[str, Any] = choices[0]
    return choice


def _text(content: Any) -> str | None:
    """The text of a message; None if it has none. A list of parts is a variant of compatible servers."""
    if isinstance(content, str):
        return wire.clean(content)
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(wire.clean(part) for part in parts if isinstance(part, str))
    return None


def _tool_calls(raw: Any, prefix: str) -> list[ToolCall]:
    if raw is None:
        return []
    if not isinstance(raw, list):
        raise errors.bad_response("tool_calls is no list")
    found: list[ToolCall] = []
    for index, wish in enumerate(raw):
        function = wish.get("function") if isinstance(wish, dict) else None
        if not isinstance(function, dict):
            raise errors.bad_response("a tool call has no function")
        found.append(
            wire.tool_call(wish.get("id"), function.get("name"), function.get("arguments"), f"{prefix}-{index}")
        )
    return found
