"""Stopping: a cancelled run's model call is cut and booked, a worker that stops hands back what it has not begun."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agentq.errors import Unavailable
from agentq.protocol import POOLS
from agentq.runtime.leases import LeaseKeeper
from agentq.runtime.runtime import Limits, Runtime
from agentq.testing import Held, ScriptedLlm
from tests.unit.runtime.world import World

ROUTE = '{"route": "billing", "reason": "it is about money"}'
ACCEPT = '{"verdict": "accept", "problems": []}'


def worker(world: World, keeper: LeaseKeeper, **limits: Any) -> Runtime:
    return Runtime(
        world.store, world.llm, world.toolbox, world.publish, pools=POOLS, worker="w", keeper=keeper,
        limits=Limits(**limits),
    )  # fmt: skip


async def test_the_model_call_of_a_cancelled_run_is_cut_and_its_input_booked() -> None:
    held = Held("too late")
    world = World(ScriptedLlm([ROUTE, held]))
    seconds = [0.0]
    keeper = LeaseKeeper(30_000, monotonic=lambda: seconds[0])
    runtime = worker(world, keeper)
    world.submit()
    pool, hint = world.hints.pop()
    working = asyncio.create_task(runtime.handle(pool, [hint]))
    await held.started.wait()
    world.store.runs["r1"] |= {"cancel": {"reason": "enough", "at": world.time}, "next_due": world.time}
    await keeper.watch(world.store, runtime.cut)
    assert not held.cancelled.is_set(), "most steps are over soon; only longer ones are asked about"
    seconds[0] = 0.5
    await keeper.watch(world.store, runtime.cut)
    await working
    assert held.cancelled.is_set()
    await world.scheduler().tick()
    run = world.run()
    assert run["status"] == "cancelled"
    assert run["waste"]["cut_calls"] == 1
    assert run["waste"]["cost_nano_usd"] > 0
    assert run["usage"]["llm_calls"] == 1
    assert runtime.report()["in_flight"] == 0


async def test_what_was_spent_in_vain_is_booked_once_though_mongodb_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Away the first time; the second time it was written and the answer was lost. It was given up before."""
    monkeypatch.setattr("agentq.runtime.runtime.OUTAGE_PAUSE_S", 0.0)
    held = Held("too late")
    world = World(ScriptedLlm([ROUTE, held]))
    runtime = worker(world, LeaseKeeper(30_000))
    book, tries = world.store.book_waste, []

    async def flaky(*spent: Any) -> None:
        tries.append(spent)
        if len(tries) > 1:
            await book(*spent)
        if len(tries) < 3:
            raise Unavailable("MongoDB does not answer.")

    monkeypatch.setattr(world.store, "book_waste", flaky)
    world.submit()
    pool, hint = world.hints.pop()
    working = asyncio.create_task(runtime.handle(pool, [hint]))
    await held.started.wait()
    world.store.runs["r1"] |= {"cancel": {"reason": "enough", "at": world.time}, "next_due": world.time}
    runtime.cut("r1")
    await working
    assert len(tries) == 3
    assert world.run()["waste"] == {"cut_calls": 1, "cost_nano_usd": tries[0][2]["cost_nano_usd"]}


async def test_a_run_that_goes_on_is_not_cut() -> None:
    held = Held("done")
    world = World(ScriptedLlm([ROUTE, held, ACCEPT]))
    keeper = LeaseKeeper(30_000, monotonic=lambda: 0.0)
    runtime = worker(world, keeper)
    world.submit()
    pool, hint = world.hints.pop()
    working = asyncio.create_task(runtime.handle(pool, [hint]))
    await held.started.wait()
    await keeper.watch(world.store, runtime.cut)
    runtime.cut("another")
    held.release()
    await working
    assert world.run()["status"] == "succeeded"
    assert world.run()["waste"] == {}


async def test_a_worker_that_stops_hands_back_at_once_what_it_has_not_begun() -> None:
    """One slot, three runs: the first is worked on, the hints of the others go back to the broker."""
    held = Held(ROUTE)
    world = World(ScriptedLlm([held]))
    runtime = worker(world, LeaseKeeper(30_000, monotonic=lambda: 0.0), steps_in_flight=1)
    hints = []
    for run_id in ("r1", "r2", "r3"):
        world.submit(run_id=run_id)
        hints.append(world.hints.pop()[1])
    working = asyncio.create_task(runtime.handle("router", hints))
    await held.started.wait()
    assert runtime.report()["waiting"] == 2
    runtime.drain()
    while len(world.hints) < 2:  # noqa: ASYNC110 - the state that is waited for
        await asyncio.sleep(0)
    assert {hint.run_id for _, hint in world.hints} == {"r2", "r3"}
    assert not working.done()
    held.release()
    await working
    assert {hint.run_id for _, hint in world.hints} == {"r1", "r2", "r3"}, "what follows goes to other workers, too"
    assert world.run("r1")["status"] == "running"


async def test_a_worker_out_of_time_cuts_its_calls_and_others_repeat_them() -> None:
    held = Held("too late")
    world = World(ScriptedLlm([ROUTE, held, "There.", ACCEPT]))
    runtime = worker(world, LeaseKeeper(30_000, monotonic=lambda: 0.0))
    world.submit()
    pool, hint = world.hints.pop()
    working = asyncio.create_task(runtime.handle(pool, [hint]))
    await held.started.wait()
    runtime.drain()
    runtime.cut()
    await working
    assert world.run()["leases"] == {}
    assert world.run()["steps"]["s2"]["attempt"] == 2
    await world.run_all()
    assert world.run()["status"] == "succeeded"
    assert world.run()["waste"]["cut_calls"] == 1
