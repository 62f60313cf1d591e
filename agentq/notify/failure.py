"""Why a delivery did not arrive, and whether another try makes sense."""

from __future__ import annotations

from typing import Any

from agentq.errors import AgentqError


class NotDelivered(AgentqError):
    """One try failed. ``final``: another would be refused as well, so a person has to look at it. ``retry_after_s``:
    the receiver's wish, None if it has none. ``code`` and message go into the delivery and hold nothing of the body."""

    code = "not_delivered"

    def __init__(
        self, message: str, *, code: str, final: bool = False, retry_after_s: float | None = None, **details: Any
    ) -> None:
        super().__init__(message, code=code, **details)
        self.retryable = not final
        self.final = final
        self.retry_after_s = retry_after_s
