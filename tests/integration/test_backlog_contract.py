"""What every backlog promises, run against memory and against the real MongoDB."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from agentq.engine import advance
from agentq.engine.admission import CLASSES
from agentq.engine.commit import Grant, plan
from agentq.engine.recovery import look
from agentq.protocol import Hint, Request
from agentq.run import new_run
from agentq.runtime.admission import Admission
from agentq.store.api import Store, Verdict
from agentq.store.backlog import Backlog, Limit
from agentq.store.memory import MemoryStore
from agentq.store.memory_backlog import MemoryBacklog
from agentq.store.mongo import MongoStore
from schemas.run import RUN, RunDoc
from tests.unit.runtime.world import Shop, make_bundle

BUNDLE = make_bundle(Shop().toolbox())


@dataclass
class Bench:
    store: Any
    backlog: Any

    async def born(self, run_id: str, *, turn: int | None = None, hold: str | None = None, waits: bool = True,
                   cost: int = 1_000_000, **fields: Any) -> str:  # fmt: skip
        doc = new_run(
            Request(input="hello", **fields), BUNDLE.registered(), run_id=run_id, now=self.store.now(), turn=turn,
            hold=hold, waits=waits, cost=cost,
        )  # fmt: skip
        RUN.validate_python(doc)
        await self.store.record(doc)
        return run_id

    async def run(self, run_id: str) -> RunDoc:
        found = await self.store.load(run_id)
        assert found is not None
        RUN.validate_python(found)
        return found

    async def end(self, run_id: str) -> RunDoc:
        run = await self.run(run_id)
        ended = plan(run, advance.cancel(run, 1), now=self.store.now())
        assert await self.store.commit(ended) is Verdict.APPLIED
        return await self.run(run_id)

    async def waiting(self) -> dict[Any, Any]:
        found = {priority: await self.backlog.waiting(priority) for priority in CLASSES}
        return {priority: pools for priority, pools in found.items() if pools}

    async def heads(self, priority: str, flow: str) -> list[str]:
        lines = await self.backlog.heads(priority, "router", [flow], 500)
        return [head.run_id for head in lines.get(flow, [])]

    async def put(self, run_id: str, **fields: Any) -> None:
        stored: Any = {**await self.run(run_id), **fields}
        if isinstance(self.store, MemoryStore):
            self.store.insert(stored)
        else:
            await self.store.runs.replace_one({"_id": run_id}, stored)

    async def limit(self, name: str, **limit: Any) -> None:
        if isinstance(self.backlog, MemoryBacklog):
            self.backlog.known_limits[name] = Limit(**limit)
        else:
            await self.backlog._limits.replace_one({"_id": name}, limit, upsert=True)


@pytest.fixture(params=["memory", pytest.param("mongo", marks=pytest.mark.servers)])
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    if request.param == "memory":
        memory = MemoryStore(lambda: datetime.now(UTC).replace(microsecond=0))
        await memory.register([BUNDLE])
        yield Bench(memory, MemoryBacklog(memory))
        return
    mongo = MongoStore(request.getfixturevalue("mongo_url"), request.getfixturevalue("database"))
    await mongo.open()
    await mongo.register([BUNDLE])
    yield Bench(mongo, mongo.backlog)
    await mongo._client.drop_database(mongo._db.name)
    await mongo.close()


def _protocols(bench: Bench) -> tuple[Store, Backlog]:
    """Both implementations fit the protocols, for mypy."""
    return bench.store, bench.backlog


async def test_a_waiting_run_is_nobodys_before_it_is_admitted(bench: Bench) -> None:
    """No claim, no hint from the scheduler, nothing published again when the broker lost its data."""
    await bench.born("r1")
    run = await bench.run("r1")
    assert await bench.store.claim(Hint("r1", "s1", 1), Grant("t", "w", 1000)) is None
    assert look(run, bench.store.now() + timedelta(days=1), 5, {}) is None
    assert [run["_id"] async for run in bench.store.live()] == []
    assert await bench.store.due(10) == []


async def test_what_waits_for_a_providers_job_is_known_by_its_cost(bench: Bench) -> None:
    for run_id, tenant, key in (("r1", "a", None), ("r2", "a", "k"), ("r3", "b", None), ("r4", "a", None)):
        await bench.born(run_id, tenant=tenant, key=key, cost=5)
    assert await bench.backlog.admit(["r1", "r2", "r3"]) == {"r1", "r2", "r3"}
    now = bench.store.now()
    for run_id in ("r1", "r2", "r3"):
        await bench.put(run_id, status="waiting", joins={"step": "s1", "endpoint": "o/m", "since": now, "until": now})
    assert await bench.backlog.joining(["a"]) == {"a": 5, "a|k": 5}
    await bench.end("r1")
    assert await bench.backlog.joining(["a", "b", "c"]) == {"a|k": 5, "b": 5}
    assert await bench.backlog.joining([]) == {}


async def test_a_run_is_admitted_once_and_may_then_be_claimed(bench: Bench) -> None:
    await bench.born("r1")
    before = await bench.run("r1")
    admitted = await asyncio.gather(*(bench.backlog.admit(["r1", "r9"]) for _ in range(3)))
    assert all(found == {"r1"} for found in admitted)
    run = await bench.run("r1")
    assert run["rev"] == before["rev"] + 1
    assert "backlog" not in run
    assert run["in_flight"]
    assert run["steps"]["s1"]["hints"] == 1
    assert run["deadline_at"] <= bench.store.now() + timedelta(seconds=BUNDLE.registered()["max_wall_s"])
    assert await bench.store.claim(Hint("r1", "s1", 1), Grant("t", "w", 30_000)) is not None
    assert await bench.backlog.admit(["r1"]) == set(), "nobody lets in what is under way"


async def test_a_cancelled_run_is_not_admitted(bench: Bench) -> None:
    await bench.born("r1")
    run = await bench.run("r1")
    stored = {**run, "cancel": {"reason": "", "at": bench.store.now()}}
    if isinstance(bench.store, MemoryStore):
        bench.store.insert(stored)
    else:
        await bench.store.runs.replace_one({"_id": "r1"}, stored)
    assert await bench.backlog.admit(["r1"]) == set()
    act = look(await bench.run("r1"), bench.store.now(), 5, {})
    assert act is not None
    assert act.decision.status == "cancelled"


async def test_a_run_that_waits_past_its_deadline_expires(bench: Bench) -> None:
    await bench.born("r1", deadline_s=5.0)
    run = await bench.run("r1")
    act = look(run, run["deadline_at"], 5, {})
    assert act is not None
    await bench.store.commit(plan(run, act.decision, now=bench.store.now()))
    ended = await bench.run("r1")
    assert ended["status"] == "failed"
    assert ended["error"] is not None
    assert ended["error"]["code"] == "expired"
    assert "backlog" not in ended
    assert await bench.waiting() == {}


async def test_heads_come_by_urgency_then_age_and_flows_by_class_and_pool(bench: Bench) -> None:
    await bench.born("r1", tenant="a")
    await bench.born("r2", tenant="a", urgency=9)
    await bench.born("r3", tenant="a", key="k", priority="batch")
    await bench.born("r4", tenant="b", priority="batch")
    await bench.born("r5", tenant="b", priority="batch")
    assert await bench.waiting() == {
        "standard": {"router": {"a": "r2"}}, "batch": {"router": {"a|k": "r3", "b": "r4"}},
    }  # fmt: skip
    assert await bench.heads("standard", "a") == ["r2", "r1"]
    lines = await bench.backlog.heads("batch", "router", ["b", "nobody", "a|k"], 1)
    assert {flow: [head.run_id for head in heads] for flow, heads in lines.items()} == {"b": ["r4"], "a|k": ["r3"]}


async def test_the_first_of_a_line_is_named_though_it_may_not_go_now(bench: Bench) -> None:
    """The heads leave it out: whoever compares them sees a difference and asks again."""
    await bench.born("r1", tenant="a")
    await bench.born("r2", tenant="a")
    await bench.put("r1", status="paused")
    assert await bench.waiting() == {"standard": {"router": {"a": "r1"}}}
    assert await bench.heads("standard", "a") == ["r2"]


async def test_what_is_in_flight_is_counted_until_the_commit_that_ends_it(bench: Bench) -> None:
    await bench.born("r1", tenant="a", cost=5)
    await bench.born("r2", tenant="a", waits=False, cost=7)
    await bench.backlog.admit(["r1"])
    await bench.store.claim(Hint("r2", "s1", 1), Grant("t", "w", 30_000))
    await bench.born("r3", tenant="b", waits=False, cost=9)
    await bench.born("r4", tenant="b", waits=False, cost=9)
    flight = {(one.taken, one.runs): one.flows for one in await bench.backlog.flight()}
    assert flight == {(False, 3): {"a": (1, 5), "b": (2, 18)}, (True, 1): {"a": (1, 7)}}
    assert sorted(await bench.backlog.flying()) == ["r1", "r2", "r3", "r4"]
    ended = await bench.end("r2")
    assert ended["in_flight"] is False
    assert sorted(await bench.backlog.flying()) == ["r1", "r3", "r4"]
    assert list(await bench.backlog.ended(["r1", "r2"])) == ["r2"]


async def test_a_run_of_the_future_may_be_admitted_when_its_time_has_come(bench: Bench) -> None:
    soon = bench.store.now() + timedelta(seconds=60)
    await bench.born("r1", at=soon)
    await bench.born("r2", delay_s=1.0)
    assert await bench.waiting() == {}
    assert await bench.backlog.release(10) == 0
    await asyncio.sleep(2.1)
    assert await bench.backlog.release(10) == 1
    assert list(await bench.waiting()) == ["standard"]
    assert (await bench.run("r1"))["backlog"].get("hold") == "time"


async def test_the_turns_of_a_conversation_go_one_after_the_other(bench: Bench) -> None:
    for turn in (1, 2, 3):
        await bench.born(f"r{turn}", conversation="c", turn=turn, hold="turn")
    await bench.backlog.release(10)
    assert await bench.heads("standard", "default") == ["r1"]
    for turn in (1, 2, 3):
        assert await bench.backlog.admit(["r1", "r2", "r3"]) == {f"r{turn}"}
        await bench.store.pass_turn(await bench.end(f"r{turn}"))


async def test_an_interrupting_turn_goes_before_those_that_wait(bench: Bench) -> None:
    await bench.born("r1", conversation="c", turn=1, hold="turn")
    await bench.backlog.release(10)
    await bench.born("r2", conversation="c", turn=2, hold="turn")
    await bench.born("r3", conversation="c", turn=3, hold="turn", conversation_policy="interrupt")
    await bench.backlog.admit(["r1"])
    await bench.store.pass_turn(await bench.end("r1"))
    assert await bench.heads("standard", "default") == ["r3"]


async def test_one_leads_until_its_lease_is_out(bench: Bench) -> None:
    assert await bench.backlog.lead("a", 1_500)
    assert await bench.backlog.lead("a", 1_500)
    assert not await bench.backlog.lead("b", 1_500)
    await asyncio.sleep(2.6)
    assert await bench.backlog.lead("b", 1_500)
    assert not await bench.backlog.lead("a", 1_500)


async def test_routes_are_known_from_the_registered_workflows(bench: Bench) -> None:
    assert await bench.backlog.routes() == {"router": {"router", "specialist", "critic", "tools"}}


async def test_the_admission_fills_the_window_and_keeps_caps_whoever_leads(bench: Bench) -> None:
    """A tick lets in what fits; another leader goes on from what is stored: nothing twice, no cap exceeded."""
    for index in range(30):
        await bench.born(f"r{index:02d}", tenant=("a", "b", "c")[index % 3], priority="batch")
    await bench.limit("a", in_flight=3)
    await bench.limit("b", per_minute=4)
    published: list[str] = []

    async def publish(hints: Any) -> None:
        published.extend(hint.run_id for _, hint in hints)

    async def queues() -> dict[Any, Any]:
        return {}

    for name in ("one", "two", "three"):
        admission = Admission(bench.backlog, queues, publish, name=name, window=14)
        assert await bench.backlog.lead(name, 0)
        admission._leads_until = admission._clock() + 60
        await admission._recall()
        await admission.tick()
        await admission.tick()
        await asyncio.sleep(1.01 if name == "one" else 0)
    assert len(published) == len(set(published)) == 14
    tenants = [(await bench.run(run_id))["tenant"] for run_id in published]
    assert tenants.count("a") == 3
    assert tenants.count("b") == 4
    assert tenants.count("c") == 7
    gate = await bench.backlog.remembered("gate")
    assert gate is not None
    assert gate["waiting"] == ["batch"]
    assert gate["room"] == 0
    assert gate["reserved"]["interactive"] > 0
    assert gate["capped"] == ["a", "b"]


async def test_waiting_turns_of_busy_conversations_are_put_off_with_few_questions(bench: Bench) -> None:
    """However many they are: a tenant's long conversations cost the others nothing."""
    if isinstance(bench.backlog, MemoryBacklog):
        pytest.skip("memory asks nobody")
    for conversation in ("c", "d", "e"):
        await bench.born(f"{conversation}001", conversation=conversation, turn=1, hold="turn")
    assert await bench.backlog.release(10) == 3
    for conversation in ("c", "d", "e"):
        for turn in range(2, 42):
            await bench.born(f"{conversation}{turn:03d}", conversation=conversation, turn=turn, hold="turn")
    asked, answer = 0, bench.backlog._answer

    async def count(question: Any) -> Any:
        nonlocal asked
        asked += 1
        return await answer(question)

    bench.backlog._answer = count
    assert await bench.backlog.release(500) == 120
    assert asked <= 5
    run = await bench.run("d041")
    assert run["backlog"]["at"] >= run["created_at"] + timedelta(seconds=1), "they are put off"
    assert len(await bench.heads("standard", "default")) == 3


