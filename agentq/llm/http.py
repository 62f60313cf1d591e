"""Model calls over HTTP: one pooled keep-alive session per event loop, one deadline, one answer or one error.

There is no retry in here, the journal of the engine owns them. Not even for a keep-alive connection that the server
closes as we send: nobody can tell whether it had begun the work, so that is ``response_cut``, retryable.

``HttpLlm`` is an ``Llm`` like any other. Shared limits, a breaker or a fallback are an ``Llm`` that wraps this one and
hands calls down; nothing in here has to change for them.
"""

from __future__ import annotations

import asyncio
import io
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import aiohttp

from agentq.errors import ProviderError
from agentq.llm import anthropic, errors, openai, wire
from agentq.llm.endpoints import Endpoint, Endpoints, Provider
from agentq.llm.types import LlmCall, LlmReply

MAX_RESPONSE_BYTES = 8 * 1024 * 1024
_LARGE_BODY = 1 << 20  # aiohttp wants anything larger as a stream, it blocks the loop otherwise


class _Codec(Protocol):
    """A wire format; the modules ``openai`` and ``anthropic`` are the two there are."""

    def encode(self, call: LlmCall) -> tuple[str, dict[str, str], dict[str, Any]]: ...
    def decode(self, call: LlmCall, body: bytes, *, latency_ms: int = 0) -> LlmReply: ...


_CODECS: dict[str, _Codec] = {"openai": openai, "anthropic": anthropic}


class HttpLlm:
    """The transport to real model servers; an ``Llm``.

    ``providers``: address and key by the provider names of ``ModelSpec``; ``ModelSpec.base_url`` overrides the address.
    ``max_connections``: open connections of one event loop at a time, 0 is no limit; a call that has to wait for one
    waits within its deadline. ``max_response_bytes`` counts after decompression.

    Safe to share between event loops and to create before a fork: a session is opened by the first call in a loop.
    """

    def __init__(
        self,
        providers: Mapping[str, Provider],
        *,
        max_connections: int = 0,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
    ) -> None:
        self._endpoints = Endpoints(providers)
        self._max_connections = max_connections
        self._max_response_bytes = max_response_bytes
        self._sessions: dict[tuple[int, asyncio.AbstractEventLoop], aiohttp.ClientSession] = {}

    async def complete(self, call: LlmCall) -> LlmReply:
        """Perform the call once. Raises ``ProviderError``; the codes are listed in ``agentq.llm.errors``.

        The answer is complete within ``call.model.read_timeout_s`` of wall-clock time, connecting included, or the
        call fails; connecting alone may take ``connect_timeout_s``. Cancelling closes the connection.
        """
        codec = _CODECS[call.model.provider]
        path, headers, body = codec.encode(call)
        endpoint = self._endpoints.of(call.model, path, {**headers, "Content-Type": "application/json"})
        started = time.perf_counter()
        try:
            status, answer_headers, answer = await self._exchange(endpoint, call, wire.dumps(body))
        except errors.FAILURES as error:
            raise errors.from_exception(error, where=endpoint.where) from None
        latency_ms = round((time.perf_counter() - started) * 1000)
        if not 200 <= status < 300:
            raise errors.from_status(
                status,
                answer_headers,
                answer,
                where=endpoint.where,
                private=lambda: _private(call),
                api_key=endpoint.api_key,
            )
        return codec.decode(call, answer, latency_ms=latency_ms)

    async def close(self) -> None:
        """Close the connections of the running event loop; calls in flight in it fail with ``response_cut``.

        Each loop closes its own. A later call opens a new session.
        """
        session = self._sessions.pop((os.getpid(), asyncio.get_running_loop()), None)
        if session is not None:
            await session.close()

    async def _exchange(
        self, endpoint: Endpoint, call: LlmCall, payload: bytes
    ) -> tuple[int, Mapping[str, str], bytes]:
        headers = {**endpoint.headers, "Idempotency-Key": call.key} if call.key else endpoint.headers
        timeout = aiohttp.ClientTimeout(total=call.model.read_timeout_s, sock_connect=call.model.connect_timeout_s)
        data = payload if len(payload) < _LARGE_BODY else io.BytesIO(payload)
        # A redirect is an error: following it would hand prompt and key to an address nobody configured.
        async with self._session().post(
            endpoint.url, data=data, headers=headers, timeout=timeout, allow_redirects=False
        ) as response:
            answer = bytearray()
            async for chunk in response.content.iter_any():
                answer += chunk
                if len(answer) > self._max_response_bytes:
                    raise ProviderError(
                        f"{endpoint.where} sent more than {self._max_response_bytes} bytes.", code="response_too_large"
                    )
            return response.status, response.headers, bytes(answer)

    def _session(self) -> aiohttp.ClientSession:
        # The process id is part of the key: a child must not send on sockets that it shares with its parent.
        key = (os.getpid(), asyncio.get_running_loop())
        session = self._sessions.get(key)
        if session is None:
            for other in [one for one in self._sessions if one[0] == key[0] and one[1].is_closed()]:
                del self._sessions[other]
            session = self._sessions[key] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._max_connections),
                cookie_jar=aiohttp.DummyCookieJar(),  # a provider's cookies are nobody's state
            )
        return session


def _private(call: LlmCall) -> Iterable[str]:
    for message in call.messages:
        yield message["content"]
        for wish in message.get("tool_calls", ()):
            yield str(wish["arguments"])
