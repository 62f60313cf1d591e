"""What the two wire codecs share: JSON in and out, text that can be stored, tool arguments, token estimates. Pure.

Everything that comes from a provider goes through here before it is stored: text is valid UTF-8 without NUL, numbers
fit into BSON and canonical JSON, nesting is bounded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from agentq.llm import errors
from agentq.llm.types import LlmCall, LlmReply
from agentq.protocol import MAX_DEPTH
from schemas.chat import ToolCall, Usage

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_MAX_TOKENS = 1 << 31  # a larger count is nonsense
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def dumps(body: dict[str, Any]) -> bytes:
    """The body on the wire; a lone surrogate becomes "?". Raises ValueError on NaN, infinities and cycles."""
    return _encode(body).encode("utf-8", "replace")


def loads(body: bytes) -> dict[str, Any]:
    """A provider's answer as an object; bytes that are no UTF-8 are replaced. Raises ``bad_response`` otherwise."""
    try:
        value = json.loads(body.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        raise errors.bad_response("it is not JSON" if body else "it is empty") from None
    if not isinstance(value, dict):
        raise errors.bad_response("it is no JSON object")
    return value


def clean(text: str) -> str:
    """``text`` with NUL and lone surrogates replaced by U+FFFD, so that it can be stored as UTF-8 and BSON."""
    if text.isascii() and "\x00" not in text:  # nearly always, and far cheaper than the pattern
        return text
    return _UNSTORABLE.sub("\ufffd", text)


def text_of(value: Any, default: str = "") -> str:
    """A cleaned text field, or ``default`` where it is absent or no text."""
    return clean(value) if isinstance(value, str) and value else default


def tool_call(call_id: Any, name: Any, arguments: Any, fallback_id: str) -> ToolCall:
    """A model's wish to call a tool. Some compatible servers send no id: then ``fallback_id``."""
    if not isinstance(name, str) or not name:
        raise errors.bad_response("a tool call has no name")
    return {"id": text_of(call_id, fallback_id), "name": clean(name), "arguments": _arguments(arguments)}


def _arguments(raw: Any) -> dict[str, Any] | str:
    """A dict if it is a JSON object that can be stored, else the raw text. Nothing at all means no arguments."""
    if raw is None or (isinstance(raw, str) and not raw.strip()):
        return {}
    try:
        value = _storable(json.loads(raw) if isinstance(raw, str) else raw)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    return clean(raw if isinstance(raw, str) else _text(raw))


def _text(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise errors.bad_response("the arguments of a tool call are nested too deeply") from None


def _storable(value: Any, depth: int = MAX_DEPTH) -> Any:
    """A copy that MongoDB and the audit chain take; raises ValueError where there is none."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict | list):
        if depth == 0:
            raise ValueError("too deep")
        if isinstance(value, list):
            return [_storable(child, depth - 1) for child in value]
        return {clean(key): _storable(child, depth - 1) for key, child in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("not finite")
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise ValueError("more than 64 bits")
    return value


def arguments_object(arguments: dict[str, Any] | str) -> dict[str, Any]:
    """Arguments on their way back to a model. Broken ones are wrapped, as Anthropic advises: one provider takes only
    objects, and servers compatible with the other parse what they are sent and fail on anything else."""
    return arguments if isinstance(arguments, dict) else {"INVALID_JSON": arguments}


def object_schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """Every part of a JSON Schema that describes an object."""
    if isinstance(schema, dict):
        if schema.get("type") == "object" or "properties" in schema:
            yield schema
        for child in schema.values():
            yield from object_schemas(child)
    elif isinstance(schema, list):
        for child in schema:
            yield from object_schemas(child)


def reply(
    call: LlmCall,
    *,
    text: str,
    tool_calls: list[ToolCall],
    finish: str,
    tokens: tuple[Any, Any],
    model: Any,
    provider_id: str,
    latency_ms: int,
) -> LlmReply:
    """Put the answer together; ``tokens`` are the provider's counts of input and output, estimated where unusable."""
    usage = _usage(call, tokens, text, tool_calls)
    return LlmReply(
        text=text,
        tool_calls=tool_calls,
        finish=finish,
        usage=usage,
        cost_nano_usd=call.model.cost_nano_usd(usage["input_tokens"], usage["output_tokens"]),
        model=text_of(model, call.model.model),
        latency_ms=latency_ms,
        provider_id=provider_id,
    )


def _usage(call: LlmCall, tokens: tuple[Any, Any], text: str, tool_calls: list[ToolCall]) -> Usage:
    given, made = tokens
    if _is_count(given) and _is_count(made):
        return {"input_tokens": given, "output_tokens": made}
    return {
        "input_tokens": given if _is_count(given) else estimate_input(call),
        "output_tokens": made if _is_count(made) else _estimate(len(text) + _size(tool_calls)),
        "estimated": True,
    }


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_TOKENS


def estimate_input(call: LlmCall) -> int:
    """About how many tokens a call's prompt has: 4 characters a token, 4 tokens a message."""
    characters = sum(16 + len(m["content"]) + _size(m.get("tool_calls")) for m in call.messages)
    return _estimate(characters + _size(call.tools) + _size(call.schema))


def _size(value: Any) -> int:
    return len(json.dumps(value)) if value else 0


def _estimate(characters: int) -> int:
    return -(-characters // 4)
