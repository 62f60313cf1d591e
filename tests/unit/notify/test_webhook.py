"""One try to deliver a webhook, against real servers on loopback."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import socket
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks.webhooks import Webhook

from agentq.notify.address import Guard, parse_networks
from agentq.notify.failure import NotDelivered
from agentq.notify.signature import parse_secrets
from agentq.notify.webhook import WebhookSender
from tests.unit.notify.receiver import Receiver, certificate, delivery, receiving

SECRET = "whsec_" + base64.b64encode(b"k" * 32).decode()
SECRETS = parse_secrets(json.dumps({"default": SECRET}))
LOOPBACK = Guard(parse_networks("127.0.0.0/8"))


def sender(guard: Guard = LOOPBACK, **options: Any) -> WebhookSender:
    return WebhookSender(SECRETS, guard, **options)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


async def failure(sender: WebhookSender, one: Any) -> NotDelivered:
    with pytest.raises(NotDelivered) as failed:
        await sender(one)
    return failed.value


async def test_the_receiver_can_verify_what_arrives_and_gets_ids_and_the_status(receiver: Receiver) -> None:
    await sender()(delivery(receiver.url("/hooks?token=1")))
    [(path, headers, body)] = receiver.got
    assert path == "/hooks"
    assert Webhook(SECRET).verify(body, headers) == {
        "type": "run.succeeded", "timestamp": "2026-01-01T00:00:00+00:00",
        "data": {"run_id": "r1", "status": "succeeded"},
    }  # fmt: skip
    assert headers["webhook-id"] == "r1:19b7:webhook"
    assert headers["content-type"] == "application/json"


async def test_every_try_has_the_same_id_and_body(receiver: Receiver) -> None:
    for attempts in (1, 2):
        await sender()(delivery(receiver.url(), attempts=attempts))
    (_, first, body), (_, second, again) = receiver.got
    assert (first["webhook-id"], body) == (second["webhook-id"], again)


async def test_a_redirect_is_a_failure_and_is_not_followed(receiver: Receiver) -> None:
    receiver.status, receiver.headers = 307, {"Location": receiver.url("/elsewhere")}
    failed = await failure(sender(), delivery(receiver.url()))
    assert (failed.code, failed.final) == ("http_307", False)
    assert [path for path, _, _ in receiver.got] == ["/hooks"]


@pytest.mark.parametrize(("status", "final"), [(500, False), (404, False), (429, False), (410, True)])
async def test_only_the_receivers_own_no_more_is_final(receiver: Receiver, status: int, final: bool) -> None:
    receiver.status = status
    failed = await failure(sender(), delivery(receiver.url()))
    assert (failed.code, failed.final, failed.retry_after_s) == (f"http_{status}", final, None)


async def test_the_receivers_wish_when_to_come_again_is_heard_within_limits(receiver: Receiver) -> None:
    receiver.status = 503
    soon = format_datetime(datetime.now(UTC) + timedelta(minutes=10), usegmt=True)
    for wish, least, most in (
        ("120", 120, 120), (soon, 550, 600), ("999999999", 21_600, 21_600), ("-5", None, None), ("later", None, None),
    ):  # fmt: skip
        receiver.headers = {"Retry-After": wish}
        heard = (await failure(sender(), delivery(receiver.url()))).retry_after_s
        assert heard == least if least is None or most is None else heard is not None and least <= heard <= most


async def test_a_receiver_that_does_not_answer_costs_its_time_and_no_more(receiver: Receiver) -> None:
    receiver.hang = True
    failed = await failure(sender(timeout_s=0.3), delivery(receiver.url()))
    assert (failed.code, failed.final) == ("timeout", False)


async def test_an_answer_without_end_is_not_read(receiver: Receiver) -> None:
    receiver.endless = True
    async with asyncio.timeout(5):
        await sender()(delivery(receiver.url()))


async def test_nobody_there_is_a_failure_that_may_pass(receiver: Receiver, unused_tcp_port: int) -> None:
    failed = await failure(sender(), delivery(f"http://127.0.0.1:{unused_tcp_port}/"))
    assert (failed.code, failed.final) == ("unreachable", False)


async def test_without_the_operators_leave_this_machine_is_never_called(receiver: Receiver) -> None:
    for url in (receiver.url(), receiver.url(host="localhost"), receiver.url(scheme="https")):
        failed = await failure(sender(Guard()), delivery(url))
        assert (failed.code, failed.final) == ("address_refused", True)
    assert receiver.got == []


@pytest.mark.parametrize(
    "host", ["127.1", "0x7f000001", "2130706433", "017700000001", "127.0.0.1.", "[::ffff:127.0.0.1]"]
)
async def test_no_odd_way_to_write_this_machine_gets_through(receiver: Receiver, host: str) -> None:
    failed = await failure(sender(Guard()), delivery(f"https://{host}:{receiver.port}/"))
    assert failed.code in {"address_refused", "unknown_host", "unreachable"}
    assert receiver.got == []


async def test_a_name_that_leads_inside_is_refused_and_nothing_is_sent(receiver: Receiver) -> None:
    async def inside(host: str) -> Sequence[str]:
        return ["8.8.8.8", "127.0.0.1"]

    failed = await failure(sender(Guard(), look_up=inside), delivery(receiver.url(host="shop.example", scheme="https")))
    assert (failed.code, failed.final) == ("address_refused", True)
    assert receiver.got == []


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
async def test_a_name_is_resolved_once_and_the_judged_address_gets_its_host_and_sni(tmp_path: Path) -> None:
    """A name that leads elsewhere at its second look-up gains nothing; and the certificate is checked against it."""
    looked_up: list[str] = []

    async def rebinding(host: str) -> Sequence[str]:
        looked_up.append(host)
        return ["127.0.0.1"] if len(looked_up) == 1 else ["169.254.169.254"]

    server, client = certificate(tmp_path, "shop.example")
    async with receiving(server) as receiver:
        url = receiver.url(host="shop.example", scheme="https")
        await sender(look_up=rebinding, tls=client)(delivery(url))
        assert looked_up == ["shop.example"]
        assert receiver.names == ["shop.example"]
        assert receiver.got[0][1]["host"] == f"shop.example:{receiver.port}"
        stranger = await failure(sender(), delivery(receiver.url(scheme="https")))
        assert (stranger.code, stranger.final) == ("bad_certificate", False)
        assert len(receiver.got) == 1


async def test_a_proxy_of_the_environment_is_not_used(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    await sender()(delivery(receiver.url()))
    assert len(receiver.got) == 1


async def test_a_name_nobody_knows_and_a_secret_nobody_set_may_come_to_be() -> None:
    async def nobody(host: str) -> Sequence[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    unknown = await failure(sender(look_up=nobody), delivery("https://nobody.invalid/"))
    assert (unknown.code, unknown.final) == ("unknown_host", False)
    too_long = await failure(sender(), delivery(f"https://{'x' * 70}.example/"))
    assert (too_long.code, too_long.final) == ("unknown_host", False)
    missing = await failure(
        sender(), delivery("https://127.0.0.1/", to={"url": "https://127.0.0.1/", "secret_id": "other"})
    )
    assert (missing.code, missing.final) == ("unknown_secret", False)


@pytest.mark.parametrize("host", ["10.0.0.1", "169.254.169.254", "[::1]"])
async def test_an_address_is_refused_for_good_though_there_is_no_secret(host: str) -> None:
    url = f"https://{host}/x"
    failed = await failure(sender(Guard()), delivery(url, to={"url": url, "secret_id": "other"}))
    assert (failed.code, failed.final) == ("address_refused", True)
