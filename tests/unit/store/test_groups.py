"""Writes that share a bulk write on MongoDB: each has its own outcome."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from agentq.engine import advance
from agentq.engine.commit import Commit, Grant, plan
from agentq.engine.decision import Replied
from agentq.protocol import Hint, Request
from agentq.run import new_run
from agentq.store.api import Verdict
from agentq.store.mongo import MongoStore
from schemas.llm import LlmReply
from schemas.run import RunDoc
from tests.unit.engine.play import TO_BILLING, bundle, wish

pytestmark = pytest.mark.servers
BUNDLE = bundle()


@pytest.fixture
async def store(mongo_url: str, database: str) -> AsyncIterator[MongoStore]:
    made = MongoStore(mongo_url, database)
    await made.open()
    yield made
    await made._client.drop_database(database)
    await made.close()


async def born(store: MongoStore, run_id: str) -> RunDoc:
    doc = new_run(Request(input="hello"), BUNDLE.registered(), run_id=run_id, now=store.now())
    await store.runs.insert_one(cast("dict[str, Any]", doc))
    run = await store.load(run_id)
    assert run is not None
    return run


def decided(store: MongoStore, run: RunDoc, step: str, text: str = "", calls: Any = (), **more: Any) -> Commit:
    reply = LlmReply(text, list(calls), "stop", {"input_tokens": 1, "output_tokens": 1}, 1, "m", 1)
    decision = advance.advance(BUNDLE, run, step, Replied(reply, 1), 5)
    return plan(run, decision, now=store.now(), step_id=step, token=f"t{step}{run['_id']}", **more)


async def at_its_turn(store: MongoStore, run_id: str) -> RunDoc:
    """A run whose agent's turn is leased to us."""
    await born(store, run_id)
    run = await store.claim(Hint(run_id, "s1", 1), Grant(f"ts1{run_id}", "w", 30_000))
    assert run is not None
    run = advance.enter_run(BUNDLE, run, "s1", [], 1)
    first = decided(store, run, "s1", TO_BILLING, grants={"s2": Grant(f"ts2{run_id}", "w", 30_000)})
    assert await store.commit(first) is Verdict.APPLIED
    return first.after


@pytest.mark.parametrize(
    "poison",
    [{"n": 2**70}, {"text": "\ud800"}, {"a\x00b": 1}, {"text": "x" * 17_000_000}],
    ids=["integer", "surrogate", "NUL in a key", "too large"],
)
async def test_a_commit_that_cannot_be_stored_fails_alone(store: MongoStore, poison: dict[str, Any]) -> None:
    """One run's bad value, or its size, takes no other run's paid answer along."""
    runs = [await at_its_turn(store, f"r{index}") for index in range(4)]
    commits = [
        decided(store, run, "s2", calls=[wish("look_up", poison if index == 2 else {"order": "17"})])
        for index, run in enumerate(runs)
    ]
    results = await asyncio.gather(*(store.commit(commit) for commit in commits), return_exceptions=True)
    assert [result for index, result in enumerate(results) if index != 2] == [Verdict.APPLIED] * 3
    assert isinstance(results[2], Exception)
    for run in runs:
        stored = await store.load(run["_id"])
        assert stored is not None
        assert stored["rev"] == (1 if run["_id"] == "r2" else 2)


async def test_wakes_that_share_a_write_with_one_that_lost_a_race_are_known_as_applied(store: MongoStore) -> None:
    """Else their hints would not be published, and each step would wait half a minute more."""
    runs = [await born(store, f"r{index}") for index in range(4)]
    await store.runs.update_one({"_id": "r2"}, {"$inc": {"rev": 1}})
    acts = [plan(run, advance.hint_again(run, "s1"), now=store.now(), unclaimed=("s1",)) for run in runs]
    verdicts = await asyncio.gather(*(store.commit(act) for act in acts))
    assert verdicts == [Verdict.APPLIED, Verdict.APPLIED, Verdict.MOVED, Verdict.APPLIED]


async def test_claims_that_share_a_write_are_each_decided_by_their_own_lease(store: MongoStore) -> None:
    await born(store, "r1")
    await born(store, "r2")
    hints = [Hint("r1", "s1", 1), Hint("r1", "s1", 1), Hint("r2", "s1", 1), Hint("r9", "s1", 1)]
    runs = await asyncio.gather(
        *(store.claim(hint, Grant(f"t{index}", "w", 30_000)) for index, hint in enumerate(hints))
    )
    assert [run["_id"] if run else None for run in runs] == ["r1", None, "r2", None]
