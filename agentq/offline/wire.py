"""The two wire formats: requests of OpenAI's chat completions and Anthropic's messages in, their answers out."""

from __future__ import annotations

import json
import re
from typing import Any, Literal, NoReturn

from agentq.canonical import sha256
from agentq.errors import InvalidRequest
from agentq.offline.brain import prompt_tokens, reply_tokens
from agentq.offline.prompt import Prompt, Reply
from schemas.chat import Message, ToolCall, ToolSchema

Api = Literal["openai", "anthropic"]
MAX_BODY = 8 * 1024 * 1024  # bytes of a request
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class Refusal(Exception):
    """A request that is answered with an error: its status, and what ``write_error`` makes of the rest."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def read_object(raw: bytes) -> dict[str, Any]:
    """A JSON object. Raises ``ValueError`` for all else: other values, NaN, deep nests, text that is no Unicode."""
    try:
        value = json.loads(raw.decode(), parse_constant=_no_constant)
        if _SURROGATE.search(raw):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def read(api: Api, body: Any) -> Prompt:
    """A request to the provider of ``api``. Raises ``Refusal`` where it is none."""
    try:
        prompt = read_openai(body) if api == "openai" else read_anthropic(body)
        _ = prompt.purpose  # a schema that is none shows here
    except (ValueError, KeyError, TypeError, AttributeError, InvalidRequest) as error:
        raise Refusal(400, f"The request could not be read: {error}") from None
    return prompt


def _need(body: dict[str, Any], key: str, kind: type) -> Any:
    value = body.get(key)
    if not isinstance(value, kind) or not value:
        raise InvalidRequest(f"'{key}' must be a {kind.__name__} and not empty.", hint=f"Send '{key}'.")
    return value


def _text(content: Any) -> str:
    """Text content, or the text blocks of structured content, as one text."""
    if isinstance(content, list):
        return "\n".join(str(b.get("text", "")) for b in content if isinstance(b, dict) and b.get("type") == "text")
    return "" if content is None else str(content)


# -- OpenAI ---------------------------------------------------------------------------------------------------------


def read_openai(body: dict[str, Any]) -> Prompt:
    """A chat completions request. Raises ``InvalidRequest`` where it is none."""
    model, raw = _need(body, "model", str), _need(body, "messages", list)
    system, messages = [], []
    for item in raw:
        if not isinstance(item, dict) or "role" not in item:
            raise InvalidRequest("A message is an object with a role.", hint="Send {'role': ..., 'content': ...}.")
        if item["role"] in ("system", "developer"):
            system.append(_text(item.get("content")))
        else:
            messages.append(_openai_message(item))
    tools: tuple[ToolSchema, ...] = tuple(
        {
            "name": tool["function"]["name"],
            "description": tool["function"].get("description", ""),
            "parameters": tool["function"].get("parameters", {}),
        }
        for tool in body.get("tools") or []
        if tool.get("type") == "function"
    )
    chosen = body.get("tool_choice")
    if chosen == "none":
        tools = ()
    schema = (body.get("response_format") or {}).get("json_schema", {}).get("schema")
    return Prompt(model, "\n\n".join(system), tuple(messages), tools, schema)


def _openai_message(item: dict[str, Any]) -> Message:
    message: Message = {"role": item["role"], "content": _text(item.get("content"))}
    if calls := item.get("tool_calls"):
        message["tool_calls"] = [
            {"id": call["id"], "name": call["function"]["name"], "arguments": _parsed(call["function"]["arguments"])}
            for call in calls
        ]
    if item["role"] == "tool":
        message["tool_call_id"] = str(item.get("tool_call_id", ""))
    return message


def _parsed(arguments: Any) -> dict[str, Any] | str:
    try:
        value = json.loads(arguments)
    except (TypeError, ValueError):
        return str(arguments)
    return value if isinstance(value, dict) else str(arguments)


def _arguments(call: ToolCall) -> str:
    """Arguments as the text OpenAI sends; a text is passed on as it is (that is how broken ones are injected)."""
    return call["arguments"] if isinstance(call["arguments"], str) else json.dumps(call["arguments"])


def write_openai(prompt: Prompt, reply: Reply, *, usage: bool = True) -> dict[str, Any]:
    """A chat completion; its id depends on prompt and reply alone."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.text or None, "refusal": None}
    if reply.tool_calls:
        message["tool_calls"] = [_openai_call(call) for call in reply.tool_calls]
    body: dict[str, Any] = {
        "id": f"chatcmpl-{_identity(prompt, reply)}",
        "object": "chat.completion",
        "created": 0,
        "model": prompt.model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": _openai_finish(reply)}],
    }
    if usage:
        body["usage"] = openai_usage(prompt, reply)
    return body