async def test_turns_of_many_conversations_are_let_go_together(bench: Bench) -> None:
    for conversation in range(30):
        for turn in (1, 2):
            await bench.born(f"r{conversation:02d}-{turn}", conversation=f"c{conversation}", turn=turn, hold="turn")
    assert await bench.backlog.release(500) == 60
    assert await bench.heads("standard", "default") == [f"r{conversation:02d}-1" for conversation in range(30)]


async def test_a_turn_that_got_the_place_in_a_crash_goes_though_another_came_before_it(bench: Bench) -> None:
    """The place was written, letting it go was not."""
    await bench.born("r1", conversation="c", turn=1, hold="turn")
    await bench.backlog.release(10)
    await bench.born("r2", conversation="c", turn=2, hold="turn")
    await bench.born("r3", conversation="c", turn=3, hold="turn", conversation_policy="interrupt")
    if isinstance(bench.store, MemoryStore):
        bench.store.turns["default", "c"] = "r2"
    else:
        await bench.backlog._conversations.update_one({"active": "r1"}, {"$set": {"active": "r2"}})
    await bench.backlog.release(10)
    assert await bench.heads("standard", "default") == ["r1", "r2"]


async def test_a_run_in_flight_that_rests_is_not_counted_and_not_forgotten(bench: Bench) -> None:
    for run_id, status in (("r1", "paused"), ("r2", "waiting"), ("r3", "running")):
        await bench.born(run_id, waits=False)
        stored: Any = {**await bench.run(run_id), "status": status}
        if isinstance(bench.store, MemoryStore):
            bench.store.insert(stored)
        else:
            await bench.store.runs.replace_one({"_id": run_id}, stored)
    assert [(one.taken, one.runs) for one in await bench.backlog.flight()] == [(True, 1)]
    assert sorted(await bench.backlog.flying()) == ["r1", "r2", "r3"]


async def test_it_is_known_of_which_classes_something_waits(bench: Bench) -> None:
    await bench.born("r1", priority="batch")
    assert await bench.backlog.waits({"batch", "standard"}) == {"batch"}
    assert await bench.backlog.waits({"interactive", "standard"}) == set()
    assert await bench.backlog.waits(set()) == set()
