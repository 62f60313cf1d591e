"""What performs a call to a model. The values are ``schemas.llm``'s, because the engine builds calls too."""

from __future__ import annotations

from typing import Protocol

from schemas.llm import LlmCall, LlmReply

__all__ = ["Llm", "LlmCall", "LlmReply"]


class Llm(Protocol):
    """What performs a call: the HTTP transport, or the scripted double in tests.

    Raises ``agentq.errors.ProviderError`` (its ``retryable`` and ``retry_after_s`` decide about another attempt) and
    nothing else. Cancelling the coroutine closes the connection.
    """

    async def complete(self, call: LlmCall) -> LlmReply: ...
