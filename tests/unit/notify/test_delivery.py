"""Who is told what of an end, and when it is tried again."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from agentq.engine.delivery import MAX_ATTEMPTS, of_run, receiver, retry_delay_s
from agentq.errors import InvalidRequest
from agentq.protocol import parse_request
from agentq.testing import ScriptedLlm
from schemas.delivery import DELIVERY
from tests.unit.runtime.world import World

HOOK = {"url": "https://shop.example/hooks?token=s3cret"}
TASK = {"task": "shop.on_answer", "queue": "shop"}


async def ended(**fields: Any) -> World:
    """A world in which the run r1 was cancelled before it began."""
    world = World(ScriptedLlm([]))
    world.submit(text="My name is Canary.", **fields)
    world.hints.clear()
    world.store.runs["r1"]["cancel"] = {"reason": "enough", "at": world.time}
    world.store.runs["r1"]["next_due"] = world.time
    await world.run_all()
    assert world.run()["status"] == "cancelled"
    return world


async def test_the_end_of_a_run_makes_a_delivery_for_everybody_it_names() -> None:
    world = await ended(webhook=HOOK, follow_up=TASK)
    made = sorted(world.store.deliveries.values(), key=lambda one: one["kind"])
    assert [one["kind"] for one in made] == ["follow_up", "webhook"]
    for one in made:
        DELIVERY.validate_python(one)
        assert (one["subject"], one["type"], one["status"]) == ("r1", "run.cancelled", "pending")
        assert one["not_before"] == world.run()["ended_at"], "it is due at once"
        assert one["data"]["run_id"] == "r1"
        assert "Canary" not in repr(one), "ids and the status, no text"
    assert [receiver(one) for one in made] == ["shop.on_answer on shop", "https://shop.example/hooks"]


async def test_a_run_that_names_nobody_makes_none() -> None:
    assert (await ended()).store.deliveries == {}


async def test_telling_it_again_makes_the_same_deliveries_and_another_end_others() -> None:
    world = await ended(webhook=HOOK)
    run = world.run()
    assert [one["_id"] for one in of_run(run)] == list(world.store.deliveries)
    again = {**run, "ended_at": run["ended_at"] + timedelta(hours=1), "status": "succeeded"}  # type: ignore[operator]
    assert of_run(again)[0]["_id"] not in world.store.deliveries  # type: ignore[arg-type]


def test_tries_spread_over_about_a_day_and_then_end() -> None:
    delays = [retry_delay_s(attempts, 0.5) for attempts in range(1, MAX_ATTEMPTS)]
    assert all(one is not None for one in delays)
    assert delays == sorted(delays)  # type: ignore[type-var]
    assert timedelta(hours=20) < timedelta(seconds=sum(one or 0 for one in delays)) < timedelta(hours=30)
    assert retry_delay_s(MAX_ATTEMPTS, 0.5) is None
    assert retry_delay_s(1, 0.0) != retry_delay_s(1, 1.0), "what failed together does not come back together"


def request(**fields: Any) -> dict[str, Any]:
    return {"input": "x", **fields}


def hook(url: Any, **more: Any) -> dict[str, Any]:
    return request(webhook={"url": url, **more})


def task(name: Any, queue: Any) -> dict[str, Any]:
    return request(follow_up={"task": name, "queue": queue})


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (hook("http://shop.example/"), "invalid_value"),
        (hook("http://localhost.shop.example/"), "invalid_value"),
        (hook("ftp://shop.example/"), "invalid_value"),
        (hook("file:///etc/passwd"), "invalid_value"),
        (hook("https://user:word@shop.example/"), "invalid_value"),
        (hook("https://shop.example/#part"), "invalid_value"),
        (hook("https:///hooks"), "invalid_value"),
        (hook("https://shop.example:99999/"), "invalid_value"),
        (hook("https://169.254.169.254/latest"), "invalid_value"),
        (hook("https://[fe80::1]/"), "invalid_value"),
        (hook("https://shop.example/\r\nX-Evil: 1"), "invalid_value"),
        (hook("https://[::1"), "invalid_value"),
        (hook("https://shöp.example/"), "invalid_value"),
        (hook("https://shop.example/" + "x" * 2048), "invalid_value"),
        (hook(5), "wrong_type"),
        (request(webhook="https://shop.example/"), "wrong_type"),
        (request(webhook={}), "missing_field"),
        (hook("https://shop.example/", secret="whsec_"), "unknown_field"),
        (hook("https://shop.example/", secret_id="other/tenant"), "invalid_value"),
        (task("shop.on_answer", "agentq"), "invalid_value"),
        (task("shop.on_answer", "agentq.epoch"), "invalid_value"),
        (task("shop.on_answer", "specialist"), "invalid_value"),
        (task("shop.on_answer", "unacked_index"), "invalid_value"),
        (task("shop.on_answer", "celery@host.celery.pidbox"), "invalid_value"),
        (task("shop.on_answer", "_kombu.binding.celery"), "invalid_value"),
        (task("on answer", "shop"), "invalid_value"),
        (request(follow_up={"task": "shop.on_answer"}), "missing_field"),
        (request(webhook=HOOK, conversation="c", conversation_policy="merge"), "invalid_value"),
    ],
)
def test_a_receiver_that_cannot_be_right_is_refused_at_once(body: dict[str, Any], code: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_request(body)
    assert refused.value.code == code
    assert refused.value.hint


@pytest.mark.parametrize("url", ["http://localhost:8000/x", "http://127.0.0.1/", "http://[::1]:80/", HOOK["url"]])
def test_https_and_this_machine_are_accepted(url: str) -> None:
    assert parse_request(hook(url, secret_id="main")).notify == {"webhook": {"url": url, "secret_id": "main"}}


def test_a_request_that_names_nobody_is_the_same_as_before_there_were_notifications() -> None:
    """An idempotency key of an older version still belongs to the same request."""
    plain, told = parse_request(request()), parse_request(request(follow_up=TASK))
    assert plain.fingerprint == parse_request(request(webhook=None, follow_up=None)).fingerprint
    assert plain.fingerprint != told.fingerprint
