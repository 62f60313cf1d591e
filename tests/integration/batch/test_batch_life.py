"""A batch from its submission to its end, on the real MongoDB: counted once, billed exactly, ended visibly."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from typing import Any

import pytest

from agentq.batch import output
from agentq.engine.tally import line_end, spent
from agentq.runtime.bookkeeper import Bookkeeper
from agentq.runtime.runtime import finish
from schemas.batch import EXPIRED, BatchDoc, Pause
from tests.integration.batch.conftest import Yard, lines

BAD = b"{broken\n"


async def lines_and_total(yard: Yard, batch: BatchDoc) -> tuple[list[dict[str, Any]], BatchDoc]:
    """The output of every line, and the batch, after checking that each line is there once and the sums agree."""
    ended = await yard.batch(batch["_id"])
    found = await yard.results(ended)
    records = [
        output.of_run(one, "agentq")[1] if "status" in one else output.of_bad_line(one, "agentq")[1] for one in found
    ]
    assert [record["line"] for record in records] == sorted({record["line"] for record in records})
    assert sum(record["cost_nano_usd"] for record in records) == ended["cost_nano_usd"]
    assert sum(ended["counts"].values()) == ended["entries"]
    return records, ended


async def test_every_line_ends_with_one_result_or_one_error(yard: Yard) -> None:
    """Succeeded, failed and bad lines: one bad line zeroes nothing and fails no other."""
    batch = (await yard.submit(lines(9) + BAD)).batch
    assert await yard.admit(batch) == list(range(1, 10))
    await yard.end(batch, range(1, 8), cost=5)
    await yard.end(batch, (8, 9), "failed", cost=3)
    assert await yard.keeper.tick() == 10
    records, ended = await lines_and_total(yard, batch)
    assert ended["status"] == "completed"
    assert {"in_progress", "finalizing", "completed"} <= ended["at"].keys()
    assert [record["line"] for record in records] == list(range(1, 11))
    assert [record["error"] is None for record in records] == [True] * 7 + [False] * 3
    assert ended["counts"] == {"succeeded": 7, "failed": 2, "cancelled": 0, "expired": 0, "bad": 1}
    assert (ended["cost_nano_usd"], ended["usage"]["input_tokens"]) == (7 * 5 + 2 * 3, 9 * 3)


async def test_polling_and_counting_again_bills_nothing_twice(yard: Yard) -> None:
    batch = (await yard.submit(lines(5))).batch
    await yard.end(batch, await yard.admit(batch, 3))
    others = [Bookkeeper(yard.store, yard.batches, reply=yard._nobody) for _ in range(3)]
    await asyncio.gather(yard.keeper.tick(), *(other.tick() for other in others))
    for _ in range(3):
        await yard.keeper.tick()
        await yard.batches.entries(batch["_id"], 0)
        _, now = await lines_and_total(yard, batch)
        assert (now["cost_nano_usd"], now["entries"]) == (21, 3)


async def test_a_bookkeeper_that_dies_in_the_middle_has_done_nothing(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = (await yard.submit(lines(5) + BAD)).batch
    await yard.end(batch, await yard.admit(batch))

    class Dies(Exception):
        """As SIGKILL would."""

    async def dies(*_: Any, **__: Any) -> None:
        raise Dies

    with monkeypatch.context() as patch:
        patch.setattr(yard.batches._ledger, "insert_one", dies, raising=False)
        with pytest.raises(Dies):
            await yard.keeper.tick()
    assert (await yard.batch(batch["_id"]))["entries"] == 0
    await yard.keeper.tick()
    _, ended = await lines_and_total(yard, batch)
    assert (ended["status"], ended["cost_nano_usd"]) == ("completed", 35)


async def test_counting_meets_no_worker_that_is_still_settling_a_line(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transaction that has touched a run keeps its worker waiting, and one that meets the worker's write is done all
    over: under load more than half of them were, and counting fell behind by hundreds of lines."""
    batch = (await yard.submit(lines(2) + BAD)).batch
    settled, unsettled = await yard.admit(batch)
    await yard.end(batch, [settled])
    late = await yard.commit_end(batch, unsettled)
    counting, go_on = asyncio.Event(), asyncio.Event()
    insert = yard.batches._ledger.insert_one

    async def waits(*args: Any, **named: Any) -> Any:
        counting.set()
        await go_on.wait()
        return await insert(*args, **named)

    monkeypatch.setattr(yard.batches._ledger, "insert_one", waits, raising=False)
    tick = asyncio.create_task(yard.keeper.tick())
    await counting.wait()
    async with asyncio.timeout(5):
        await finish(yard.store, yard._nobody, late)
    go_on.set()
    assert await tick == 2, "the bad line and the one that was settled"
    assert await yard.keeper.tick() == 1
    _, ended = await lines_and_total(yard, batch)
    assert (ended["status"], ended["cost_nano_usd"]) == ("completed", 14)


