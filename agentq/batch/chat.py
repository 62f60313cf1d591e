"""From the body of an OpenAI chat completion to a request. Pure.

``model`` names the workflow, as ``agentq/<workflow>`` or plainly. The last message is the user's and is the input.
Earlier messages are not dropped: they stand before it in the input, each under its role, so the workflow reads them as
the caller's text. A ``system`` message there has the authority of the request, never that of an agent's instructions.
"""

from __future__ import annotations

from typing import Any

# Tuning of one model call. A workflow makes many calls to models that its operator has chosen and tuned.
IGNORED = frozenset(
    {
        "temperature", "top_p", "max_tokens", "max_completion_tokens", "seed", "presence_penalty", "frequency_penalty",
        "reasoning_effort", "verbosity", "store", "service_tier", "parallel_tool_calls", "prompt_cache_key",
        "prompt_cache_retention", "safety_identifier", "logit_bias",
    }
)  # fmt: skip
# What would change the shape of the answer: harmless at these values, refused at any other.
FIXED: dict[str, Any] = {
    "n": 1, "stream": False, "logprobs": False, "tools": [], "modalities": ["text"],
    "response_format": {"type": "text"},
}  # fmt: skip
USED = frozenset({"model", "messages", "user", "metadata"})
ROLES = ("system", "developer", "user", "assistant")


class BadBody(Exception):
    """What is wrong with a line, and the fix."""

    def __init__(self, code: str, message: str, hint: str) -> None:
        super().__init__(message)
        self.code, self.message, self.hint = code, message, hint


def chat_request(body: Any, default_workflow: str) -> dict[str, Any]:
    """The fields of a request (for ``parse_request``). Raises ``BadBody``."""
    if not isinstance(body, dict):
        raise BadBody("wrong_type", "body is not an object.", "Send the body of a chat completion.")
    for name, value in body.items():
        if name in USED or name in IGNORED or value is None or (name in FIXED and value == FIXED[name]):
            continue
        raise BadBody(
            "unsupported_parameter", f"body.{name[:80]} is not supported here.",
            "Remove it: the workflow decides about models, tools and formats.",
        )  # fmt: skip
    model = body.get("model", default_workflow)
    if not isinstance(model, str):
        raise BadBody("wrong_type", "body.model is not a string.", "Name the workflow: agentq/<workflow>.")
    request = {"workflow": model.removeprefix("agentq/"), "input": _input(body.get("messages"))}
    return request | {name: body[name] for name in ("user", "metadata") if body.get(name) is not None}


def _input(messages: Any) -> str:
    if not isinstance(messages, list) or not messages:
        raise BadBody("missing_field", "body.messages is not a list of messages.", "Send at least one user message.")
    said = [_message(index, message) for index, message in enumerate(messages)]
    role, last = said[-1]
    if role != "user":
        raise BadBody(
            "last_message", f"The last message is the {role}'s.", "End with the user's message: it is the request."
        )
    if len(said) == 1:
        return last
    earlier = "\n".join(f"{role}: {text}" for role, text in said[:-1])
    return f"Earlier messages:\n{earlier}\n\nRequest:\n{last}"


def _message(index: int, message: Any) -> tuple[str, str]:
    where = f"body.messages[{index}]"
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise BadBody("unsupported_message", f"{where} has no role of {', '.join(ROLES)}.", "Leave out other messages.")
    content = message.get("content")
    if isinstance(content, list) and all(_is_text(part) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise BadBody("unsupported_content", f"{where} holds something other than text.", "Send text only.")
    return message["role"], content


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
