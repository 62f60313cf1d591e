"""Where a provider is reached and with what key; the addresses that calls go to."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from yarl import URL

from agentq.errors import ConfigError, ProviderError
from agentq.llm import anthropic, openai
from schemas.catalog import ModelSpec

_AUTH = {"openai": openai.auth, "anthropic": anthropic.auth}


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
class Endpoint:
    """One URL with what is sent to it every time. Its ``repr`` is safe: the headers hold the key."""

    url: URL
    where: str
    loopback: bool
    headers: dict[str, str] = field(repr=False)
    api_key: str = field(repr=False)


class Endpoints:
    """The addresses of models by their provider's name; ``ModelSpec.base_url`` overrides the provider's."""

    only_loopback: ClassVar[bool] = False  # the kill switch: see agentq.testing.no_real_models

    def __init__(self, providers: Mapping[str, Provider]) -> None:
        self._providers = dict(providers)
        self._known: dict[tuple[str, str | None, str], Endpoint] = {}

    def of(self, model: ModelSpec, path: str, headers: Mapping[str, str]) -> Endpoint:
        """The address of a model's provider with ``path`` after it. Raises ``ProviderError``: nothing is configured,
        or the kill switch is on."""
        key = (model.provider, model.base_url, path)
        endpoint = self._known.get(key)
        if endpoint is None:
            endpoint = self._known[key] = self._new(model, path, headers)
        if self.only_loopback and not endpoint.loopback:
            raise ProviderError(
                f"{endpoint.where} is a real model and real models are switched off.",
                code="real_model_refused",
                hint="Script the model (agentq.testing.ScriptedLlm) or use the offline model server.",
            )
        return endpoint

    def _new(self, model: ModelSpec, path: str, headers: Mapping[str, str]) -> Endpoint:
        provider = self._providers.get(model.provider)
        if provider is None:
            raise ProviderError(
                f"No address and key are configured for the provider {model.provider}.", code="provider_not_configured"
            )
        try:
            base = _parse(model.base_url or provider.base_url)
        except ConfigError as error:
            raise ProviderError(error.message, code="bad_base_url", hint=error.hint) from None
        fixed = {"User-Agent": "agentq", **headers}
        if provider.api_key:
            fixed |= _AUTH[model.provider](provider.api_key)
        return Endpoint(
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