async def test_calls_that_a_lost_worker_paid_are_billed_even_after_the_batch_has_ended(yard: Yard) -> None:
    batch = (await yard.submit(lines(2))).batch
    first, second = await yard.admit(batch)
    await yard.store.book_waste((await yard.run(batch, first))["_id"], "t", {"llm_calls": 1, "cost_nano_usd": 100})
    await yard.keeper.tick()
    _, running = await lines_and_total_so_far(yard, batch)
    assert (running["cost_nano_usd"], running["entries"]) == (100, 0), "booked while the line is still under way"
    await yard.end(batch, (first, second))
    await yard.keeper.tick()
    await yard.store.book_waste((await yard.run(batch, second))["_id"], "t", {"llm_calls": 1, "cost_nano_usd": 1000})
    await yard.keeper.tick()
    records, ended = await lines_and_total(yard, batch)
    assert ended["status"] == "completed"
    assert [record["cost_nano_usd"] for record in records] == [107, 1007]
    assert (ended["cost_nano_usd"], ended["waste_nano_usd"], ended["entries"]) == (1114, 1100, 2)


async def lines_and_total_so_far(yard: Yard, batch: BatchDoc) -> tuple[list[Any], BatchDoc]:
    now = await yard.batch(batch["_id"])
    runs = [run async for run in yard.batches.runs_of(batch["_id"])]
    assert sum(spent(run) for run in runs) == now["cost_nano_usd"]
    return runs, now


async def test_results_come_out_once_each_while_the_batch_runs(yard: Yard) -> None:
    batch = (await yard.submit(lines(12) + BAD)).batch
    had: list[Any] = []
    for some in (5, 1, 0, 6):
        await yard.end(batch, reversed(await yard.admit(batch, some)))
        await yard.keeper.tick()
        while page := await yard.batches.entries(batch["_id"], len(had), limit=4):
            had += page
    numbers = [one["batch"]["line"] if "status" in one else one["line"] for one in had]
    assert sorted(numbers) == list(range(1, 14))
    assert await yard.batches.entries(batch["_id"], 13) == []
    for start in range(13):
        (one,) = await yard.batches.entries(batch["_id"], start, limit=1)
        assert one["_id"] == had[start]["_id"], "the order never changes"


async def test_a_named_cursor_is_kept_and_never_goes_back(yard: Yard) -> None:
    batch = (await yard.submit(lines(1))).batch
    assert await yard.batches.cursor(batch["_id"], "ann") == 0
    await asyncio.gather(*(yard.batches.move_cursor(batch["_id"], "ann", to) for to in (3, 9, 5)))
    assert await yard.batches.cursor(batch["_id"], "ann") == 9
    assert await yard.batches.cursor(batch["_id"], "bob") == 0


