"""What every store promises, run against memory and against the real MongoDB."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from agentq.engine import advance
from agentq.engine.commit import Commit, Grant, plan
from agentq.engine.decision import Observed, Replied
from agentq.protocol import Hint, Request
from agentq.run import RUN_FORMAT, new_run
from agentq.store.api import Held, Queue, Store, Verdict
from agentq.store.memory import MemoryStore
from agentq.store.mongo import MongoStore
from schemas.llm import LlmReply
from schemas.run import RUN, RunDoc
from tests.unit.runtime.world import Shop, make_bundle

BUNDLE = make_bundle(Shop().toolbox())


class Bench:
    """A store, its clock, and how to give birth to a run in it."""

    def __init__(self, store: Store, insert: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        self.store = store
        self._insert = insert

    async def born(self, run_id: str = "r1", **fields: Any) -> Hint:
        version = fields.pop("v", RUN_FORMAT)
        doc = new_run(Request(input="hello", **fields), BUNDLE.registered(), run_id=run_id, now=self.store.now())
        await self._insert({**doc, "v": version})
        return Hint(run_id, "s1", 1)

    async def pass_time(self, seconds: float) -> None:
        if isinstance(self.store, MemoryStore):
            self.store.offset += timedelta(seconds=seconds)  # type: ignore[attr-defined]
        else:
            await asyncio.sleep(seconds)


@pytest.fixture(params=["memory", pytest.param("mongo", marks=pytest.mark.servers)])
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    if request.param == "memory":
        memory = MemoryStore(lambda: _ms(datetime.now(UTC)) + memory.offset)  # type: ignore[attr-defined]
        memory.offset = timedelta(0)  # type: ignore[attr-defined]

        async def insert(doc: dict[str, Any]) -> None:
            memory.insert(doc)

        yield Bench(memory, insert)
        return
    mongo = MongoStore(request.getfixturevalue("mongo_url"), request.getfixturevalue("database"))
    await mongo.open()

    async def insert_mongo(doc: dict[str, Any]) -> None:
        await mongo.runs.insert_one(doc)

    yield Bench(mongo, insert_mongo)
    await mongo._client.drop_database(mongo._db.name)
    await mongo.close()


def _ms(moment: datetime) -> datetime:
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def replied(text: str, tool_calls: list[Any] | None = None) -> Replied:
    reply = LlmReply(text, tool_calls or [], "stop", {"input_tokens": 3, "output_tokens": 2}, 7, "m-1", 1)
    return Replied(reply, int(datetime.now(UTC).timestamp() * 1000))


def routed() -> Replied:
    """The router's choice, made now: an agent's time runs from it."""
    return replied('{"route": "billing", "reason": "x"}')


def decide(run: RunDoc, step_id: str, outcome: Replied | Observed, token: str, store: Store, **more: Any) -> Commit:
    if run["state"] is None:
        run = advance.enter_run(BUNDLE, run, step_id, [], 1)
    decision = advance.advance(BUNDLE, run, step_id, outcome, 5)
    return plan(run, decision, now=store.now(), step_id=step_id, token=token, **more)


async def claimed(bench: Bench, hint: Hint, token: str = "t1", ms: int = 30_000) -> RunDoc:
    run = await bench.store.claim(hint, Grant(token, "w", ms))
    assert run is not None
    return run


async def test_a_step_is_claimed_once(bench: Bench) -> None:
    """Of many claims at the same time exactly one gets the lease."""
    hint = await bench.born()
    claims = [bench.store.claim(hint, Grant(f"t{index}", "w", 30_000)) for index in range(20)]
    runs = [run for run in await asyncio.gather(*claims) if run is not None]
    assert len(runs) == 1
    stored = await bench.store.load("r1")
    assert stored is not None
    assert stored["leases"]["s1"]["token"] == runs[0]["leases"]["s1"]["token"]
    assert stored["status"] == "running"


async def test_wrong_attempt_unknown_step_and_unknown_run_are_no_claims(bench: Bench) -> None:
    await bench.born()
    for hint in (Hint("r1", "s1", 2), Hint("r1", "s2", 1), Hint("r9", "s1", 1)):
        assert await bench.store.claim(hint, Grant("t", "w", 1000)) is None


async def test_runs_of_a_newer_format_are_left_to_newer_workers_and_schedulers(bench: Bench) -> None:
    hint = await bench.born(v=RUN_FORMAT + 1)
    assert await bench.store.claim(hint, Grant("t", "w", 1000)) is None
    run = await bench.store.load("r1")
    assert run is not None
    await bench.store.set_due(run, bench.store.now() - timedelta(seconds=1))
    assert await bench.store.due(10) == []


async def test_what_workers_heard_of_the_queues_is_told_while_they_live(bench: Bench) -> None:
    """The foremost worker counts, but nothing is passed that another has taken and not begun."""
    start = bench.store.now()
    at = [start + timedelta(seconds=second) for second in range(5)]
    wait = timedelta(milliseconds=7)

    async def beat(worker: str, heard: datetime | None, oldest: datetime | None) -> None:
        queues = {"router": {"heard": heard, "wait_ms": 7, "oldest": oldest}}
        await bench.store.beat(f"worker:{worker}", {"kind": "worker", "queues": queues})

    assert await bench.store.queues() == {}
    await beat("a", at[1], None)
    await beat("b", at[3], None)
    assert await bench.store.queues() == {"router": Queue(at[3], 7, at[3] + wait)}
    await beat("a", at[1], at[2])
    assert await bench.store.queues() == {"router": Queue(at[2], 7, at[3] + wait)}
    await bench.store.beat("scheduler:s", {"kind": "scheduler", "looked_at": 0})
    await beat("b", None, None)
    assert await bench.store.queues() == {"router": Queue(at[1], 7, at[1] + wait)}


async def test_stopped_runs_are_those_that_ended_or_shall(bench: Bench) -> None:
    for run_id in ("r1", "r2"):
        await bench.born(run_id)
    assert await bench.store.stopped({"r1", "r2", "r9"}) == set()
    run = await bench.store.load("r2")
    assert run is not None
    await bench.store.commit(plan(run, advance.expire(run, 1), now=bench.store.now()))
    assert await bench.store.stopped({"r1", "r2"}) == {"r2"}


async def test_a_commit_is_seen_whole_and_validates(bench: Bench) -> None:
    """State, closed and opened steps, events, usage and receipt appear together."""
    run = await claimed(bench, await bench.born())
    commit = decide(run, "s1", routed(), "t1", bench.store)
    assert await bench.store.commit(commit) is Verdict.APPLIED
    stored = await bench.store.load("r1")
    assert stored is not None
    RUN.validate_python(stored)
    assert sorted(stored["steps"]) == ["s2"]
    assert stored["leases"] == {}
    assert stored["receipts"] == {"s1": "t1"}
    assert [event["type"] for event in stored["events"]] == ["run.accepted", "route.chosen"]
    assert stored["usage"]["cost_nano_usd"] == 7
    assert stored == {**commit.after, "leases": stored["leases"]}


async def test_a_commit_repeated_after_a_lost_answer_is_applied_once(bench: Bench) -> None:
    run = await claimed(bench, await bench.born())
    commit = decide(run, "s1", routed(), "t1", bench.store)
    assert await bench.store.commit(commit) is Verdict.APPLIED
    before = await bench.store.load("r1")
    assert await bench.store.commit(commit) is Verdict.APPLIED
    assert await bench.store.load("r1") == before


async def test_a_lease_granted_in_the_commit_keeps_others_out(bench: Bench) -> None:
    run = await claimed(bench, await bench.born())
    commit = decide(run, "s1", routed(), "t1", bench.store, grants={"s2": Grant("t2", "w", 30_000)})
    assert await bench.store.commit(commit) is Verdict.APPLIED
    assert await bench.store.claim(Hint("r1", "s2", 1), Grant("t3", "w", 1000)) is None
    again = decide(commit.after, "s2", replied("a draft"), "t2", bench.store)
    assert await bench.store.commit(again) is Verdict.APPLIED


async def test_a_foreign_token_writes_nothing(bench: Bench) -> None:
    run = await claimed(bench, await bench.born())
    before = await bench.store.load("r1")
    assert await bench.store.commit(decide(run, "s1", routed(), "stolen", bench.store)) is Verdict.FENCED
    assert await bench.store.load("r1") == before


async def test_parallel_steps_that_commit_at_once_both_count(bench: Bench) -> None:
    """The loser of the race learns that the run moved on, decides again on the fresh run, and is applied."""
    store = bench.store
    run = await claimed(bench, await bench.born())
    wish = [{"id": "a", "name": "look_up", "arguments": {}}, {"id": "b", "name": "look_up", "arguments": {}}]
    first = decide(run, "s1", routed(), "t1", store, grants={"s2": Grant("t2", "w", 30_000)})
    await store.commit(first)
    grants = {"s3": Grant("t3", "w", 30_000), "s4": Grant("t4", "w", 30_000)}
    second = decide(first.after, "s2", replied("", wish), "t2", store, grants=grants)
    await store.commit(second)
    seen = Observed(True, "ok", "x", False, 1, 1)
    commits = [decide(second.after, step, seen, token, store) for step, token in (("s3", "t3"), ("s4", "t4"))]
    verdicts = await asyncio.gather(*(store.commit(commit) for commit in commits))
    assert sorted(verdict.name for verdict in verdicts) == ["APPLIED", "MOVED"]
    loser = verdicts.index(Verdict.MOVED)
    fresh = await store.load("r1")
    assert fresh is not None
    step, token = (("s3", "t3"), ("s4", "t4"))[loser]
    assert await store.commit(decide(fresh, step, seen, token, store)) is Verdict.APPLIED
    stored = await store.load("r1")
    assert stored is not None
    assert stored["state"] is not None
    assert stored["state"]["tools"] == ["look_up", "look_up"]
    assert sorted(stored["steps"]) == ["s5"]


async def test_a_live_lease_cannot_be_declared_lost_and_a_dead_one_can(bench: Bench) -> None:
    run = await claimed(bench, await bench.born(), ms=300)
    act = plan(run, advance.lost(run, "s1", 5, 1), now=bench.store.now(), step_id="s1", token="t1", lapsed=True)
    assert await bench.store.commit(act) is Verdict.MOVED
    await bench.pass_time(0.4)
    assert await bench.store.commit(act) is Verdict.APPLIED
    assert await bench.store.claim(Hint("r1", "s1", 1), Grant("t2", "w", 1000)) is None
    assert await bench.store.claim(Hint("r1", "s1", 2), Grant("t2", "w", 1000)) is not None
    assert await bench.store.commit(decide(run, "s1", routed(), "t1", bench.store)) is Verdict.FENCED
    stored = await bench.store.load("r1")
    assert stored is not None
    assert stored["waste"] == {"lost_calls": 1, "lost_llm_calls": 1}


async def test_renewal_prolongs_what_is_ours_and_names_what_is_lost(bench: Bench) -> None:
    await claimed(bench, await bench.born(), ms=300)
    ours, theirs = Held("r1", "s1", "t1"), Held("r1", "s1", "t2")
    assert await bench.store.renew([ours, theirs], 60_000) == {theirs}
    stored = await bench.store.load("r1")
    assert stored is not None
    assert stored["leases"]["s1"]["ms"] == 60_000


async def test_hinting_again_never_takes_a_lease_away(bench: Bench) -> None:
    """The scheduler saw the step unclaimed; meanwhile a worker claimed it: the scheduler's commit does nothing."""
    hint = await bench.born()
    seen = await bench.store.load("r1")
    assert seen is not None
    await claimed(bench, hint)
    act = plan(seen, advance.hint_again(seen, "s1"), now=bench.store.now(), unclaimed=("s1",))
    assert await bench.store.commit(act) is not Verdict.APPLIED
    stored = await bench.store.load("r1")
    assert stored is not None
    assert stored["leases"]["s1"]["token"] == "t1"


