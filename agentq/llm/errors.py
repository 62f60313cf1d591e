"""The one place where a failed model call becomes a ``ProviderError``.

    code                    retryable   cause
    rate_limited            yes         429; ``retry_after_s`` is the provider's wish
    provider_overloaded     yes         503, 529
    provider_unavailable    yes         any other 5xx, 408, 409, 425
    connect_failed          yes         name not resolved, refused, unreachable, TLS handshake broken off
    connect_timeout         yes         no connection within the model's ``connect_timeout_s``
    read_timeout            yes         no complete answer within the model's ``read_timeout_s``
    response_cut            yes         the connection ended before the answer did; the provider may have done the work
    bad_response            yes         the answer is not HTTP, not JSON, or lacks a field the format demands
    quota_exhausted         no          402, or 429 with ``insufficient_quota``: money is missing, waiting does not help
    bad_credentials         no          401, 403
    bad_model_request       no          400, 404, 422 and other 4xx; a redirect; a call that cannot be put on the wire
    context_too_long        no          413, or a 4xx in which the provider says that the prompt is too long
    response_too_large      no          more bytes than the transport accepts
    tls_failed              no          the server's certificate is not valid for its name
    bad_base_url            no          the configured address is no http(s) URL
    provider_not_configured no          no address and key are known for the model's provider
    real_model_refused      no          the kill switch for tests is on (``agentq.testing.no_real_models``)

A message is safe to log. It names the provider, the host and what happened; of the provider's own words it keeps one
short sentence, only for a refused request, and only if that repeats nothing of the prompt. It never holds the key.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

import aiohttp
from aiohttp import client_exceptions, http_exceptions

from agentq.errors import ProviderError

MAX_RETRY_AFTER_S = 86_400.0
MAX_DETAIL = 200  # characters of a provider's own words
_ECHO = 16  # this many characters in a row of the prompt make a provider's sentence unsafe


class _Verdict(NamedTuple):
    code: str
    sentence: str  # continues "<provider> at <host> ..."
    retryable: bool
    hint: str = ""


_RATE_LIMITED = _Verdict("rate_limited", "limits our rate", True)
_OVERLOADED = _Verdict("provider_overloaded", "is overloaded", True)
_UNAVAILABLE = _Verdict("provider_unavailable", "failed", True)
_QUOTA = _Verdict("quota_exhausted", "wants to be paid first", False, "Top up the account or raise its limit.")
_CREDENTIALS = _Verdict("bad_credentials", "refused the API key", False, "Check the key and what it may use.")
_BAD_REQUEST = _Verdict("bad_model_request", "refused the request", False, "Check the model's settings.")
_TOO_LONG = _Verdict("context_too_long", "says that the prompt is too long", False, "Shorten the history or the input.")
_REDIRECT = _Verdict("bad_model_request", "redirects", False, "Set base_url to the final address.")

_BY_STATUS: dict[int, _Verdict] = {
    401: _CREDENTIALS, 402: _QUOTA, 403: _CREDENTIALS,
    408: _UNAVAILABLE, 409: _UNAVAILABLE, 413: _TOO_LONG, 425: _UNAVAILABLE, 429: _RATE_LIMITED,
    503: _OVERLOADED, 529: _OVERLOADED,
}  # fmt: skip
_BY_CLASS: dict[int, _Verdict] = {3: _REDIRECT, 4: _BAD_REQUEST, 5: _UNAVAILABLE}

_CONNECT = _Verdict("connect_failed", "cannot be reached", True)
_CONNECT_TIMEOUT = _Verdict("connect_timeout", "did not accept a connection in time", True)
_READ_TIMEOUT = _Verdict("read_timeout", "gave no complete answer in time", True)
_CUT = _Verdict("response_cut", "closed the connection before the answer was complete", True)
_BAD_RESPONSE = _Verdict("bad_response", "answered with something that is not HTTP", True)
_TLS = _Verdict("tls_failed", "shows a certificate that is not valid for its name", False)
_BASE_URL = _Verdict("bad_base_url", "is no http(s) address", False, "Correct base_url.")
_UNSENDABLE = _Verdict("bad_model_request", "was sent nothing: the call cannot be put on the wire", False)

# Every class of aiohttp's two exception trees, by what it means for a call. A test walks the trees and fails when a
# new aiohttp brings a class that is not here; at run time such a class is judged by its nearest known parent.
_BY_EXCEPTION: dict[type[BaseException], _Verdict] = {
    aiohttp.ClientConnectorError: _CONNECT,
    aiohttp.ClientConnectorDNSError: _CONNECT,
    aiohttp.ClientProxyConnectionError: _CONNECT,
    client_exceptions.UnixClientConnectorError: _CONNECT,
    aiohttp.ClientSSLError: _CONNECT,
    aiohttp.ClientConnectorSSLError: _CONNECT,
    aiohttp.ClientHttpProxyError: _CONNECT,
    aiohttp.ClientConnectorCertificateError: _TLS,
    aiohttp.ServerFingerprintMismatch: _TLS,
    aiohttp.ConnectionTimeoutError: _CONNECT_TIMEOUT,
    aiohttp.ServerTimeoutError: _READ_TIMEOUT,
    aiohttp.SocketTimeoutError: _READ_TIMEOUT,
    TimeoutError: _READ_TIMEOUT,
    aiohttp.ClientError: _CUT,
    aiohttp.ClientConnectionError: _CUT,
    aiohttp.ClientConnectionResetError: _CUT,
    aiohttp.ClientOSError: _CUT,
    aiohttp.ServerConnectionError: _CUT,
    aiohttp.ServerDisconnectedError: _CUT,
    aiohttp.ClientPayloadError: _CUT,
    aiohttp.UploadAbortedError: _CUT,
    OSError: _CUT,
    EOFError: _CUT,
    aiohttp.ClientResponseError: _BAD_RESPONSE,
    aiohttp.ContentTypeError: _BAD_RESPONSE,
    aiohttp.WSServerHandshakeError: _BAD_RESPONSE,
    http_exceptions.HttpProcessingError: _BAD_RESPONSE,
    http_exceptions.BadHttpMessage: _BAD_RESPONSE,
    http_exceptions.HttpBadRequest: _BAD_RESPONSE,
    http_exceptions.PayloadEncodingError: _BAD_RESPONSE,
    http_exceptions.ContentEncodingError: _BAD_RESPONSE,
    http_exceptions.TransferEncodingError: _BAD_RESPONSE,
    http_exceptions.ContentLengthError: _BAD_RESPONSE,
    http_exceptions.DecompressSizeError: _BAD_RESPONSE,
    http_exceptions.LineTooLong: _BAD_RESPONSE,
    http_exceptions.InvalidHeader: _BAD_RESPONSE,
    http_exceptions.BadStatusLine: _BAD_RESPONSE,
    http_exceptions.BadHttpMethod: _BAD_RESPONSE,
    http_exceptions.InvalidURLError: _BASE_URL,
    aiohttp.InvalidURL: _BASE_URL,
    aiohttp.InvalidUrlClientError: _BASE_URL,
    aiohttp.NonHttpUrlClientError: _BASE_URL,
    aiohttp.InvalidUrlRedirectClientError: _REDIRECT,
    aiohttp.NonHttpUrlRedirectClientError: _REDIRECT,
    aiohttp.RedirectClientError: _REDIRECT,
    aiohttp.TooManyRedirects: _REDIRECT,
    ValueError: _UNSENDABLE,  # a line break in a header, NaN in the body
}

FAILURES = (aiohttp.ClientError, http_exceptions.HttpProcessingError, OSError, EOFError, ValueError)
"""What a call through aiohttp may raise (``TimeoutError`` is an ``OSError``); all that ``from_exception`` takes."""


def from_exception(error: BaseException, *, where: str) -> ProviderError:
    """Translate what the HTTP library raised. Raise the result ``from None``: the original holds headers and key."""
    known = next(_BY_EXCEPTION[cls] for cls in type(error).__mro__ if cls in _BY_EXCEPTION)
    return _error(known, where, cause=type(error).__name__)


def from_status(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    where: str,
    private: Callable[[], Iterable[str]] = tuple,
    api_key: str = "",
    now: float | None = None,
) -> ProviderError:
    """Translate an answer that is not a success.

    ``private`` gives the texts that must not show in the message (the prompt). It is called only where the provider's
    words are of use. ``now`` is the epoch time an HTTP-date in Retry-After is compared to.
    """
    said = _said(body)
    verdict = _judge(status, said)
    detail = ""
    if verdict.code in {"bad_model_request", "context_too_long"}:
        said_openly = said.message.replace(api_key, "[key]") if api_key else said.message
        detail = _safe(said_openly, private())
    return _error(
        verdict,
        where,
        detail=detail,
        retry_after_s=retry_after_s(headers, time.time() if now is None else now) if verdict.retryable else None,
        status=status,
        provider_code=said.code or said.type,
        request_id=_identifier(headers.get("x-request-id") or headers.get("request-id")),
    )


def bad_response(why: str) -> ProviderError:
    """An answer that came through but does not fit the format. ``why`` is ours, never the provider's text."""
    return ProviderError(f"The model's answer cannot be read: {why}.", code="bad_response", retryable=True)


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds the provider asks us to wait: ``retry-after-ms``, or ``Retry-After`` in seconds or as an HTTP-date.

    Never negative, a day at most; None where it said nothing that can be understood.
    """
    wish = _number(headers.get("retry-after-ms"))
    if wish is not None:
        wish /= 1000
    elif "retry-after" in headers:
        text = headers["retry-after"]
        wish = _number(text)
        if wish is None:
            wish = _seconds_until(text, now)
    return None if wish is None else min(max(wish, 0.0), MAX_RETRY_AFTER_S)


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _seconds_until(text: str, now: float) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp() - now
    except (ValueError, OverflowError, OSError):
        return None


class _Said(NamedTuple):
    """What a provider's error body says; the first two are identifiers or empty."""

    type: str = ""
    code: str = ""
    message: str = ""


