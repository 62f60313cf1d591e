"""Status codes, Retry-After and library exceptions become ProviderErrors with stable codes."""

from __future__ import annotations

import json
from collections.abc import Iterator

import aiohttp
import pytest
from aiohttp import http_exceptions

from agentq.llm import errors

NOW = 1_795_000_000.0


def refused(status: int, error: object = None, headers: dict[str, str] | None = None, private=()):
    body = json.dumps({"error": error}).encode() if error is not None else b""
    return errors.from_status(status, headers or {}, body, where="openai at h:1", private=lambda: private, now=NOW)


@pytest.mark.parametrize(
    ("status", "code", "retryable"),
    [
        (301, "bad_model_request", False),
        (400, "bad_model_request", False),
        (401, "bad_credentials", False),
        (402, "quota_exhausted", False),
        (403, "bad_credentials", False),
        (404, "bad_model_request", False),
        (408, "provider_unavailable", True),
        (409, "provider_unavailable", True),
        (413, "context_too_long", False),
        (418, "bad_model_request", False),
        (422, "bad_model_request", False),
        (429, "rate_limited", True),
        (500, "provider_unavailable", True),
        (502, "provider_unavailable", True),
        (503, "provider_overloaded", True),
        (504, "provider_unavailable", True),
        (529, "provider_overloaded", True),
        (599, "provider_unavailable", True),
        (101, "bad_response", True),
    ],
)
def test_a_status_has_one_code(status, code, retryable):
    error = refused(status)
    assert (error.code, error.retryable, error.details["status"]) == (code, retryable, status)


@pytest.mark.parametrize(
    ("status", "said", "code"),
    [
        (400, {"code": "context_length_exceeded", "message": "too much"}, "context_too_long"),
        (400, {"message": "This model's maximum context length is 8192 tokens."}, "context_too_long"),
        (400, {"type": "invalid_request_error", "message": "prompt is too long: 9 tokens > 8"}, "context_too_long"),
        (400, {"message": "input length and `max_tokens` exceed context limit: 9 + 1 > 8"}, "context_too_long"),
        (422, "Input is too long for this model", "context_too_long"),
        (429, {"code": "insufficient_quota", "type": "insufficient_quota"}, "quota_exhausted"),
        (400, {"type": "billing_error"}, "quota_exhausted"),
        (500, {"message": "prompt is too long"}, "provider_unavailable"),
    ],
)
def test_what_the_provider_says_decides_where_the_status_does_not(status, said, code):
    assert refused(status, said).code == code


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "1e9"}, 86_400.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "Wed, 18 Nov 2026 09:06:50 GMT"}, 10.0),
        ({"retry-after": "Wed, 18 Nov 2020 09:06:50 GMT"}, 0.0),
        ({"retry-after": "Wed, 99 Nov 2026"}, None),
    ],
)
def test_the_providers_wish_to_wait(headers, seconds):
    assert errors.retry_after_s(headers, now=1_794_992_800.0) == seconds
    assert refused(429, headers={"retry-after": "7"}).retry_after_s == 7.0


def test_nobody_waits_for_what_cannot_succeed():
    assert refused(400, headers={"retry-after": "7"}).retry_after_s is None


def test_the_message_says_who_and_why_and_what_to_do():
    error = refused(404, {"message": "The model `m-9` does not exist.", "code": "model_not_found"},
                    {"x-request-id": "req_1"})  # fmt: skip
    assert str(error) == (
        "openai at h:1 refused the request: The model `m-9` does not exist. Check the model's settings."
    )
    assert error.details == {"status": 404, "provider_code": "model_not_found", "request_id": "req_1"}


PROMPT = "My name is Ada Lovelace and my card is 4111 1111 1111 1111."


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (f"Cannot parse: {PROMPT}", ""),
        ("Cannot parse: MY  NAME\u00a0is: 'Ada'/(Lovelace)", ""),
        ("Cannot parse 'Ada' here", "Cannot parse '…' here"),
        ("Wrong key sk-proj-abcdef0123456789 given", "Wrong key [key] given"),
        ("two\nlines\x1b[31m", "two lines [31m"),
        ("word " * 100, ("word " * 100)[: errors.MAX_DETAIL - 1] + "…"),
    ],
)
def test_the_message_repeats_neither_prompt_nor_key_nor_control_characters(said, shown):
    detail = str(refused(400, {"message": said}, private=[PROMPT])).removesuffix(" Check the model's settings.")
    assert detail == "openai at h:1 refused the request" + (f": {shown}." if shown else ".")


@pytest.mark.parametrize("key", ["hunter2", "hunter2hunter2hunter2", "sk-1"])
def test_the_configured_key_is_never_shown_whatever_it_looks_like(key):
    body = json.dumps({"error": {"message": f"bad header {key}!"}}).encode()
    error = errors.from_status(400, {}, body, where="w", api_key=key)
    assert key not in str(error)
    assert "bad header [key]!" in str(error)


def test_codes_of_the_provider_are_kept_only_if_they_are_identifiers():
    assert "provider_code" not in refused(400, {"code": "Ada Lovelace said"}).details
    assert "provider_code" not in refused(400, {"code": {"a": 1}}).details


def tree(root: type[BaseException]) -> Iterator[type[BaseException]]:
    yield root
    for child in root.__subclasses__():
        if child.__module__.startswith("aiohttp."):
            yield from tree(child)


AIOHTTP = sorted({*tree(aiohttp.ClientError), *tree(http_exceptions.HttpProcessingError)}, key=lambda cls: cls.__name__)


def test_the_walk_finds_aiohttps_exceptions():
    assert len(AIOHTTP) > 30


@pytest.mark.parametrize("cls", AIOHTTP, ids=lambda cls: cls.__name__)
def test_every_exception_class_of_aiohttp_has_been_judged(cls):
    """Fails when a new aiohttp raises something new: add it to the table of agentq.llm.errors."""
    assert cls in errors._BY_EXCEPTION
    assert issubclass(cls, errors.FAILURES), "the transport would let it through"


@pytest.mark.parametrize("cls", errors._BY_EXCEPTION, ids=lambda cls: cls.__name__)
def test_every_judged_exception_becomes_a_documented_provider_error(cls):
    error = errors.from_exception(cls.__new__(cls), where="openai at h:1")
    assert f"    {error.code} " in (errors.__doc__ or "")
    assert error.details["cause"] == cls.__name__
    assert str(error).startswith("openai at h:1 ")


def test_an_exception_nobody_knows_is_judged_by_its_parent():
    class Newer(aiohttp.ServerDisconnectedError):
        pass

    assert errors.from_exception(Newer("secret"), where="w").code == "response_cut"
    assert "secret" not in str(errors.from_exception(Newer("secret"), where="w"))
    assert errors.from_exception(ConnectionResetError(), where="w").code == "response_cut"
    assert errors.from_exception(UnicodeEncodeError("utf-8", "x", 0, 1, "y"), where="w").code == "bad_model_request"
