"""Signatures by Standard Webhooks 1.0 (https://www.standardwebhooks.com): HMAC-SHA256 over id, time and body.

Receivers in any language verify them with that project's libraries. A secret is ``whsec_`` and 24 to 64 random bytes in
base64; two of them, separated by a blank, sign side by side while a receiver changes from the old one to the new.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
from collections.abc import Mapping, Sequence

from agentq.errors import ConfigError
from agentq.notify.failure import NotDelivered

PREFIX = "whsec_"
DEFAULT_SECRET = "default"  # noqa: S105 - its name
DEFAULT_TENANT = "default"
_NAMED = re.compile(r"(?:(?P<tenant>.+)/)?(?P<id>[A-Za-z0-9][A-Za-z0-9_.-]{0,63})")
_HINT = 'Write {"default": "whsec_...", "tenant/name": "whsec_..."}; make one with: openssl rand -base64 32'


def signature(keys: Sequence[bytes], webhook_id: str, timestamp: int, body: bytes) -> str:
    """The header ``webhook-signature``: one ``v1,`` signature for each key. ``timestamp``: epoch seconds."""
    signed = b".".join([webhook_id.encode(), str(timestamp).encode(), body])
    return " ".join(f"v1,{base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()}" for key in keys)


class Secrets:
    """The keys that sign, by tenant and name. A tenant can only use its own: with another's it could forge messages
    to that tenant's receivers. Shows none of them."""

    def __init__(self, keys: Mapping[tuple[str, str], Sequence[bytes]]) -> None:
        self._keys = dict(keys)

    def __repr__(self) -> str:
        return f"Secrets({sorted(self._keys)})"

    def of(self, tenant: str, name: str) -> Sequence[bytes]:
        """Raises ``NotDelivered`` where there is none; it may be there at the next try."""
        keys = self._keys.get((tenant, name))
        if keys is None:
            raise NotDelivered(f"There is no webhook secret {name!r} for tenant {tenant!r}.", code="unknown_secret")
        return keys


def parse_secrets(text: str) -> Secrets:
    """A JSON object from ``name`` (of the tenant ``default``) or ``tenant/name`` to one or two secrets.

    Raises ``ConfigError`` that quotes no secret.
    """
    try:
        found = json.loads(text)
    except ValueError:
        raise _wrong("it is not JSON") from None
    if not isinstance(found, dict):
        raise _wrong("it is not a JSON object")
    return Secrets(dict(_entry(name, value) for name, value in found.items()))


def _entry(name: str, value: object) -> tuple[tuple[str, str], list[bytes]]:
    named = _NAMED.fullmatch(name)
    if named is None:
        raise _wrong(f"{name[:80]!r} is no name of a secret")
    keys = [_key(part) for part in value.split()] if isinstance(value, str) else []
    if not keys or None in keys:
        raise _wrong(f"what {name!r} names is not whsec_ and 24 to 64 bytes in base64")
    return (named["tenant"] or DEFAULT_TENANT, named["id"]), [key for key in keys if key is not None]


def _key(secret: str) -> bytes | None:
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError):
        return None
    return key if secret.startswith(PREFIX) and 24 <= len(key) <= 64 else None


def _wrong(reason: str) -> ConfigError:
    return ConfigError(f"The webhook secrets are wrong: {reason}.", code="bad_webhook_secrets", hint=_HINT)
