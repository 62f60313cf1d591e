"""The two values of the model transport: a call and its answer. Provider-neutral; agentq.llm's codecs translate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from schemas.catalog import ModelSpec
from schemas.chat import Message, ToolCall, ToolSchema, Usage


@dataclass(frozen=True, slots=True)
class LlmCall:
    """One call to a model.

    ``schema``: a JSON Schema the answer should fit (structured output), with ``schema_name``. ``key`` is stable over
    attempts of a step and sent as ``Idempotency-Key`` (no provider honours it today; ours does in tests).
    ``purpose`` (route, turn, critique) is for records, never sent.
    """

    model: ModelSpec
    messages: list[Message]
    tools: list[ToolSchema] = field(default_factory=list)
    schema: dict[str, Any] | None = None
    schema_name: str = "answer"
    max_output_tokens: int | None = None
    key: str = ""
    purpose: str = ""


@dataclass(frozen=True, slots=True)
class LlmReply:
    """A model's answer. ``text`` may be empty if there are tool calls.

    ``finish``: stop, tool_calls, length, content_filter. Token counts are the provider's own, or estimates that say
    so. ``cost_nano_usd`` is 1e-9 USD by the model's configured prices. ``latency_ms``: from send to last byte.
    """

    text: str
    tool_calls: list[ToolCall]
    finish: str
    usage: Usage
    cost_nano_usd: int
    model: str
    latency_ms: int
    provider_id: str = ""
