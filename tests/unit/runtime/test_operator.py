"""Operators at work on runs of the real engine and runtime, over the in-memory store."""

from __future__ import annotations

import copy
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest

from agentq.engine import advance
from agentq.engine.commit import plan
from agentq.engine.edits import Edits
from agentq.engine.replay import agrees
from agentq.errors import Conflict, InvalidRequest, NotFound, ProviderError, Unavailable
from agentq.run import rejected_run
from agentq.runtime.operator import Operator, affected, retry_many
from agentq.store.api import Letters, Verdict
from agentq.testing import ScriptedLlm, calls_tool, says
from schemas.run import RunDoc
from tests.unit.runtime.world import World

ROUTE = '{"route": "billing", "reason": "it is about money"}'
ACCEPT = '{"verdict": "accept", "problems": []}'
GONE = ProviderError("no such model", code="model_gone", retryable=False)
ALL = ("quarantined", "held", "rejected")


def operator(world: World) -> Operator:
    return Operator(world.store, "eve")


async def failed(*, then: tuple[Any, ...] = (), **fields: Any) -> World:
    """A run whose second turn failed for good; ``then`` is what the models say afterwards."""
    world = World(ScriptedLlm([ROUTE, calls_tool("look_up", {"order": "17"}), GONE, *then]))
    world.submit(**fields)
    await world.run_all()
    assert world.run()["status"] == "failed"
    return world


async def test_a_redriven_run_ends_well_and_its_audit_tells_by_whom() -> None:
    world = await failed(then=(says("Shipped."), ACCEPT))
    await operator(world).retry("r1")
    await world.run_all()
    run = world.run()
    assert (run["status"], run["usage"]["tool_calls"]) == ("succeeded", 1)
    events = world.events()
    assert events[events.index("run.failed") + 1] == "run.redriven"
    assert run["events"] == []
    assert agrees(world.store.bundles, run)
    told = next(event for event in world.store.audit.values() if event["type"] == "run.redriven")
    assert told["data"]["by"] == "eve"


async def test_a_worker_that_slept_through_failure_and_redrive_changes_nothing() -> None:
    """It settles and commits with what it knew: neither the new events nor the new state are touched."""
    world = await failed()
    before = copy.deepcopy(world.store.runs["r1"])
    await operator(world).retry("r1")
    redriven = copy.deepcopy(world.store.runs["r1"])
    await world.store.settle(before)
    ended = plan(redriven, advance.cancel(redriven, 1), now=world.time)
    assert await world.store.commit(ended) is Verdict.APPLIED
    await world.store.settle(before)
    assert world.store.runs["r1"]["events"], "the events of the second end are not copied yet"
    step_id = next(iter(redriven["steps"]))
    late = plan(before, advance.cancel(before, 1), now=world.time, step_id=step_id, token="t1")
    assert await world.store.commit(late) is Verdict.FENCED


async def test_edited_arguments_must_fit_the_tool() -> None:
    broken = ProviderError("x", code="x", retryable=False)
    world = World(ScriptedLlm([ROUTE, calls_tool("look_up", {"order": "17"}), says("ok"), ACCEPT]))
    world.submit()
    run = await _stopped_at_its_tool(world)
    kept = advance.quarantine(run, "s3", broken.code, "no", 1)
    await world.store.commit(plan(run, kept, now=world.time))
    with pytest.raises(InvalidRequest, match="order"):
        await operator(world).retry("r1", Edits(payload={"order": 17}))
    assert world.run()["status"] == "failed"
    await operator(world).retry("r1", Edits(payload={"order": "18"}))
    await world.run_all()
    assert world.run()["status"] == "succeeded"
    assert '"18"' in world.llm.calls[2].messages[-1]["content"]


async def _stopped_at_its_tool(world: World) -> RunDoc:
    """Worked on until its tool step is open, and no further."""
    world.inline = False
    worker = world.worker()
    while world.hints and world.hints[0][0] != "tools":
        pool, hint = world.hints.pop(0)
        await worker.handle(pool, [hint])
    world.hints.clear()
    return world.store.runs["r1"]


async def test_a_new_version_is_known_and_not_current() -> None:
    world = await failed(then=(says("Shipped."), ACCEPT))
    await world.store.register([world.bundle])
    await operator(world).retry("r1", Edits(prompt="Be brief.", limits={"max_turns": "3"}))
    await world.run_all()
    assert world.run()["status"] == "succeeded"
    assert world.run()["workflow"]["hash"] != world.bundle.hash
    assert world.store.current_hashes == {"default": world.bundle.hash}
    assert "Be brief." in world.llm.calls[-2].messages[0]["content"]
    assert agrees(world.store.bundles, world.run())