async def test_only_due_runs_are_looked_at_and_settled_ones_never(bench: Bench) -> None:
    await bench.born("r1")
    await bench.born("r2")
    r2 = await bench.store.load("r2")
    assert r2 is not None
    assert await bench.store.due(10) == []
    await bench.store.set_due(r2, bench.store.now() - timedelta(seconds=1))
    assert [run["_id"] for run in await bench.store.due(10)] == ["r2"]
    assert sorted([run["_id"] async for run in bench.store.live()]) == ["r1", "r2"]
    await bench.store.settle(r2)
    assert [run["_id"] for run in await bench.store.due(10)] == ["r2"], "a run that has not ended cannot be settled"
    await bench.store.commit(plan(r2, advance.expire(r2, 1), now=bench.store.now()))
    ended = await bench.store.load("r2")
    assert ended is not None
    await bench.store.settle(ended)
    assert await bench.store.due(10) == []
    assert [run["_id"] async for run in bench.store.live()] == ["r1"]


async def test_audit_events_copied_twice_are_there_once(bench: Bench) -> None:
    await bench.born()
    run = await bench.store.load("r1")
    assert run is not None
    await asyncio.gather(*(bench.store.copy_audit(run["events"]) for _ in range(3)))
    assert [event async for event in bench.store.audit_events("r1")] == run["events"]


