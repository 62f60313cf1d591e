"""What a tool call gives back: JSON for the model, or one sentence that says how to go on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from pydantic_core import to_jsonable_python

from agentq.errors import ToolError
from agentq.place import place

ResultCode = Literal["ok", "unknown_tool", "not_permitted", "bad_arguments", "tool_error", "exception", "timeout"]

_MESSAGE_CHARS = 300  # of an exception's own words


@dataclass(frozen=True, slots=True)
class ToolResult:
    """The end of one tool call; what the model sees is ``content``.

    ``content`` is the result as JSON text where ``ok``, else a sentence that tells the model how to react; never more
    UTF-8 than the tool's ``max_result_bytes`` (``truncated`` says that something was cut off, the text shows where).
    ``unknown_outcome``: the tool is not a read and broke off, so its effect may have happened.
    """

    ok: bool
    code: ResultCode
    content: str
    truncated: bool
    latency_ms: int
    unknown_outcome: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """A result before its size and time are known.

    ``began``: the function was entered and did not end in order. ``origin``: where an exception arose, for the log.
    """

    code: ResultCode
    content: str
    began: bool = False
    origin: str = ""


def succeeded(value: Any) -> Outcome:
    """JSON text of what the function returned; raises ValueError or TypeError where it has no JSON form."""
    plain = to_jsonable_python(value, fallback=_fallback)
    return Outcome("ok", json.dumps(plain, ensure_ascii=False, allow_nan=False))


def failed(error: BaseException) -> Outcome:
    """What the model hears of an exception: a ``ToolError`` speaks for itself, of others the class and a few words."""
    if isinstance(error, ToolError):
        return Outcome("tool_error", _words(error) or "The tool refused this call.")
    words = _words(error)[:_MESSAGE_CHARS]
    name = type(error).__name__
    told = f"{name}: {words}" if words else name
    return Outcome(
        "exception",
        f"The tool failed with {told}. Do not repeat the same call; try another way, or say what could not be done.",
        began=True,
        origin=place(error),
    )


def timed_out(limit_s: float) -> Outcome:
    """The function ran past its limit; whether its effect happened is not known."""
    return Outcome(
        "timeout",
        f"The tool gave no answer within {limit_s:.3g} s. Go on without its result, or say what could not be done.",
        began=True,
    )


def not_begun(code: ResultCode, content: str) -> Outcome:
    """The function was never entered, so nothing can have happened."""
    return Outcome(code, content)


def limit_bytes(text: str, limit: int) -> tuple[str, bool]:
    """``text`` as valid Unicode in at most ``limit`` bytes of UTF-8, and whether it was cut. The cut is marked."""
    raw = text.encode("utf-8", "replace")  # lone surrogates have no UTF-8
    if len(raw) <= limit:
        return raw.decode(), False
    marker = f" ...[truncated: {len(raw)} bytes, limit {limit}]".encode()
    if len(marker) > limit:
        marker = b"..."[:limit]
    return raw[: limit - len(marker)].decode("utf-8", "ignore") + marker.decode(), True


def _fallback(value: Any) -> str:
    # BSON ids are common in tools over MongoDB; this layer does not import the driver, so the type goes by its name.
    if type(value).__name__ == "ObjectId":
        return str(value)
    raise TypeError(f"the tool returned a {type(value).__name__}, which has no JSON form")


def _words(error: BaseException) -> str:
    try:
        return " ".join(str(error).split())
    except Exception:  # noqa: BLE001  an exception whose own __str__ raises still has to become an observation
        return ""