async def test_past_its_window_finished_lines_are_billed_and_the_others_are_errors(yard: Yard) -> None:
    """Waiting lines end as never started, lines under way are cancelled with what they have cost."""
    window = yard.store.now() + timedelta(hours=1)
    batch = (await yard.submit(lines(1200) + BAD, complete_by=window)).batch
    done = await yard.admit(batch, 3)
    await yard.end(batch, done)
    under_way = await yard.admit(batch, 2)
    paid = (await yard.run(batch, under_way[0]))["_id"]
    await yard.store.book_waste(paid, "t", {"llm_calls": 1, "cost_nano_usd": 50})
    await yard.keeper.tick()
    assert (await yard.batch(batch["_id"]))["status"] == "in_progress"
    yard.ahead = timedelta(hours=1)
    await yard.keeper.tick()
    ending = await yard.batch(batch["_id"])
    assert (ending["status"], ending["ending"]) == ("finalizing", "expired")
    assert await yard.admit(batch) == [], "a batch that ends is closed"
    await yard.schedule()  # the ordinary cancel of what is under way
    await yard.keeper.tick()
    await yard.keeper.tick()
    records, ended = await lines_and_total(yard, batch)
    assert (ended["status"], ended["live"]) == ("expired", False)
    assert ended["counts"] == {"succeeded": 3, "failed": 0, "cancelled": 0, "expired": 1197, "bad": 1}
    assert ended["cost_nano_usd"] == 3 * 7 + 50
    assert {record["error"]["code"] for record in records[3:1200]} == {EXPIRED}
    assert {"finalizing", "expired"} <= ended["at"].keys()
    run = await yard.run(batch, 900)
    assert (run["status"], run["events"], run["next_due"]) == ("cancelled", [], None)
    assert "backlog" not in run
    assert [event["type"] async for event in yard.store.audit_events(run["_id"])] == ["run.accepted", "run.cancelled"]


async def test_cancel_ends_what_waits_at_once_and_what_runs_by_the_ordinary_cancel(yard: Yard) -> None:
    batch = (await yard.submit(lines(20))).batch
    await yard.end(batch, await yard.admit(batch, 2))
    await yard.admit(batch, 3)
    assert await yard.batches.move(batch["_id"], ["in_progress"], "cancelling", ending="cancelled")
    assert await yard.admit(batch) == []
    await yard.keeper.tick()
    await yard.schedule()
    await yard.keeper.tick()
    await yard.keeper.tick()
    records, ended = await lines_and_total(yard, batch)
    assert ended["status"] == "cancelled"
    assert {"cancelling", "cancelled"} <= ended["at"].keys()
    assert (ended["counts"]["succeeded"], ended["counts"]["cancelled"]) == (2, 18)
    assert [record["error"] and record["error"]["code"] for record in records] == [None] * 2 + ["batch_cancelled"] * 18


async def test_a_persons_pause_outlasts_a_higher_budget(yard: Yard) -> None:
    batch = (await yard.submit(lines(2), budget_nano_usd=5)).batch
    by_budget: Pause = {"by": "budget", "at": yard.store.now()}
    by_person: Pause = {"by": "person", "at": yard.store.now()}
    assert await yard.batches.pause(batch["_id"], by_budget)
    assert await yard.batches.pause(batch["_id"], by_person)
    assert await yard.batches.pause(batch["_id"], by_budget) is None
    raised = await yard.batches.set_budget(batch["_id"], 1_000)
    assert raised is not None
    assert (raised["budget_nano_usd"], raised["paused"] and raised["paused"]["by"]) == (1_000, "person")
    assert await yard.admit(batch) == []
    assert await yard.batches.pause(batch["_id"], None)
    assert await yard.batches.pause(batch["_id"], by_budget)
    raised = await yard.batches.set_budget(batch["_id"], 2_000)
    assert raised is not None
    assert raised["paused"] is None


async def test_a_paused_batch_is_closed_and_finishes_what_is_under_way(yard: Yard) -> None:
    batch = (await yard.submit(lines(6))).batch
    first = await yard.admit(batch, 2)
    assert await yard.batches.pause(batch["_id"], {"by": "person", "at": yard.store.now()})
    assert await yard.batches.pause(batch["_id"], {"by": "person", "at": yard.store.now()}) is None
    assert await yard.admit(batch) == []
    await yard.end(batch, first)
    await yard.keeper.tick()
    assert (await yard.batch(batch["_id"]))["entries"] == 2
    assert await yard.batches.pause(batch["_id"], None)
    assert await yard.admit(batch) == [3, 4, 5, 6]