async def test_history_gives_earlier_answered_turns_within_the_window(bench: Bench) -> None:
    store = bench.store
    for turn, status in ((1, "succeeded"), (2, "failed"), (3, "succeeded"), (4, "queued")):
        run_id = f"r{turn}"
        doc = new_run(
            Request(input=f"q{turn}", conversation="c"), BUNDLE.registered(), run_id=run_id, now=store.now(), turn=turn
        )
        await bench._insert({**doc, "status": status, "result": {"answer": f"a{turn}"}})
    run = await store.load("r4")
    assert run is not None
    assert [message["content"] for message in await store.history(run, 1000)] == ["q1", "a1", "q3", "a3"]
    assert [message["content"] for message in await store.history(run, 10)] == ["q3", "a3"]


async def test_bundles_come_back_as_they_were_registered(bench: Bench) -> None:
    await bench.store.register([BUNDLE])
    assert await bench.store.bundle(BUNDLE.hash) == BUNDLE
    assert await bench.store.bundle("unknown") is None


async def test_waste_adds_up(bench: Bench) -> None:
    await bench.born()
    spent = {"llm_calls": 1, "cost_nano_usd": 5}
    tokens = [f"t{number % 10}" for number in range(20)]  # each twice: an answer was lost, and it was repeated
    await asyncio.gather(*(bench.store.book_waste("r1", token, spent) for token in tokens))
    stored = await bench.store.load("r1")
    assert stored is not None
    assert stored["waste"] == {"llm_calls": 10, "cost_nano_usd": 50}
