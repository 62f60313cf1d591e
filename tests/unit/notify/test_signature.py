"""Signatures that the project of the standard itself accepts."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime

import pytest
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from agentq.errors import ConfigError
from agentq.notify.failure import NotDelivered
from agentq.notify.signature import parse_secrets, signature

OLD = "whsec_" + base64.b64encode(b"o" * 32).decode()
NEW = "whsec_" + base64.b64encode(b"n" * 24).decode()
BODY = json.dumps({"type": "run.succeeded"}).encode()


def headers(secrets: str, body: bytes = BODY) -> dict[str, str]:
    keys = parse_secrets(json.dumps({"default": secrets})).of("default", "default")
    now = int(datetime.now(UTC).timestamp())
    return {
        "webhook-id": "r1:webhook", "webhook-timestamp": str(now),
        "webhook-signature": signature(keys, "r1:webhook", now, body),
    }  # fmt: skip


def test_the_official_library_verifies_what_we_sign() -> None:
    assert Webhook(OLD).verify(BODY, headers(OLD)) == {"type": "run.succeeded"}


def test_it_refuses_a_body_that_was_changed_and_another_secret() -> None:
    with pytest.raises(WebhookVerificationError):
        Webhook(OLD).verify(BODY + b" ", headers(OLD))
    with pytest.raises(WebhookVerificationError):
        Webhook(NEW).verify(BODY, headers(OLD))


def test_while_a_secret_is_changed_both_verify() -> None:
    signed = headers(f"{NEW} {OLD}")
    for secret in (OLD, NEW):
        assert Webhook(secret).verify(BODY, signed) == {"type": "run.succeeded"}


def test_the_example_of_the_standard_gives_its_signature() -> None:
    """The vector that the libraries of the standard test themselves with."""
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    given = signature([key], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert given == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_tenant_gets_its_own_secrets_only() -> None:
    """With another's it could sign what that one's receivers believe."""
    secrets = parse_secrets(json.dumps({"default": OLD, "acme/main": NEW}))
    assert secrets.of("acme", "main") == [b"n" * 24]
    for tenant, name in (("acme", "default"), ("default", "main"), ("default", "acme/main")):
        with pytest.raises(NotDelivered) as missing:
            secrets.of(tenant, name)
        assert missing.value.code == "unknown_secret"
        assert not missing.value.final, "the operator may be about to add it"
    assert "nnn" not in repr(secrets)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", '{"default": 5}', '{"default": ""}', '{"default": "secret"}', '{"default": "whsec_short"}',
        '{"de fault": "whsec_%s"}' % ("A" * 44), '{"default": "whsec_%s !"}' % ("A" * 44),
    ],
)  # fmt: skip
def test_secrets_that_are_none_are_refused_without_being_quoted(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_secrets(text)
    assert refused.value.code == "bad_webhook_secrets"
    assert "openssl rand" in refused.value.hint
    assert "AAAA" not in str(refused.value)