async def test_a_budget_stops_admission_before_it_is_overrun_and_raising_it_goes_on(yard: Yard) -> None:
    batch = (await yard.submit(lines(30), budget_nano_usd=100)).batch
    for _ in range(30):
        admitted = await yard.admit(batch)
        now = await yard.batch(batch["_id"])
        assert now["cost_nano_usd"] + 9 * len(admitted) <= 100 or now["entries"] == 0
        await yard.end(batch, admitted[:1], cost=9)
        rest = admitted[1:]
        assert await yard.admit(batch) == [], "what has ended and is not booked yet counts as well"
        await yard.end(batch, rest, cost=9)
        await yard.keeper.tick()
    stopped = await yard.batch(batch["_id"])
    assert (stopped["cost_nano_usd"], stopped["entries"]) == (99, 11)
    assert stopped["paused"] is not None
    assert stopped["paused"]["by"] == "budget"
    await yard.batches.set_budget(batch["_id"], 1000)
    await yard.all_through(batch, cost=9)
    _, ended = await lines_and_total(yard, batch)
    assert (ended["status"], ended["cost_nano_usd"]) == ("completed", 270)


async def test_openai_lines_give_openai_results(yard: Yard) -> None:
    from openai.types import Batch
    from openai.types.chat import ChatCompletion

    body = {"model": "agentq/default", "messages": [{"role": "user", "content": "hello"}]}
    asked = [{"custom_id": f"c{n}", "method": "POST", "url": "/v1/chat/completions", "body": body} for n in (1, 2)]
    batch = (await yard.submit("\n".join(map(json.dumps, asked)).encode() + b"\n" + BAD)).batch
    assert batch["format"] == "openai"
    await yard.all_through(batch)
    ended = await yard.batch(batch["_id"])
    for one in (await yard.results(ended))[:2]:
        is_error, record = output.of_run(one, "openai")
        assert not is_error
        ChatCompletion.model_validate(record["response"]["body"], strict=True)
    read = Batch.model_validate(output.of_batch(ended), strict=True)
    assert read.request_counts is not None
    assert (read.status, read.request_counts.completed, read.request_counts.failed) == ("completed", 2, 1)


async def test_what_is_in_flight_is_counted_by_an_index_and_never_by_a_scan(yard: Yard) -> None:
    """The cost of admission's question and of counting follows what is in flight, not what the batch holds."""
    batch = (await yard.submit(lines(200))).batch
    await yard.end(batch, (await yard.admit(batch, 1)), cost=5)
    await yard.admit(batch, 3)
    db = yard.store._db
    await db.command("profile", 2)
    try:
        assert await yard.batches.under_way(batch["_id"]) == 4
        await yard.batches.tally()
    finally:
        await db.command("profile", 0)
    seen = await db["system.profile"].find({"ns": f"{db.name}.runs"}).to_list()
    examined = [(one.get("docsExamined", 0), one.get("keysExamined", 0)) for one in seen]
    assert examined
    assert max(max(pair) for pair in examined) <= 10, examined


@pytest.mark.parametrize(
    ("status", "reason"),
    [("succeeded", ""), ("failed", ""), ("rejected", ""), ("cancelled", "x"), ("cancelled", EXPIRED), ("running", "")],
)
async def test_what_is_kept_of_a_counted_run_is_how_it_was_counted(yard: Yard, status: str, reason: str) -> None:
    """The database's expression and the pure function say the same; a run that goes on keeps its earlier end."""
    batch = (await yard.submit(lines(1))).batch
    for before in (None, "failed"):
        written = {"status": status, "cancel": {"reason": reason}, "tally": True, "booked": None, "next_due": None}
        written["booked"] = None if before is None else {"end": before, "usage": {}, "waste": {}}
        await yard.store.runs.update_one({}, {"$set": written})
        await yard.batches.tally()
        run = await yard.store.runs.find_one({})
        assert run is not None
        assert run["booked"]["end"] == (line_end(run) or before)
        assert "tally" not in run
    assert (await yard.batch(batch["_id"]))["live"]
