"""What every store promises to operators' acts, in memory and on the real MongoDB; see test_store_contract."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from agentq.engine import advance, repair
from agentq.engine.commit import Grant, plan
from agentq.engine.decision import Failed
from agentq.engine.edits import Edits
from agentq.engine.replay import agrees
from agentq.errors import InvalidRequest
from agentq.protocol import Hint
from agentq.run import rejected_run
from agentq.store.api import Letters, Verdict
from schemas.run import RUN, RunDoc
from tests.integration.test_store_contract import BUNDLE, Bench, bench, claimed, decide, replied, routed

__all__ = ["bench"]  # the fixture


async def failed(bench: Bench, run_id: str = "r1", **fields: Any) -> RunDoc:
    """A run whose second step is quarantined."""
    run = await claimed(bench, await bench.born(run_id, **fields))
    first = decide(run, "s1", routed(), "t1", bench.store, grants={"s2": Grant("t2", "w", 30_000)})
    assert await bench.store.commit(first) is Verdict.APPLIED
    act = plan(first.after, advance.quarantine(first.after, "s2", "model_gone", "no", 1), now=bench.store.now())
    assert await bench.store.commit(act) is Verdict.APPLIED
    return await loaded(bench, run_id)


async def loaded(bench: Bench, run_id: str = "r1", *, journal: bool = True) -> RunDoc:
    run = await bench.store.load(run_id, journal=journal)
    assert run is not None
    RUN.validate_python(run)
    return run


async def test_the_journal_grows_with_each_outcome_and_only_who_asks_gets_it(bench: Bench) -> None:
    """A commit that is repeated after a lost answer appends once; claims, looks and plain loads leave it out."""
    run = await claimed(bench, await bench.born())
    commit = decide(run, "s1", routed(), "t1", bench.store)
    for _ in range(2):
        assert await bench.store.commit(commit) is Verdict.APPLIED
    whole = await loaded(bench)
    assert [entry["step"] for entry in whole["journal"]] == ["s1"]
    assert agrees({BUNDLE.hash: BUNDLE}, whole)
    second = await claimed(bench, Hint("r1", "s2", 1), "t2")
    again = await claimed(bench, await bench.born("r2"))
    assert "journal" not in {**second, **again, **await loaded(bench, journal=False)}
    await bench.store.commit(decide(second, "s2", replied("a draft"), "t2", bench.store))
    whole = await loaded(bench)
    assert [entry["step"] for entry in whole["journal"]] == ["s1", "s2"]
    assert agrees({BUNDLE.hash: BUNDLE}, whole)
    assert all("journal" not in run for run in [run async for run in bench.store.live()])


async def test_a_redriven_run_is_open_again_and_nothing_of_its_end_is_left(bench: Bench) -> None:
    run = await failed(bench)
    assert run["quarantine"]["step_id"] == "s2"
    acted = repair.redrive({BUNDLE.hash: BUNDLE}, run, Edits(), "eve", bench.store.now())
    planned = plan(run, acted.decision, now=bench.store.now())
    for _ in range(2):
        assert await bench.store.commit(planned) is Verdict.APPLIED
    now = await loaded(bench)
    assert (now["status"], now["ended_at"], now["error"], "quarantine" in now) == ("running", None, None, False)
    assert [list(entry)[1] for entry in now["journal"]] == ["step", "start"]
    assert now["deadline_at"] > run["deadline_at"]
    assert {**now, "journal": None} == {**planned.after, "journal": None}
    assert await bench.store.claim(Hint("r1", "s2", 1), Grant("t3", "w", 1000)) is None
    assert await bench.store.claim(Hint("r1", "s2", 2), Grant("t3", "w", 1000)) is not None


async def test_a_run_that_ended_again_is_not_settled_by_who_saw_it_end_before(bench: Bench) -> None:
    before = await failed(bench)
    acted = repair.redrive({BUNDLE.hash: BUNDLE}, before, Edits(), "eve", bench.store.now())
    await bench.store.commit(plan(before, acted.decision, now=bench.store.now()))
    await bench.store.settle(before)
    run = await loaded(bench)
    assert run["next_due"] is not None
    await bench.store.commit(plan(run, advance.cancel(run, 1), now=bench.store.now()))
    await bench.store.settle(before)
    ended = await loaded(bench)
    assert ended["events"][-1]["type"] == "run.cancelled"
    await bench.store.settle(ended)
    assert (await loaded(bench))["events"] == []


async def test_a_failed_run_that_cannot_be_sure_of_its_other_steps_is_decided_again(bench: Bench) -> None:
    """An unsafe step was claimed since the run was read: the quarantine must know of it."""
    store = bench.store
    run = await claimed(bench, await bench.born())
    first = decide(run, "s1", routed(), "t1", store, grants={"s2": Grant("t2", "w", 30_000)})
    await store.commit(first)
    wishes = [{"id": "a", "name": "look_up", "arguments": {}}, {"id": "b", "name": "post", "arguments": {}}]
    second = decide(first.after, "s2", replied("", wishes), "t2", store, grants={"s3": Grant("t3", "w", 30_000)})
    await store.commit(second)
    assert await store.claim(Hint("r1", "s4", 1), Grant("t4", "w", 30_000)) is not None
    gone = Failed("gone", "no", False, None, 1)
    stale = plan(
        second.after, advance.advance(BUNDLE, second.after, "s3", gone, 5), now=store.now(), step_id="s3", token="t3"
    )
    assert await store.commit(stale) is Verdict.MOVED
    fresh = await loaded(bench)
    again = plan(fresh, advance.advance(BUNDLE, fresh, "s3", gone, 5), now=store.now(), step_id="s3", token="t3")
    assert await store.commit(again) is Verdict.APPLIED
    assert (await loaded(bench))["quarantine"]["leased"] == ["s4"]


async def test_a_paused_run_is_claimed_by_nobody_and_a_resumed_one_is_due_at_once(bench: Bench) -> None:
    hint = await bench.born()
    run = await loaded(bench)
    paused = plan(run, repair.pause(run, "why", "eve", bench.store.now()), now=bench.store.now())
    assert await bench.store.commit(paused) is Verdict.APPLIED
    assert await bench.store.claim(hint, Grant("t", "w", 1000)) is None
    run = await loaded(bench)
    assert (run["status"], run["pause"]["reason"]) == ("paused", "why")
    assert await bench.store.commit(paused) is Verdict.APPLIED, "its answer was lost"
    resumed = plan(run, repair.resume(run, "eve", bench.store.now()), now=bench.store.now())
    assert await bench.store.commit(resumed) is Verdict.APPLIED
    assert "pause" not in await loaded(bench)
    assert [found["_id"] for found in await bench.store.due(5)] == ["r1"]
    assert await bench.store.claim(hint, Grant("t", "w", 1000)) is not None


async def test_dead_letters_are_found_by_what_they_are_until_they_are_taken_care_of(bench: Bench) -> None:
    store = bench.store
    run = await failed(bench, tenant="acme")
    refusal = rejected_run(
        InvalidRequest("no", code="empty_input"), run_id="x1", now=store.now(), facts={},
        refused={"code": "empty_input", "bytes": 2, "sha256": "h", "body": "{}"},
    )  # fmt: skip
    await store.record(refusal)  # type: ignore[arg-type]
    ended = run["ended_at"]
    assert ended is not None

    async def found(kind: Any, **which: Any) -> list[str]:
        return [run["_id"] for run in await store.dead_letters(kind, Letters(**which), 10)]

    assert (await found("quarantined"), await found("rejected")) == (["r1"], ["x1"])
    for which in ({"tenant": "acme"}, {"code": "model_gone"}, {"workflow": "default"}, {"since": ended}):
        assert await found("quarantined", **which) == ["r1"], which
    later = ended + timedelta(seconds=1)
    for which in ({"tenant": "b"}, {"code": "other"}, {"workflow": "other"}, {"since": later}):
        assert await found("quarantined", **which) == [], which
    await store.commit(plan(run, repair.drop(run, "eve", "", store.now()), now=store.now()))
    refused = await loaded(bench, "x1")
    again = repair.handed_in_again(refused, "r9", "eve", store.now(), edited=True)
    assert await store.commit(plan(refused, again, now=store.now())) is Verdict.APPLIED
    assert (await found("quarantined"), await found("rejected")) == ([], [])


async def test_live_runs_versions_and_signs_of_life(bench: Bench) -> None:
    store = bench.store
    await bench.born("r2")
    await failed(bench, "r1")
    assert [run["_id"] async for run in store.unended()] == ["r2"]
    await store.register([BUNDLE])
    other = BUNDLE.model_copy(update={"workflow": BUNDLE.workflow.model_copy(update={"description": "another"})})
    await store.keep_bundle(other)
    assert await store.bundle(other.hash) == other
    assert [bundle.hash for bundle in await store.current()] == [BUNDLE.hash]
    assert await store.alive(timedelta(seconds=15)) == []
    await store.beat("scheduler:a", {"kind": "scheduler"})
    assert await store.alive(timedelta(seconds=15)) == ["scheduler:a"]


async def test_who_walks_through_the_live_runs_meets_each_once_whatever_he_does_to_them(bench: Bench) -> None:
    for index in range(5):
        await bench.born(f"r{index}")
    met = []
    async for run in bench.store.unended():
        met.append(run["_id"])
        await bench.store.set_due(run, bench.store.now() + timedelta(hours=len(met)))
    assert sorted(met) == [f"r{index}" for index in range(5)]
