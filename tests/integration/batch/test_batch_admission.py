"""The real admission and batches: it lets in what a batch's room allows, and a closed batch holds nobody up."""

from __future__ import annotations

from typing import Any

from agentq.protocol import Request
from agentq.run import new_run, new_run_id
from agentq.runtime.admission import Admission
from schemas.batch import BatchDoc, flow
from tests.integration.batch.conftest import BUNDLE, Yard, lines


def admission(yard: Yard, window: int = 256) -> Admission:
    async def publish(hints: Any) -> None:
        """Nobody listens."""

    async def queues() -> dict[Any, Any]:
        return {}

    return Admission(yard.store.backlog, queues, publish, name="a", window=window, room=yard.batches.room)


async def in_flight(yard: Yard, batch: BatchDoc) -> list[int]:
    flying = yard.store.runs.find({"in_flight": True, "batch.id": batch["_id"]})
    return sorted([run["batch"]["line"] async for run in flying])


async def tick(yard: Yard, leader: Admission) -> None:
    assert await leader._lead()
    await leader.tick()


async def test_lines_are_admitted_in_their_order_as_far_as_the_pool_has_room(yard: Yard) -> None:
    batch = (await yard.submit(lines(300))).batch
    leader = admission(yard, window=20)
    await tick(yard, leader)
    first = await in_flight(yard, batch)
    assert first
    assert first == list(range(1, len(first) + 1))
    assert len(first) < 300
    await yard.run(batch, 1)  # validates as it is in flight
    await yard.end(batch, first)
    await tick(yard, leader)
    assert (await in_flight(yard, batch))[0] == len(first) + 1


async def test_a_closed_batch_is_not_touched_and_others_go_on(yard: Yard) -> None:
    closed = (await yard.submit(lines(300))).batch
    await yard.batches.pause(closed["_id"], {"by": "person", "at": yard.store.now()})
    other = (await yard.submit(lines(5), again="x")).batch
    request = Request(input="hello", priority="batch")
    single = new_run(request, BUNDLE.registered(), run_id=new_run_id(), now=yard.store.now(), waits=True)
    await yard.store.runs.insert_one(dict(single))
    await tick(yard, admission(yard))
    assert await in_flight(yard, closed) == []
    assert await in_flight(yard, other) == [1, 2, 3, 4, 5]
    alone = await yard.store.load(single["_id"])
    assert alone is not None
    assert alone["in_flight"]
    assert (await yard.run(closed, 1))["steps"]["s1"]["hints"] == 0


async def test_a_budget_holds_with_the_real_admission(yard: Yard) -> None:
    """What is booked and what is set aside for lines under way never exceeds it, tick by tick."""
    batch = (await yard.submit(lines(40), budget_nano_usd=100)).batch
    leader = admission(yard)
    for _ in range(40):
        await tick(yard, leader)
        flying = await in_flight(yard, batch)
        now = await yard.batch(batch["_id"])
        assert now["cost_nano_usd"] + 9 * len(flying) <= 100
        await yard.end(batch, flying[:3], cost=9)
        await tick(yard, leader)
        await yard.keeper.tick()
    stopped = await yard.batch(batch["_id"])
    assert (stopped["cost_nano_usd"], stopped["paused"] and stopped["paused"]["by"]) == (99, "budget")


async def test_the_rooms_of_many_budgeted_batches_are_known_by_four_questions(yard: Yard) -> None:
    batches = [
        (await yard.submit(lines(12), again=f"b{index}", budget_nano_usd=90 + index)).batch for index in range(6)
    ]
    for batch in batches:
        await yard.end(batch, (await yard.admit(batch, 1)), cost=9)
    await yard.keeper.tick()
    known = {"runs": 9, "p50_nano_usd": 9, "p90_nano_usd": 9}
    await yard.batches._batches.update_many({}, {"$set": {"estimate": known}})
    under_way = {batch["_id"]: len(await yard.admit(batch, index)) for index, batch in enumerate(batches)}
    asked, answer = 0, yard.batches._answer

    async def count(question: Any) -> Any:
        nonlocal asked
        asked += 1
        return await answer(question)

    yard.batches._answer = count
    room = await yard.batches.room()
    assert asked <= 6  # an aggregation is two: to begin and to read it
    left = {batch["_id"]: (90 + index - 9) // 9 - under_way[batch["_id"]] for index, batch in enumerate(batches)}
    assert room == {flow(batch["tenant"], batch["_id"]): left[batch["_id"]] for batch in batches}
