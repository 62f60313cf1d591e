"""Chat messages, tool calls and usage as the engine stores them, independent of any provider's wire format."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12


class ToolCall(TypedDict):
    """A model's wish to call a tool. ``arguments`` is a dict, or the raw text where it was no valid JSON object."""

    id: str
    name: str
    arguments: dict[str, Any] | str


class Message(TypedDict):
    """One message. A ``tool`` message answers the call named in ``tool_call_id``."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: NotRequired[list[ToolCall]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


class Usage(TypedDict):
    """Tokens of one call as the provider counted them; ``estimated`` where it gave no count."""

    input_tokens: int
    output_tokens: int
    estimated: NotRequired[bool]


class ToolSchema(TypedDict):
    """A tool as a model sees it; ``parameters`` is a JSON Schema of type object."""

    name: str
    description: str
    parameters: dict[str, Any]