def _openai_call(call: ToolCall) -> dict[str, Any]:
    return {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": _arguments(call)}}


def _openai_finish(reply: Reply) -> str:
    return "tool_calls" if reply.tool_calls else "stop"


def openai_usage(prompt: Prompt, reply: Reply) -> dict[str, int]:
    given, made = prompt_tokens(prompt), reply_tokens(reply)
    return {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}


def stream_openai(prompt: Prompt, reply: Reply, *, usage: bool) -> list[dict[str, Any]]:
    """The chunks of a streamed chat completion, without the closing ``[DONE]``."""
    frame = {
        "id": f"chatcmpl-{_identity(prompt, reply)}",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": prompt.model,
    }

    def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {**frame, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

    pieces = [reply.text[start : start + 24] for start in range(0, len(reply.text), 24)]
    calls = [{"tool_calls": [{"index": i, **_openai_call(call)}]} for i, call in enumerate(reply.tool_calls)]
    chunks = [chunk({"role": "assistant", "content": ""}), *(chunk({"content": piece}) for piece in pieces)]
    chunks += [*(chunk(call) for call in calls), chunk({}, _openai_finish(reply))]
    if usage:
        chunks.append({**frame, "choices": [], "usage": openai_usage(prompt, reply)})
    return chunks


# -- Anthropic ------------------------------------------------------------------------------------------------------


def read_anthropic(body: dict[str, Any]) -> Prompt:
    """A messages request. A forced tool is read as the shape asked of the answer. Raises ``InvalidRequest``."""
    model, raw = _need(body, "model", str), _need(body, "messages", list)
    _need(body, "max_tokens", int)
    messages: list[Message] = []
    for item in raw:
        if not isinstance(item, dict) or item.get("role") not in ("user", "assistant"):
            raise InvalidRequest(
                "A message has the role user or assistant.", hint="Send the system prompt in 'system'."
            )
        messages += _anthropic_messages(item)
    tools: tuple[ToolSchema, ...] = tuple(
        {"name": tool["name"], "description": tool.get("description", ""), "parameters": tool["input_schema"]}
        for tool in body.get("tools") or []
        if "input_schema" in tool
    )
    forced, system = forced_tool(body), _text(body.get("system"))
    if forced is not None:
        schema = next((tool["parameters"] for tool in tools if tool["name"] == forced), None)
        return Prompt(model, system, tuple(messages), (), schema)
    form = (body.get("output_config") or {}).get("format") or body.get("output_format") or {}
    if (body.get("tool_choice") or {}).get("type") == "none":
        tools = ()
    return Prompt(model, system, tuple(messages), tools, form.get("schema"))


def forced_tool(body: dict[str, Any]) -> str | None:
    """The tool that must be called, if one is named."""
    choice = body.get("tool_choice") or {}
    return str(choice["name"]) if choice.get("type") == "tool" and choice.get("name") else None


def _anthropic_messages(item: dict[str, Any]) -> list[Message]:
    """One message as the brain's: tool results become messages of their own, before the text beside them."""
    content = item.get("content")
    blocks = content if isinstance(content, list) else []
    results: list[Message] = [
        {"role": "tool", "content": _text(block.get("content")), "tool_call_id": str(block.get("tool_use_id", ""))}
        for block in blocks
        if block.get("type") == "tool_result"
    ]
    text = _text(content)
    calls: list[ToolCall] = [
        {"id": block["id"], "name": block["name"], "arguments": block.get("input") or {}}
        for block in blocks
        if block.get("type") == "tool_use"
    ]
    if results and not text and not calls:
        return results
    message: Message = {"role": item["role"], "content": text}
    if calls:
        message["tool_calls"] = calls
    return [*results, message]


def write_anthropic(prompt: Prompt, reply: Reply, *, forced: str | None = None, usage: bool = True) -> dict[str, Any]:
    """A message; where a tool is forced, the structured answer is its input."""
    content: list[dict[str, Any]] = [{"type": "text", "text": reply.text}] if reply.text else []
    if forced is not None:
        name, given = forced, _parsed(reply.text)
        content = [{"type": "tool_use", "id": f"toolu_{_identity(prompt, reply)}", "name": name, "input": given}]
    content += [
        {"type": "tool_use", "id": call["id"], "name": call["name"], "input": call["arguments"]}
        for call in reply.tool_calls
    ]
    body: dict[str, Any] = {
        "id": f"msg_{_identity(prompt, reply)}",
        "type": "message",
        "role": "assistant",
        "model": prompt.model,
        "content": content,
        "stop_reason": "tool_use" if reply.tool_calls or forced else "end_turn",
        "stop_sequence": None,
    }
    if usage:
        body["usage"] = {"input_tokens": prompt_tokens(prompt), "output_tokens": reply_tokens(reply)}
    return body


def stream_anthropic(prompt: Prompt, reply: Reply, *, forced: str | None = None, usage: bool = True) -> list[str]:
    """The server-sent events of a streamed message."""
    whole = write_anthropic(prompt, reply, forced=forced, usage=usage)
    counted = whole.get("usage", {})
    opening = {**whole, "content": [], "stop_reason": None, "usage": {**counted, "output_tokens": 0} if counted else {}}
    events: list[dict[str, Any]] = [{"type": "message_start", "message": opening}]
    for index, block in enumerate(whole["content"]):
        text = block["type"] == "text"
        empty = {"type": "text", "text": ""} if text else {**block, "input": {}}
        raw = block["text"] if text else json.dumps(block["input"])
        events.append({"type": "content_block_start", "index": index, "content_block": empty})
        for piece in [raw[start : start + 24] for start in range(0, len(raw), 24)]:
            delta = (
                {"type": "text_delta", "text": piece} if text else {"type": "input_json_delta", "partial_json": piece}
            )
            events.append({"type": "content_block_delta", "index": index, "delta": delta})
        events.append({"type": "content_block_stop", "index": index})
    ended = {"stop_reason": whole["stop_reason"], "stop_sequence": None}
    closing = {"usage": {"output_tokens": counted["output_tokens"]}} if counted else {}
    events += [{"type": "message_delta", "delta": ended, **closing}, {"type": "message_stop"}]
    return [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events]


def _identity(prompt: Prompt, reply: Reply) -> str:
    calls = "".join(call["id"] + call["name"] for call in reply.tool_calls)
    return sha256(f"{prompt.model}{prompt.last_user_text}{reply.text}{calls}")[:24]


# -- errors ---------------------------------------------------------------------------------------------------------

_ERROR_TYPES: dict[int, tuple[str, str]] = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("invalid_request_error", "authentication_error"),
    404: ("invalid_request_error", "not_found_error"),
    409: ("invalid_request_error", "invalid_request_error"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_error"),
    529: ("server_error", "overloaded_error"),
}


def write_error(
    api: Api, status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error body as the provider of ``api`` sends it; Anthropic's has no room for ``param`` and ``code``."""
    openai, anthropic = _ERROR_TYPES.get(status, ("server_error", "api_error"))
    if api == "anthropic":
        return {"type": "error", "error": {"type": anthropic, "message": message}}
    code = code or ("rate_limit_exceeded" if status == 429 else None)
    return {"error": {"message": message, "type": openai, "param": param, "code": code}}