def _said(body: bytes) -> _Said:
    """Read ``{"error": {"type", "code", "message"}}`` (OpenAI, Anthropic) and the flat variants of other servers."""
    try:
        found: Any = json.loads(body.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return _Said()
    if isinstance(found, dict):
        found = found.get("error") or found
    if isinstance(found, str):
        return _Said(message=found)
    if not isinstance(found, dict):
        return _Said()
    message = found.get("message") or found.get("detail")
    return _Said(
        _identifier(found.get("type")), _identifier(found.get("code")), message if isinstance(message, str) else ""
    )


_IDENTIFIER = re.compile(r"[A-Za-z0-9_.:-]{1,80}")
_TOO_LONG_SAID = re.compile(
    r"prompt is too long|maximum context length|exceeds? (?:the )?(?:\w+ )?context|context (?:window|limit|length)"
    r"|(?:input|request) is too long|too many (?:input )?tokens",
    re.IGNORECASE,
)


def _identifier(value: Any) -> str:
    return value if isinstance(value, str) and _IDENTIFIER.fullmatch(value) else ""


def _judge(status: int, said: _Said) -> _Verdict:
    names = {said.type, said.code}
    if status < 500:
        if names & {"insufficient_quota", "billing_error"}:
            return _QUOTA
        if status in {400, 413, 422} and ("context_length_exceeded" in names or _TOO_LONG_SAID.search(said.message)):
            return _TOO_LONG
    return _BY_STATUS.get(status) or _BY_CLASS.get(status // 100) or _BAD_RESPONSE


_QUOTED = re.compile(r"(['\"`])(.+?)\1")
_SECRET = re.compile(r"\b(?:[sp]k|gsk|xai)[-_][\w*.-]{6,}|\bBearer \S+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")


def _safe(message: str, private: Iterable[str]) -> str:
    """The provider's sentence without key, control characters and anything of the prompt; "" if that fails."""
    text = _CONTROL.sub(" ", _SECRET.sub("[key]", message[: 2 * MAX_DETAIL])).strip()
    texts = [one for one in private if one]
    if _echoes(text, texts) or _echoes(_words(text), [_words(one) for one in texts]):
        return ""
    # A quoted value is the usual place where a provider repeats what it was sent.
    text = _QUOTED.sub(lambda q: q[0] if not any(q[2] in one for one in texts) else f"{q[1]}…{q[1]}", text)
    return text if len(text) <= MAX_DETAIL else text[: MAX_DETAIL - 1] + "…"


def _echoes(text: str, texts: Iterable[str]) -> bool:
    windows = {text[i : i + _ECHO] for i in range(len(text) - _ECHO + 1)}
    return any(window in one for one in texts for window in windows)


def _words(text: str) -> str:
    """The text without what escaping and quoting change."""
    return re.sub(r"\W+", " ", text).lower()


def _error(
    verdict: _Verdict, where: str, *, detail: str = "", retry_after_s: float | None = None, **details: Any
) -> ProviderError:
    message = f"{where} {verdict.sentence}" + (f": {detail.rstrip('.')}." if detail else ".")
    return ProviderError(
        message,
        code=verdict.code,
        hint=verdict.hint,
        retryable=verdict.retryable,
        retry_after_s=retry_after_s,
        **{name: value for name, value in details.items() if value != ""},
    )
