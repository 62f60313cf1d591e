"""Submission on the real MongoDB: durable, exact, resumable, and nothing runs before all of it is there."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from agentq.batch import submit
from agentq.errors import Conflict, InvalidRequest, Unavailable, UnknownWorkflow
from schemas.batch import CANCELLED, run_id
from tests.integration.batch.conftest import BUNDLE, Yard, lines


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "CHUNK_LINES", 10)


async def stored(yard: Yard) -> tuple[list[Any], list[Any]]:
    runs = await yard.store.runs.find({}).sort("_id", 1).to_list()
    bad = await yard.store._db["bad_lines"].find({}).sort("_id", 1).to_list()
    return runs, bad


async def test_every_line_is_a_run_that_waits_or_a_bad_line(yard: Yard) -> None:
    content = lines(24) + b"\n" + b"{broken\n" + json.dumps({"id": "m-3", "input": "again"}).encode()
    batch = (await yard.submit(content)).batch
    assert (batch["status"], batch["total"]) == ("in_progress", 26)
    assert batch["submitted"] == {"line": 27, "good": 24, "bad": 2}
    runs, bad = await stored(yard)
    assert [run["_id"] for run in runs] == [run_id(batch["_id"], line) for line in range(1, 25)]
    assert all(run["status"] == "queued" and "backlog" in run and run["steps"]["s1"]["hints"] == 0 for run in runs)
    assert {run["flow"] for run in runs} == {f"default|{batch['_id']}"}
    assert [(one["line"], one["custom_id"], one["error"]["code"]) for one in bad] == [
        (26, None, "invalid_json"), (27, "m-3", "duplicate_id"),
    ]  # fmt: skip
    assert "Line 3" in bad[1]["error"]["message"]
    await yard.run(batch, 1)  # validates


async def test_the_same_file_is_the_same_batch_unless_told_otherwise(yard: Yard) -> None:
    first = await yard.submit(lines(5))
    again = await yard.submit(lines(5))
    other = await yard.submit(lines(5), again="once more")
    assert (first.known, again.known, other.known) == (False, True, False)
    assert first.batch["_id"] == again.batch["_id"] != other.batch["_id"]
    assert len((await stored(yard))[0]) == 10


@pytest.mark.parametrize("writes", [0, 1, 2, 3])
async def test_a_submitter_that_dies_is_continued_and_nothing_is_there_twice(
    yard: Yard, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """Killed after any write; submitting the same file again gives what one submission would have given."""
    content = lines(12) + b"{broken\n" + lines(15)
    real, count = yard.batches.add_lines, 0

    async def dies(*given: Any) -> bool:
        nonlocal count
        if count == writes:
            raise Unavailable("killed")
        count += 1
        return await real(*given)

    monkeypatch.setattr(yard.batches, "add_lines", dies)
    if writes < 3:
        with pytest.raises(Unavailable):
            await yard.submit(content)
        assert await yard.batches.room() != {}, "nothing runs before all of it is on disk"
        assert len((await stored(yard))[0]) <= writes * 10
    monkeypatch.setattr(yard.batches, "add_lines", real)
    batch = (await yard.submit(content)).batch
    assert batch["submitted"] == {"line": 28, "good": 15, "bad": 13}
    runs, bad = await stored(yard)
    assert [run["batch"]["line"] for run in runs] == [*range(1, 13), 26, 27, 28]
    assert [one["line"] for one in bad] == list(range(13, 26))
    assert await yard.batches.room() == {}


async def test_what_is_set_aside_for_a_line_goes_by_the_workflows_in_the_file(yard: Yard) -> None:
    """Whatever workflow the order names; and where one of them has never run, nobody knows."""
    dear = BUNDLE.model_copy(update={"workflow": BUNDLE.workflow.model_copy(update={"name": "dear"})})
    new = BUNDLE.model_copy(update={"workflow": BUNDLE.workflow.model_copy(update={"name": "new"})})
    await yard.store.register([dear, new])
    for workflow, cost in (("default", 10), ("dear", 90)):
        await yard.all_through((await yard.submit(lines(1, workflow=workflow))).batch, cost=cost)
    asked, history = [], yard.batches.history

    async def ask(workflow: str) -> Any:
        asked.append(workflow)
        return await history(workflow)

    yard.batches.history = ask  # type: ignore[method-assign,assignment]
    batch = (await yard.submit(lines(5, workflow="dear"), budget_nano_usd=1_000)).batch
    assert asked == ["dear"], "of others nobody needs to know, and it may take seconds"
    assert batch["estimate"] == {"runs": 1, "p50_nano_usd": 90, "p90_nano_usd": 90}
    assert len(await yard.admit(batch)) == 5
    assert (await yard.run(batch, 1))["cost"] == 90
    mixed = lines(9) + lines(1, workflow="new").replace(b"m-1", b"n-1")
    batch = (await yard.submit(mixed, budget_nano_usd=1_000)).batch
    assert (batch["estimate"], len(await yard.admit(batch))) == (None, 1)


async def test_submitters_of_the_same_file_at_the_same_time_make_one_batch(yard: Yard) -> None:
    content = lines(55) + b"{broken\n"
    done = await asyncio.gather(*(yard.submit(content) for _ in range(4)))
    assert len({one.batch["_id"] for one in done}) == 1
    assert len((await stored(yard))[0]) == 55
    assert (await yard.batch(done[0].batch["_id"]))["submitted"] == {"line": 56, "good": 55, "bad": 1}


async def test_a_batch_cancelled_while_it_is_submitted_has_the_lines_that_are_on_disk(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = yard.batches.add_lines

    async def cancelled_after(batch_id: str, before: Any, *rest: Any) -> bool:
        if before["line"] == 20:
            await yard.batches.move(batch_id, ["validating"], "cancelling", ending="cancelled")
        return await real(batch_id, before, *rest)

    monkeypatch.setattr(yard.batches, "add_lines", cancelled_after)
    with pytest.raises(Conflict, match="after line 20"):
        await yard.submit(lines(45))
    (batch,) = await yard.batches.live()
    assert (batch["total"], len((await stored(yard))[0])) == (20, 20)
    await yard.keeper.tick()
    await yard.keeper.tick()
    ended = await yard.batch(batch["_id"])
    assert (ended["status"], ended["counts"]["cancelled"]) == ("cancelled", 20)
    assert {run["error"]["code"] for run in await yard.results(ended)} == {CANCELLED}


async def test_a_file_without_lines_fails_and_says_so(yard: Yard) -> None:
    batch = (await yard.submit(b"\n  \n")).batch
    assert batch["status"] == "failed"
    assert batch["error"] is not None
    assert batch["error"]["code"] == "empty_file"
    assert not batch["live"]


async def test_an_order_that_cannot_be_is_refused_before_anything_is_stored(yard: Yard) -> None:
    with pytest.raises(UnknownWorkflow, match="default"):
        await yard.submit(lines(1), workflow="nope")
    with pytest.raises(InvalidRequest):
        await yard.submit(lines(1), tenant="not a name")
    assert await yard.batches.latest({}, 9) == []


async def test_a_batch_is_pinned_to_the_workflows_of_its_birth(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workflow that is registered between a crash and the next try changes no line of the batch."""
    content = lines(10) + b'{"id": "x", "input": "x", "workflow": "late"}\n' + lines(25)[-300:]
    real = yard.batches.add_lines

    async def dies_second(batch_id: str, before: Any, *rest: Any) -> bool:
        if before["line"]:
            raise Unavailable("killed")
        return await real(batch_id, before, *rest)

    monkeypatch.setattr(yard.batches, "add_lines", dies_second)
    with pytest.raises(Unavailable):
        await yard.submit(content)
    monkeypatch.setattr(yard.batches, "add_lines", real)
    known = await yard.store._db["workflow_names"].find_one({"_id": "default"}, {"_id": 0})
    assert known is not None
    await yard.store._db["workflow_names"].insert_one({**known, "_id": "late", "name": "late"})
    batch = (await yard.submit(content)).batch
    assert batch["submitted"]["bad"] >= 1
    assert "unknown_workflow" in {one["error"]["code"] for one in (await stored(yard))[1]}


async def test_a_line_that_expires_before_it_may_start_is_a_bad_line(yard: Yard) -> None:
    past = {"id": "late", "input": "x", "expires_at": "2020-01-01T00:00:00Z"}
    ahead = {"id": "soon", "input": "x", "delay_s": 60, "expires_at": "2999-01-01T00:00:00Z"}
    batch = (await yard.submit(json.dumps(past).encode() + b"\n" + json.dumps(ahead).encode())).batch
    assert batch["submitted"] == {"line": 2, "good": 1, "bad": 1}
    _, (bad,) = await stored(yard)
    assert (bad["custom_id"], bad["error"]["code"]) == ("late", "expires_before_start")
