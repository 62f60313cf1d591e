"""One try to deliver a webhook: a signed POST to an address that was judged, with caps on time and size.

Redirects are not followed (they would lead past the judgement), proxies of the environment are not used, and nothing of
the answer's body is read. 2xx means that it arrived; everything else that it did not.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import cast

import aiohttp
from yarl import URL

from agentq.canonical import canonical_json
from agentq.notify.address import Guard, Lookup, Pinned, look_up
from agentq.notify.failure import NotDelivered
from agentq.notify.signature import DEFAULT_SECRET, Secrets, signature
from agentq.protocol import Webhook
from schemas.delivery import Delivery

TIMEOUT_S = 15.0
CONNECT_S = 5.0
GONE = 410  # Standard Webhooks: the receiver wants no more of them
LONGEST_WISH_S = 6 * 3600.0


def message(delivery: Delivery) -> bytes:
    """The body: the same bytes at every try."""
    return canonical_json(
        {"type": delivery["type"], "timestamp": delivery["created_at"].isoformat(), "data": delivery["data"]}
    ).encode()


class WebhookSender:
    """``await send(delivery)`` returns when the receiver has taken it. Raises ``NotDelivered``."""

    def __init__(
        self, secrets: Secrets, guard: Guard, *, look_up: Lookup = look_up, tls: ssl.SSLContext | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:  # fmt: skip
        self._secrets = secrets
        self._guard = guard
        self._look_up = look_up
        self._tls = tls or ssl.create_default_context()
        self._timeout_s = timeout_s

    async def __call__(self, delivery: Delivery) -> None:
        to = cast("Webhook", delivery["to"])
        try:
            async with asyncio.timeout(self._timeout_s):
                url = URL(to["url"])
                # Before the secret is looked for: that may come to be, an address that is refused stays so.
                addresses = await self._addresses(url)
                body = message(delivery)
                await self._post(url, addresses, self._headers(delivery, body), body)
        except TimeoutError:
            raise NotDelivered(f"No answer within {self._timeout_s:g} s.", code="timeout") from None
        except aiohttp.ClientConnectorCertificateError:
            raise NotDelivered("The receiver's certificate is not valid.", code="bad_certificate") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise NotDelivered(f"The receiver cannot be reached: {type(error).__name__}.", code="unreachable") from None

    def _headers(self, delivery: Delivery, body: bytes) -> dict[str, str]:
        to, now = cast("Webhook", delivery["to"]), int(datetime.now(UTC).timestamp())
        keys = self._secrets.of(delivery["tenant"], to.get("secret_id", DEFAULT_SECRET))
        return {
            "content-type": "application/json",
            "user-agent": "agentq-webhooks",
            "webhook-id": delivery["_id"],
            "webhook-timestamp": str(now),
            "webhook-signature": signature(keys, delivery["_id"], now, body),
        }

    async def _addresses(self, url: URL) -> Sequence[str]:
        """What the URL's host leads to, all of it judged."""
        host = url.raw_host or ""
        try:
            addresses = await self._look_up(host)
        except (OSError, UnicodeError):  # a label that is too long is the latter
            addresses = []
        if not addresses:
            raise NotDelivered("The receiver's name leads to no address.", code="unknown_host")
        self._guard.check(host, addresses, secure=url.scheme == "https")
        return addresses

    async def _post(self, url: URL, addresses: Sequence[str], headers: dict[str, str], body: bytes) -> None:
        connector = aiohttp.TCPConnector(
            resolver=Pinned(addresses), use_dns_cache=False, force_close=True, ssl=self._tls, limit=1
        )
        timeout = aiohttp.ClientTimeout(total=self._timeout_s, connect=CONNECT_S)
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()) as session,
            session.post(url, data=body, headers=headers, allow_redirects=False) as answer,
        ):
            if not 200 <= answer.status < 300:
                raise NotDelivered(
                    f"The receiver answered {answer.status}.", code=f"http_{answer.status}",
                    final=answer.status == GONE, retry_after_s=_wish_s(answer.headers.get("Retry-After")),
                )  # fmt: skip


def _wish_s(retry_after: str | None) -> float | None:
    """``Retry-After`` in seconds, six hours at most: seconds, or a date (RFC 9110, 10.2.3)."""
    if retry_after is None:
        return None
    try:
        if retry_after.isdecimal():
            wish = float(retry_after)
        else:
            wish = (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(wish, 0.0), LONGEST_WISH_S)