async def test_dead_letters_are_listed_by_kind_and_filter_until_somebody_takes_care() -> None:
    world = await failed(tenant="acme")
    refusal = InvalidRequest("The input is empty.", code="empty_input")
    kept = {"code": "empty_input", "bytes": 2, "sha256": "x", "body": "{}"}
    refused = rejected_run(refusal, run_id="r2", now=world.time, facts={}, refused=kept)
    await world.store.record(refused)  # type: ignore[arg-type]
    eve = operator(world)
    both = await eve.dead_letters(ALL, Letters(), 10)
    assert [(kind, run["_id"]) for kind, run in both] == [("quarantined", "r1"), ("rejected", "r2")]
    assert [affected(kind, run)[0] for kind, run in both] == ["model_gone", "empty_input"]
    assert await eve.dead_letters(ALL, Letters(tenant="other"), 10) == []
    assert len(await eve.dead_letters(ALL, Letters(code="model_gone"), 10)) == 1
    assert len(await eve.dead_letters(ALL, Letters(since=world.time), 10)) == 2
    assert await eve.dead_letters(ALL, Letters(since=world.time + timedelta(seconds=1)), 10) == []
    await eve.drop("r1", "known")
    await eve.handed_in_again("r2", "r3", edited=True)
    assert await eve.dead_letters(ALL, Letters(), 10) == []
    await world.run_all()
    assert world.events()[-1] == "run.dropped"
    assert world.events("r2") == ["run.rejected", "run.handed_in_again"]


@pytest.mark.parametrize("happened", [True, False])
async def test_a_held_step_is_listed_and_a_person_decides(happened: bool) -> None:
    world = World(ScriptedLlm([ROUTE, calls_tool("post", {"text": "x"}), says("Done."), ACCEPT]))
    world.submit()
    run = await _stopped_at_its_tool(world)
    run["leases"] = {"s3": {"token": "dead", "worker": "w", "ms": 1, "at": world.time}}
    await world.store.commit(plan(run, advance.lost(run, "s3", 5, 1), now=world.time))
    eve = operator(world)
    assert [kind for kind, _ in await eve.dead_letters(ALL, Letters(), 10)] == ["held"]
    assert (await eve.stuck(10))[0][0][1].why.startswith("step s3 (post) waits for a person")
    with pytest.raises(Conflict, match="as it is"):
        await eve.retry("r1", Edits(prompt="x"))
    if happened:
        await eve.resolve("r1", None, "posted on Monday")
    else:
        await eve.retry("r1")
    await world.run_all()
    assert world.run()["status"] == "succeeded"
    assert len(world.shop.posts) == (0 if happened else 1)
    assert agrees(world.store.bundles, world.run())


@pytest.mark.parametrize("inline", [True, False])
async def test_a_paused_run_stands_still_whatever_comes_and_ends_when_resumed(inline: bool) -> None:
    """Hints of before are no claims, nothing is done in place, no deadline passes, the scheduler leaves it alone."""
    llm = ScriptedLlm([ROUTE, says("Shipped."), ACCEPT])
    world = World(llm, inline=inline)
    world.submit()
    eve = operator(world)
    await eve.pause("r1", "the shop is down")
    await world.run_all(hours=0.5)
    assert (world.run()["status"], len(llm.calls)) == ("paused", 0)
    await eve.resume("r1")
    await world.run_all()
    assert world.run()["status"] == "succeeded"
    assert world.events()[1:3] == ["run.paused", "run.resumed"]


async def test_a_step_that_ends_after_a_pause_is_kept_and_nothing_follows_it() -> None:
    """The pause comes while the model thinks: the worker meets it in its commit and goes on with nothing in place."""

    class Pausing(ScriptedLlm):
        async def complete(self, call: Any) -> Any:
            reply = await super().complete(call)
            if len(self.calls) == 1:
                await eve.pause("r1", "")
            return reply

    world = World(Pausing([ROUTE, says("Shipped."), ACCEPT]))
    eve = operator(world)
    world.submit()
    await world.deliver()
    run = world.run()
    assert (run["status"], sorted(run["steps"]), run["leases"], world.hints) == ("paused", ["s2"], {}, [])
    assert run["state"] is not None
    assert run["state"]["route"] == "billing"
    await eve.resume("r1")
    await world.run_all()
    assert world.run()["status"] == "succeeded"
    assert agrees(world.store.bundles, world.run())


