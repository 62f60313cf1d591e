"""Calls and texts that the tests of this folder share."""

from __future__ import annotations

from typing import Any

from agentq.llm.types import LlmCall
from schemas.catalog import ModelSpec

LOOK_UP = {
    "name": "look_up_order",
    "description": "Find an order.",
    "parameters": {"type": "object", "properties": {"order": {"type": "string"}}, "required": ["order"]},
}
CLOSED = {
    "type": "object",
    "properties": {"route": {"type": "string"}},
    "required": ["route"],
    "additionalProperties": False,
}
OPEN = {"type": "object", "properties": {"route": {"type": "string"}}}


def a_model(provider: str = "openai", **fields: Any) -> ModelSpec:
    return ModelSpec(
        **{"provider": provider, "model": "m-1", "input_usd_per_mtok": 2.0, "output_usd_per_mtok": 8.0, **fields}
    )


def a_call(provider: str = "openai", *, model: dict[str, Any] | None = None, **fields: Any) -> LlmCall:
    fields.setdefault("messages", [{"role": "user", "content": "Where is my order A-17?"}])
    return LlmCall(model=a_model(provider, **(model or {})), **fields)


TOOL_TURN: list[Any] = [
    {"role": "system", "content": "You help."},
    {"role": "user", "content": "Where are A-17 and A-18?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "c1", "name": "look_up_order", "arguments": {"order": "A-17"}},
            {"id": "c2", "name": "look_up_order", "arguments": '{"order": '},
        ],
    },
    {"role": "tool", "content": "sent", "tool_call_id": "c1", "name": "look_up_order"},
    {"role": "tool", "content": "not JSON", "tool_call_id": "c2", "name": "look_up_order"},
    {"role": "user", "content": "And?"},
]
