"""Model calls over HTTP: one pooled keep-alive session per event loop, one deadline, one answer or one error.

There is no retry in here, the journal of the engine owns them. Not even for a keep-alive connection that the server
closes as we send: nobody can tell whether it had begun the work, so that is ``response_cut``, retryable.

``HttpLlm`` is an ``Llm`` like any other. Shared limits, a breaker or a fallback are an ``Llm`` that wraps this one and
hands calls down; nothing in here has to change for them.
"""

from __future__ import annotations

import asyncio
import io
import ipaddress
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import aiohttp
from yarl import URL

from agentq.errors import ConfigError, ProviderError
from agentq.llm import anthropic, errors, openai, wire
from agentq.llm.types import LlmCall, LlmReply
from schemas.catalog import ModelSpec

MAX_RESPONSE_BYTES = 8 * 1024 * 1024
_LARGE_BODY = 1 << 20  # aiohttp wants anything larger as a stream, it blocks the loop otherwise


class _Codec(Protocol):
    """A wire format; the modules ``openai`` and ``anthropic`` are the two there are."""

    def auth(self, api_key: str) -> dict[str, str]: ...
    def encode(self, call: LlmCall) -> tuple[str, dict[str, str], dict[str, Any]]: ...
    def decode(self, call: LlmCall, body: bytes, *, latency_ms: int = 0) -> LlmReply: ...


_CODECS: dict[str, _Codec] = {"openai": openai, "anthropic": anthropic}


@dataclass(frozen=True, slots=True)
class Provider:
    """Where a provider is reached and with what key.

    ``base_url`` follows the custom of the provider's own client: OpenAI's ends in ``/v1``, Anthropic's does not.
    An empty ``api_key`` sends none (local servers). The key is never shown by ``repr``.
    """

    base_url: str
    api_key: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        _parse(self.base_url)
        if any(not "!" <= character <= "~" for character in self.api_key):
            raise ConfigError(
                "An API key holds a space, a line break or a character outside ASCII.",
                hint="Check how it was copied: a file often ends in a line break.",
            )


@dataclass(frozen=True, slots=True)
class _Endpoint:
    """One URL with what is sent to it every time. Its ``repr`` is safe: the headers hold the key."""

    url: URL
    where: str
    loopback: bool
    headers: dict[str, str] = field(repr=False)
    api_key: str = field(repr=False)


class HttpLlm:
    """The transport to real model servers; an ``Llm``.

    ``providers``: address and key by the provider names of ``ModelSpec``; ``ModelSpec.base_url`` overrides the address.
    ``max_connections``: open connections of one event loop at a time, 0 is no limit; a call that has to wait for one
    waits within its deadline. ``max_response_bytes`` counts after decompression.

    Safe to share between event loops and to create before a fork: a session is opened by the first call in a loop.
    """

    only_loopback: ClassVar[bool] = False  # the kill switch: see agentq.testing.no_real_models

    def __init__(
        self,
        providers: Mapping[str, Provider],
        *,
        max_connections: int = 0,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
    ) -> None:
        self._providers = dict(providers)
        self._max_connections = max_connections
        self._max_response_bytes = max_response_bytes
        self._endpoints: dict[tuple[str, str | None], _Endpoint] = {}
        self._sessions: dict[tuple[int, asyncio.AbstractEventLoop], aiohttp.ClientSession] = {}

    async def complete(self, call: LlmCall) -> LlmReply:
        """Perform the call once. Raises ``ProviderError``; the codes are listed in ``agentq.llm.errors``.

        The answer is complete within ``call.model.read_timeout_s`` of wall-clock time, connecting included, or the
        call fails; connecting alone may take ``connect_timeout_s``. Cancelling closes the connection.
        """
        codec = _CODECS[call.model.provider]
        path, headers, body = codec.encode(call)
        endpoint = self._endpoint(call.model, codec, path, headers)
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
        self, endpoint: _Endpoint, call: LlmCall, payload: bytes
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

    def _endpoint(self, model: ModelSpec, codec: _Codec, path: str, headers: dict[str, str]) -> _Endpoint:
        key = (model.provider, model.base_url)
        endpoint = self._endpoints.get(key)
        if endpoint is None:
            endpoint = self._endpoints[key] = self._new_endpoint(model, codec, path, headers)
        if self.only_loopback and not endpoint.loopback:
            raise ProviderError(
                f"{endpoint.where} is a real model and real models are switched off.",
                code="real_model_refused",
                hint="Script the model (agentq.testing.ScriptedLlm) or use the offline model server.",
            )
        return endpoint

    def _new_endpoint(self, model: ModelSpec, codec: _Codec, path: str, headers: dict[str, str]) -> _Endpoint:
        provider = self._providers.get(model.provider)
        if provider is None:
            raise ProviderError(
                f"No address and key are configured for the provider {model.provider}.", code="provider_not_configured"
            )
        try:
            base = _parse(model.base_url or provider.base_url)
        except ConfigError as error:
            raise ProviderError(error.message, code="bad_base_url", hint=error.hint) from None
        fixed = {"Content-Type": "application/json", "User-Agent": "agentq", **headers}
        if provider.api_key:
            fixed |= codec.auth(provider.api_key)
        return _Endpoint(
            url=base.with_path(base.path.rstrip("/") + path, keep_query=True),
            where=f"{model.provider} at {base.host}:{base.port}",
            loopback=_is_loopback(base.host or ""),
            headers=fixed,
            api_key=provider.api_key,
        )


def _parse(base_url: str) -> URL:
    try:
        url = URL(base_url)
    except ValueError:
        url = URL()
    if url.scheme not in {"http", "https"} or not url.host or url.user is not None:
        raise ConfigError(
            "A base_url is no http(s) address, or holds a user name.",
            hint="It looks like https://api.openai.com/v1 or https://api.anthropic.com; the key goes into api_key.",
        )
    return url


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _private(call: LlmCall) -> Iterable[str]:
    for message in call.messages:
        yield message["content"]
        for wish in message.get("tool_calls", ()):
            yield str(wish["arguments"])