async def test_a_fork_runs_beside_its_original_which_stays_as_it_is() -> None:
    world = World(ScriptedLlm([ROUTE, calls_tool("look_up", {"order": "1"}), says("a"), ACCEPT, says("b"), ACCEPT]))
    world.submit()
    await world.run_all()
    before = copy.deepcopy(world.store.runs["r1"])
    made = await operator(world).fork("r1", "s4", Edits(prompt="Be brief."))
    await world.run_all()
    run = world.run(made.run["_id"])
    assert run["status"] == "succeeded"
    assert run["result"] is not None
    assert (run["result"]["answer"], run["result"]["tools"], run["usage"]["llm_calls"]) == ("b", ["look_up"], 2)
    assert world.events(made.run["_id"])[0] == "run.forked"
    assert world.store.runs["r1"] == before
    assert agrees(world.store.bundles, run)


async def test_after_a_restore_nothing_is_repeated_blindly_and_nothing_while_workers_live() -> None:
    world = World(ScriptedLlm([ROUTE, calls_tool("post", {"text": "x"}), says("Done."), ACCEPT]))
    world.submit()
    await _stopped_at_its_tool(world)
    eve = operator(world)
    await world.store.beat("scheduler:s", {"kind": "scheduler"})
    with pytest.raises(Conflict, match="Still alive: scheduler:s"):
        await eve.restore_check(apply=True, release=True)
    world.store.beats.clear()
    before = copy.deepcopy(world.store.runs)
    counted = await eve.restore_check(apply=False, release=False)
    assert (counted["steps held for a person"], counted["runs paused"]) == (1, 1)
    assert world.store.runs == before
    assert await eve.restore_check(apply=True, release=True) == counted - Counter({"runs paused": 1})
    await world.run_all(hours=0.2)
    assert (world.run()["status"], world.shop.posts) == ("waiting", [])


async def test_many_are_retried_one_after_the_other_and_one_bad_one_stops_nothing() -> None:
    world = await failed(then=(says("Shipped."), ACCEPT))
    eve = operator(world)

    async def again(run_id: str) -> str:
        return (await eve.retry(run_id))["_id"]

    async def status(run_id: str) -> str:
        await world.run_all()
        return world.run(run_id)["status"]

    wave = await retry_many(["r9", "r1"], again, status, now=lambda: world.time)
    assert (wave.started, list(wave.refused), wave.stopped) == (["r1"], ["r9"], None)


@pytest.mark.parametrize(("ends", "started"), [("succeeded", 4), ("failed", 2), ("waiting", 2), ("running", 2)])
async def test_the_others_follow_only_if_the_canaries_succeed(ends: str, started: int) -> None:
    world = World(ScriptedLlm([]))
    asked: list[str] = []

    async def again(run_id: str) -> str:
        asked.append(run_id)
        return run_id

    async def status(run_id: str) -> str:
        return ends

    wave = await retry_many(
        ["a", "b", "c", "d"], again, status, canary=2, canary_s=0 if ends == "running" else 60, now=lambda: world.time
    )
    assert asked == ["a", "b", "c", "d"][:started]
    assert (wave.stopped is None) == (ends == "succeeded")


async def test_an_unknown_run_is_said_to_be_unknown() -> None:
    with pytest.raises(NotFound, match="no run 'r7'"):
        await operator(World(ScriptedLlm([]))).retry("r7")


async def test_who_was_told_of_an_end_is_not_told_again_when_its_dead_letter_is_dropped() -> None:
    """The waiting caller hears of the failure once; of another end, after a redrive, again."""
    world = await failed(then=(GONE,))
    world.store.runs["r1"]["reply"] = {"task_id": "t1"}
    world.store.runs["r1"]["told_at"] = world.store.runs["r1"]["ended_at"]
    await operator(world).retry("r1")
    world.time += timedelta(seconds=1)
    await world.run_all()
    assert world.replies == ["r1"]
    await operator(world).drop("r1", "no use")
    await world.run_all()
    assert world.replies == ["r1"]


async def test_a_result_backend_that_is_away_holds_up_neither_the_audit_nor_those_to_be_notified() -> None:
    world = World(ScriptedLlm([GONE]))
    world.submit()
    world.store.runs["r1"] |= {"reply": {"task_id": "t1"}, "notify": {"follow_up": {"task": "t", "queue": "q"}}}
    notified: list[str] = []

    async def notify(run: RunDoc) -> None:
        notified.append(run["_id"])

    async def away(_: RunDoc) -> None:
        raise Unavailable("The result backend does not answer.")

    world.store.notify = notify  # type: ignore[method-assign]
    world.reply = away  # type: ignore[method-assign]
    await world.deliver()
    assert notified == ["r1"]
    assert world.store.audit
    assert world.run()["next_due"] is not None, "the answer is still to be stored"
