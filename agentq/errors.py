"""Every error agentq raises on purpose, in one tree.

    AgentqError
    ├── InvalidRequest        the caller's input is at fault; the same call will fail again
    │   ├── IdempotencyConflict   the key was used before with another body
    │   └── UnknownWorkflow       no such workflow is registered
    ├── NotFound              no run, conversation or step of that name
    ├── Conflict              the run is not in a state that allows this (e.g. already ended)
    ├── QueueFull             too many requests of the caller wait already; ``retry_after_s`` says when to come back
    ├── Unavailable           a server we need does not answer; safe to retry
    ├── ConfigError           a file or setting is wrong: file, line, reason, mend
    ├── ToolError             a tool said no; becomes an observation, never ends a run
    └── ProviderError         a model provider's answer, translated (see ``agentq.llm.errors``)

An error carries a stable ``code`` (programs match on it, it never changes meaning), a sentence that says what was
wrong, and ``hint``: what to do about it. ``retryable`` says whether the same call may succeed later without a change.
"""

from __future__ import annotations

from typing import Any


class AgentqError(Exception):
    """Root of the tree. ``str(error)`` is one sentence for a person; ``as_dict()`` is for programs."""

    code: str = "internal"
    retryable: bool = False

    def __init__(self, message: str, *, code: str | None = None, hint: str = "", **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.hint = hint
        self.details = details

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()

    def as_dict(self) -> dict[str, Any]:
        """``{code, message, hint, retryable}`` plus details; JSON-safe if the details are."""
        return {
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            "retryable": self.retryable,
            **self.details,
        }


class InvalidRequest(AgentqError):
    code = "invalid_request"


class IdempotencyConflict(InvalidRequest):
    code = "idempotency_conflict"


class UnknownWorkflow(InvalidRequest):
    code = "unknown_workflow"


class NotFound(AgentqError):
    code = "not_found"


class Conflict(AgentqError):
    code = "conflict"


class QueueFull(AgentqError):
    """``retry_after_s``: when a place is likely to be free."""

    code = "queue_full"
    retryable = True

    def __init__(self, message: str, *, retry_after_s: float, **details: Any) -> None:
        hint = f"Submit it again in {retry_after_s:g} s, or ask for a higher limit."
        super().__init__(message, hint=hint, retry_after_s=retry_after_s, **details)
        self.retry_after_s = retry_after_s


class Unavailable(AgentqError):
    code = "unavailable"
    retryable = True


class ConfigError(AgentqError):
    code = "config_error"


class ToolError(AgentqError):
    """Raise it in a tool to tell the model, in its own words, why the call was refused."""

    code = "tool_error"


class ProviderError(AgentqError):
    """A model provider failed. ``retry_after_s`` is the provider's wish, None if it gave none."""

    code = "provider_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        hint: str = "",
        retryable: bool = False,
        retry_after_s: float | None = None,
        **details: Any,
    ) -> None:
        super().__init__(message, code=code, hint=hint, **details)
        self.retryable = retryable
        self.retry_after_s = retry_after_s
