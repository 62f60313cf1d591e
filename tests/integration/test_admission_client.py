"""What a client does at the door: turns of a conversation, keys, times, limits; against the real MongoDB."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from agentq.client import Client, Handle
from agentq.engine import advance
from agentq.engine.audit import check
from agentq.engine.commit import plan
from agentq.engine.repair import pause
from agentq.errors import (
    AgentqError,
    Conflict,
    IdempotencyConflict,
    InvalidRequest,
    NotFound,
    QueueFull,
    Unavailable,
)
from agentq.protocol import Request
from agentq.runtime.runtime import finish
from agentq.schedule import next_time
from agentq.store.limits import Limits
from agentq.store.mongo import MongoStore
from agentq.turns import Turns
from schemas.run import RUN, RunDoc
from tests.unit.runtime.world import Shop, make_bundle

pytestmark = pytest.mark.servers

BUNDLE = make_bundle(Shop().toolbox())


@pytest.fixture
async def store(mongo_url: str, database: str) -> AsyncIterator[MongoStore]:
    made = MongoStore(mongo_url, database)
    await made.open()
    await made.register([BUNDLE])
    yield made
    await made._client.drop_database(database)
    await made.close()


@pytest.fixture
def client(store: MongoStore, mongo_url: str, database: str) -> Iterator[Client]:
    with Client(mongo_url, None, database) as client:
        yield client


async def load(store: MongoStore, run_id: str) -> RunDoc:
    run = await store.load(run_id)
    assert run is not None
    RUN.validate_python(run)
    assert check(run_id, run["audit"], run["events"]) == []
    return run


async def end(store: MongoStore, run_id: str) -> None:
    """The run is cancelled, with all that follows an end."""

    async def reply(run: RunDoc) -> None:
        """Nobody waits."""

    run = await load(store, run_id)
    planned = plan(run, advance.cancel(run, 1), now=store.now())
    await store.commit(planned)
    await finish(store, reply, planned.after)


async def gate(store: MongoStore, **told: Any) -> None:
    """What the leader of the admission tells."""
    doc = {"at": store.now(), "waiting": [], "room": 100, "capped": [], "lines": {}, **told}
    await store.backlog.remember("gate", doc)


async def test_without_an_admission_all_goes_straight_but_batches(client: Client, store: MongoStore) -> None:
    for priority in ("interactive", "standard"):
        run = client.submit("x", priority=priority)
        assert (run.position, run.estimated_start_s) == (0, 0.0)
        assert "backlog" not in await load(store, run.run_id)
    run = client.submit("x", priority="batch", urgency=8)
    stored = await load(store, run.run_id)
    assert stored["backlog"]["rank"] == 1
    assert stored["steps"]["s1"]["hints"] == 0
    assert not stored["in_flight"]


async def test_an_old_word_of_the_leader_counts_as_none(client: Client, store: MongoStore) -> None:
    await gate(store, waiting=["standard"], at=store.now() - timedelta(minutes=1))
    assert client.submit("x").position == 0


async def test_while_others_wait_or_there_is_no_room_requests_wait_too(client: Client, store: MongoStore) -> None:
    await gate(store, waiting=["standard"], room=2, capped=["poor", "rich|small"], rates={"standard": 2.0})
    waits = [client.submit("x") for _ in range(3)]
    assert [run.position for run in waits] == [0, 1, 2]
    assert waits[2].estimated_start_s == 1.5
    urgent = client.submit("x", urgency=9)
    assert (urgent.position, waits[0].position) == (0, 1)
    straight = [client.submit("x", priority="interactive", tenant="rich") for _ in range(3)]
    flying = [(await load(store, run.run_id))["in_flight"] for run in straight]
    assert flying == [True, True, False], "there was room for two"
    for request in ({"tenant": "poor"}, {"tenant": "rich", "key": "small"}):
        run = client.submit("x", priority="interactive", **request)
        assert not (await load(store, run.run_id))["in_flight"]


async def test_where_caps_decide_nobody_knows_when_a_run_starts(client: Client, store: MongoStore) -> None:
    await gate(store, waiting=["standard"], capped=["poor"], rates={"standard": 2.0})
    assert [client.submit("x", tenant=tenant).estimated_start_s for tenant in ("poor", "rich")] == [None, 0.5]


async def test_nobody_is_told_of_a_start_in_years(client: Client, store: MongoStore) -> None:
    await gate(store, waiting=["standard"], rates={"standard": 1e-9})
    assert client.submit("x").estimated_start_s is None


async def test_an_urgent_request_needs_no_room_but_what_is_reserved_for_its_class(
    client: Client, store: MongoStore
) -> None:
    """A batch that keeps the window full makes nobody wait for the admission's next look."""
    await gate(store, waiting=["batch"], room=0, reserved={"interactive": 2, "standard": 1, "batch": 9})
    runs = [client.submit("x", priority="interactive") for _ in range(3)]
    runs += [client.submit("x") for _ in range(2)]
    flying = [(await load(store, run.run_id))["in_flight"] for run in runs]
    assert flying == [True, True, False, True, False]


async def test_over_the_queue_limit_a_request_is_refused_with_a_time_to_come_back(
    client: Client, store: MongoStore
) -> None:
    await gate(store, lines={"t": 3}, rates={"batch": 0.5})
    for _ in range(3):
        client.submit("x", tenant="t", priority="batch")
    with pytest.raises(QueueFull) as caught:
        client.submit("x", tenant="t", priority="batch")
    assert caught.value.code == "queue_full"
    assert 1 <= caught.value.retry_after_s <= 60
    assert caught.value.as_dict()["retry_after_s"] == caught.value.retry_after_s
    many = list(client.submit_many([{"input": "x", "tenant": "t"}, {"input": "x", "tenant": "u"}]))
    assert isinstance(many[0], QueueFull)
    assert not isinstance(many[1], Exception)


async def test_enqueue_the_next_turn_waits_until_the_one_before_has_ended(client: Client, store: MongoStore) -> None:
    runs = [client.submit("x", conversation="c") for _ in range(3)]
    docs = [await load(store, run.run_id) for run in runs]
    assert [doc["turn"] for doc in docs] == [1, 2, 3]
    assert ["backlog" in doc for doc in docs] == [False, True, True]
    await end(store, runs[0].run_id)
    assert (await load(store, runs[1].run_id))["backlog"]["class"] == "standard"
    assert (await load(store, runs[2].run_id))["backlog"]["hold"] == "turn"
    other = client.submit("x", conversation="c", tenant="another")
    assert "backlog" not in await load(store, other.run_id)


async def test_after_an_end_the_next_request_of_the_conversation_goes_straight(
    client: Client, store: MongoStore
) -> None:
    """Also where nobody has looked after the end yet."""
    first = client.submit("x", conversation="c")
    run = await load(store, first.run_id)
    await store.commit(plan(run, advance.cancel(run, 1), now=store.now()))
    assert "backlog" not in await load(store, client.submit("x", conversation="c").run_id)


async def test_reject_refuses_while_a_run_of_the_conversation_is_under_way(client: Client, store: MongoStore) -> None:
    first = client.submit("x", conversation="c")
    with pytest.raises(Conflict) as caught:
        client.submit("x", conversation="c", conversation_policy="reject")
    assert caught.value.code == "conversation_busy"
    assert caught.value.details["run_id"] == first.run_id
    await end(store, first.run_id)
    client.submit("x", conversation="c", conversation_policy="reject")


async def test_interrupt_cancels_the_run_under_way_and_goes_next(client: Client, store: MongoStore) -> None:
    first = client.submit("x", conversation="c")
    second = client.submit("x", conversation="c")
    third = client.submit("x", conversation="c", conversation_policy="interrupt")
    cancelled = await load(store, first.run_id)
    assert cancelled["cancel"] is not None
    assert cancelled["cancel"]["reason"] == "interrupted by a newer request"
    await end(store, first.run_id)
    assert "class" in (await load(store, third.run_id))["backlog"]
    assert "hold" in (await load(store, second.run_id))["backlog"]


async def test_merge_joins_the_turn_that_still_waits(client: Client, store: MongoStore) -> None:
    client.submit("one", conversation="c")
    second = client.submit("two", conversation="c", conversation_policy="merge")
    third = client.submit("three", conversation="c", conversation_policy="merge", idempotency_key="k")
    assert third.run_id == second.run_id
    run = await load(store, second.run_id)
    assert run["input"] == "two\n\nthree"
    assert [event["type"] for event in run["events"]] == ["run.accepted", "run.merged"]
    again = client.submit("three", conversation="c", conversation_policy="merge", idempotency_key="k")
    assert again.run_id == second.run_id
    assert (await load(store, second.run_id))["input"] == "two\n\nthree", "once"
    with pytest.raises(IdempotencyConflict):
        client.submit("four", conversation="c", conversation_policy="merge", idempotency_key="k")
    large = client.submit("y" * 262_140, conversation="c", conversation_policy="merge")
    assert large.run_id != second.run_id, "too long together: the next turn"


async def test_a_request_that_was_known_leaves_the_conversation_free(client: Client, store: MongoStore) -> None:
    first = client.submit("x", conversation="c", idempotency_key="k")
    await end(store, first.run_id)
    assert client.submit("x", conversation="c", idempotency_key="k").run_id == first.run_id
    assert "backlog" not in await load(store, client.submit("x", conversation="c").run_id)


async def test_debounce_only_the_last_of_a_flurry_runs(client: Client, store: MongoStore) -> None:
    runs = [client.submit(f"edit {number}", debounce_key="doc-7", debounce_s=30.0) for number in range(5)]
    assert len({run.run_id for run in runs}) == 1
    run = await load(store, runs[0].run_id)
    assert run["input"] == "edit 4"
    assert run["backlog"]["hold"] == "time"
    assert timedelta(seconds=20) < run["backlog"]["at"] - store.now() <= timedelta(seconds=30)
    other = client.submit("edit", debounce_key="doc-7", tenant="another")
    assert other.run_id != runs[0].run_id


async def test_singleton_one_lives_at_a_time(client: Client, store: MongoStore) -> None:
    first = client.submit("x", singleton_key="report")
    assert client.submit("y", singleton_key="report").run_id == first.run_id
    many = list(client.submit_many([{"input": "z", "singleton_key": "report"}] * 2))
    assert [getattr(one, "run_id", one) for one in many] == [first.run_id] * 2
    await end(store, first.run_id)
    assert client.submit("y", singleton_key="report").run_id != first.run_id


async def test_times_are_kept_in_mongodb(client: Client, store: MongoStore) -> None:
    at = datetime.now(UTC) + timedelta(hours=2)
    run = client.submit("x", at=at, expires_at=(at + timedelta(hours=1)).isoformat())
    stored = await load(store, run.run_id)
    assert stored["backlog"]["hold"] == "time"
    assert abs(stored["deadline_at"] - at - timedelta(hours=1)) < timedelta(seconds=1)
    assert stored["next_due"] == stored["deadline_at"]
    assert run.estimated_start_s == pytest.approx(7200, abs=5)
    past = client.submit("x", at=datetime.now(UTC) - timedelta(hours=1))
    assert "backlog" not in await load(store, past.run_id)


@pytest.mark.parametrize(("delay_s", "lives_s"), [(None, -1), (None, 0), (3600, 360), (60, 60)])
def test_a_request_that_expires_before_it_may_start_is_refused(
    client: Client, delay_s: float | None, lives_s: float
) -> None:
    expires_at = client._now() + timedelta(seconds=lives_s)
    with pytest.raises(InvalidRequest) as caught:
        client.submit("x", delay_s=delay_s, expires_at=expires_at)
    assert caught.value.code == "expires_before_start"
    assert caught.value.hint
    body = {"input": "x", "delay_s": delay_s, "expires_at": expires_at}
    (refused,) = client.submit_many([body])
    assert isinstance(refused, InvalidRequest)


async def test_a_repeated_request_is_known_after_it_has_expired(client: Client, store: MongoStore) -> None:
    request = {"input": "x", "idempotency_key": "k", "expires_at": client._now() + timedelta(seconds=60)}
    first = client.submit(**request)
    connected = client._connect()
    connected.offset += timedelta(minutes=2)
    assert client.submit(**request).run_id == first.run_id
    with pytest.raises(IdempotencyConflict):
        client.submit(**{**request, "input": "y"})


async def test_a_recurring_request_is_handed_in_once_a_time(client: Client, store: MongoStore) -> None:
    schedule_id = client.schedule({"input": "report", "tenant": "t"}, "*/5 * * * *", "Europe/Zurich")
    assert await store.backlog.schedules(10) == []
    (schedule,) = client.schedules()
    due = store.now() - timedelta(minutes=20)
    await store.backlog._schedules.update_one({"_id": schedule_id}, {"$set": {"due": due}})
    (late,) = await store.backlog.schedules(10)
    client.hand_in(late)
    client.hand_in(late)  # another scheduler, or after a crash
    found = await store.latest({"tenant": "t"}, 10)
    assert [run["input"] for run in found] == ["report"]
    (schedule,) = client.schedules()
    assert schedule["due"] > store.now(), "times that were missed are made up for once"
    assert schedule["last_run"] == found[0]["_id"]
    client.drop_schedule(schedule_id)
    assert client.schedules() == []
    with pytest.raises(NotFound):
        client.drop_schedule(schedule_id)


def test_what_means_nothing_is_refused(client: Client) -> None:
    for cron, zone, code in (
        ("61 * * * *", "UTC", "bad_cron"),
        ("* * *", "UTC", "bad_cron"),
        ("0 0 30 2 *", "UTC", "bad_cron"),
        ("0 9 * * *", "Mars/Olympus", "bad_timezone"),
        ("0 9 * * *", "../../etc/passwd", "bad_timezone"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            client.schedule({"input": "x"}, cron, zone)
        assert caught.value.code == code, cron
    with pytest.raises(InvalidRequest) as caught:
        client.accept(Request(input="x", singleton_key="s"), reply={"task_id": "t"})
    assert caught.value.code == "not_for_ask"


def test_cron_follows_the_clocks_of_its_time_zone() -> None:
    winter = next_time("30 9 * * *", "Europe/Zurich", datetime(2026, 1, 1, tzinfo=UTC))
    summer = next_time("30 9 * * *", "Europe/Zurich", datetime(2026, 7, 1, tzinfo=UTC))
    assert (winter, summer) == (datetime(2026, 1, 1, 8, 30, tzinfo=UTC), datetime(2026, 7, 1, 7, 30, tzinfo=UTC))


async def test_limits_change_with_their_event_and_any_edit_of_the_chain_shows(store: MongoStore) -> None:
    limits = Limits(store, "ada")
    await limits.set("acme", {"weight": 3.0, "in_flight": 10})
    await limits.set("acme", {"in_flight": None, "spend": 5})
    assert (await limits.set("acme|k1", {"per_minute": 60}))[1]
    assert (await limits.all())["acme"] == (3.0, None, 5, None, None)
    assert (await store.backlog.limits()).keys() == {"acme", "acme|k1"}
    await limits.clear("acme")
    with pytest.raises(NotFound):
        await limits.clear("acme")
    for wrong in ({"weight": 0.0}, {"weight": math.inf}, {"weight": math.nan}, {"waiting": -1}, {"in_flight": 2**63}):
        with pytest.raises(InvalidRequest):
            await limits.set("acme", wrong)
    for nothing_new in ({"per_minute": 60}, {"waiting": None}):
        assert await limits.set("acme|k1", nothing_new) == ((1.0, None, None, 60, None), False)
    assert await limits.set("nobody", {"waiting": None}) == ((1.0, None, None, None, None), False)
    events, problems = await limits.history()
    assert problems == []
    assert [(event["type"], event["data"]["by"], event["data"]["name"]) for event in events] == [
        ("limits.set", "ada", "acme"), ("limits.set", "ada", "acme"), ("limits.set", "ada", "acme|k1"),
        ("limits.cleared", "ada", "acme"),
    ]  # fmt: skip
    assert events[1]["data"]["before"] == {"weight": 3.0, "in_flight": 10}
    assert events[1]["data"]["after"] == {"weight": 3.0, "spend": 5}
    log = store.runs.database["limits_audit"]
    await log.update_one({"_id": "limits:000002"}, {"$set": {"data.by": "eve"}})
    assert (await limits.history())[1]
    await log.delete_one({"_id": "limits:000004"})
    assert len((await limits.history())[1]) > 1


async def test_a_repeated_request_is_known_before_the_policy_of_its_conversation_acts(
    client: Client, store: MongoStore
) -> None:
    """Interrupting does not cancel the request's own run, rejecting does not refuse it because of itself."""
    for policy in ("interrupt", "reject", "enqueue"):
        request = {"input": "x", "conversation": policy, "conversation_policy": policy, "idempotency_key": policy}
        first = client.submit(**request)
        assert client.submit(**request).run_id == first.run_id
        (again,) = client.submit_many([request])
        assert isinstance(again, Handle)
        assert again.run_id == first.run_id
        assert (await load(store, first.run_id))["cancel"] is None
        with pytest.raises(IdempotencyConflict):
            client.submit(**{**request, "input": "y"})
    conversations = store._db["conversations"]
    assert [doc["turns"] async for doc in conversations.find({}, {"turns": 1})] == [1, 1, 1], "no turn was taken"


async def test_of_two_at_once_with_one_key_the_later_does_not_interrupt_itself(
    client: Client, store: MongoStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first was stored only after the second had looked for it."""
    known = Turns.known
    for policy in ("interrupt", "reject"):
        request = {"input": "x", "conversation": policy, "conversation_policy": policy, "idempotency_key": policy}
        first = client.submit(**request)
        looks: list[str] = []

        def later(self: Turns, asked: Request, looks: list[str] = looks) -> Any:
            looks.append("look")
            return None if len(looks) == 1 else known(self, asked)

        with monkeypatch.context() as patch:
            patch.setattr(Turns, "known", later)
            assert client.submit(**request).run_id == first.run_id
        assert (await load(store, first.run_id))["cancel"] is None


async def test_a_repeated_request_is_known_when_the_queue_is_full(client: Client, store: MongoStore) -> None:
    await gate(store, lines={"t": 1}, waiting=["standard"])
    first = client.submit("x", tenant="t", idempotency_key="k")
    with pytest.raises(QueueFull):
        client.submit("x", tenant="t", idempotency_key="other")
    assert client.submit("x", tenant="t", idempotency_key="k").run_id == first.run_id


async def test_a_plain_request_is_not_looked_up_first(
    client: Client, store: MongoStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its key is looked at by the unique index alone: the usual way costs no extra read."""

    def looks(self: Turns, request: Request) -> None:
        raise AssertionError("looked up")

    await gate(store, lines={"t": 1})
    monkeypatch.setattr(Turns, "known", looks)
    client.submit("x", idempotency_key="k")
    client.submit("x", conversation="c")


async def test_a_repeated_merge_that_made_its_own_run_is_not_appended_to_it(client: Client, store: MongoStore) -> None:
    client.submit("one", conversation="c")
    request = {"input": "two", "conversation": "c", "conversation_policy": "merge", "idempotency_key": "k"}
    runs = [client.submit(**request) for _ in range(2)]
    assert runs[0].run_id == runs[1].run_id
    assert (await load(store, runs[0].run_id))["input"] == "two"


async def test_a_late_repetition_does_not_replace_what_came_after_it(client: Client, store: MongoStore) -> None:
    bodies = [{"input": f"edit {n}", "debounce_key": "doc", "debounce_s": 30.0, "idempotency_key": f"k{n}"}
              for n in range(3)]  # fmt: skip
    runs = [client.submit(**body).run_id for body in [*bodies, bodies[0], bodies[1]]]
    assert len({*runs}) == 1
    assert (await load(store, runs[0]))["input"] == "edit 2"


def at_the_same_time(request: dict[str, Any], client: Client) -> list[str]:
    with ThreadPoolExecutor(8) as pool:
        return [run.run_id for run in pool.map(lambda _: client.submit(**request), range(8))]


async def test_of_merges_at_once_with_one_key_one_is_appended(client: Client, store: MongoStore) -> None:
    client.submit("one", conversation="c")
    second = client.submit("two", conversation="c")
    request = {"input": "three", "conversation": "c", "conversation_policy": "merge", "idempotency_key": "k"}
    runs = await asyncio.to_thread(at_the_same_time, request, client)
    assert {*runs} == {second.run_id}
    assert (await load(store, second.run_id))["input"] == "two\n\nthree"


async def test_a_merge_joins_a_turn_that_may_go_but_has_not_been_let_in(client: Client, store: MongoStore) -> None:
    """And never one that is to wait for its time."""
    await gate(store, waiting=["standard"])
    first = client.submit("one", conversation="c")
    client.submit("later", conversation="c", delay_s=600.0)
    merged = client.submit("two", conversation="c", conversation_policy="merge")
    assert merged.run_id == first.run_id
    assert (await load(store, first.run_id))["input"] == "one\n\ntwo"


async def test_what_the_client_looks_for_is_found_by_an_index(client: Client, store: MongoStore) -> None:
    """However long a conversation is, and however much of others waits."""
    await gate(store, waiting=["standard"], lines={"a": 100, "a|small": 100})
    for number in range(30):
        client.submit("x", tenant="b", key=f"k{number}")
        client.submit("x", tenant="a.b", debounce_key=f"k{number}", debounce_s=600.0)
    runs = [client.submit("x", conversation="c") for _ in range(20)]
    for run in runs:
        await end(store, run.run_id)
    await store._db.command({"profile": 2, "filter": {"op": {"$in": ["query", "command"]}}})
    asked = {"tenant": "a", "idempotency_key": "k", "key": "small"}
    client.submit("x", debounce_key="d", **asked)
    client.submit("x", conversation="c", conversation_policy="merge", idempotency_key="k")
    await store._db.command({"profile": 0})
    seen = [
        doc async for doc in store._db["system.profile"].find({"ns": {"$regex": "runs$"}, "appName": "agentq-client"})
    ]
    assert len(seen) >= 6
    assert [
        doc["command"] for doc in seen if doc.get("keysExamined", 0) > 25 or doc.get("docsExamined", 0) > 1
    ] == [], [
        (doc.get("planSummary"), doc.get("keysExamined"), doc.get("docsExamined"), doc["command"]) for doc in seen
    ]
    assert not any("COLLSCAN" in doc.get("planSummary", "") for doc in seen)


async def test_turns_and_times_that_wait_count_in_the_queue_limit(client: Client, store: MongoStore) -> None:
    client.submit("x", tenant="t", conversation="c")
    client.submit("x", tenant="t", conversation="c")
    client.submit("x", tenant="t", delay_s=60.0, key="small")
    client.submit("x", tenant="t", priority="batch", key="large")
    client.submit("x", tenant="t.b", delay_s=60.0)
    await gate(store, lines={"t": 3})
    client._connect().gate._read = -1.0  # a second later
    with pytest.raises(QueueFull):
        client.submit("x", tenant="t")


async def test_a_paused_run_is_replaced_too(client: Client, store: MongoStore) -> None:
    first = client.submit("x", debounce_key="doc", debounce_s=30.0)
    run = await load(store, first.run_id)
    await store.commit(plan(run, pause(run, "", "ann", store.now()), now=store.now()))
    assert client.submit("y", debounce_key="doc", debounce_s=30.0).run_id == first.run_id
    run = await load(store, first.run_id)
    assert (run["input"], run["status"]) == ("y", "paused")


async def test_a_request_that_can_neither_join_nor_be_stored_is_refused_in_the_end(
    client: Client, store: MongoStore
) -> None:
    first = client.submit("x", debounce_key="doc", debounce_s=30.0)
    await store.runs.update_one({"_id": first.run_id}, {"$set": {"status": "waiting"}})  # as no run of today is
    with pytest.raises(Unavailable) as caught:
        client.submit("y", debounce_key="doc", debounce_s=30.0)
    assert caught.value.code == "contended"


async def test_a_debounced_request_does_not_change_what_the_waiting_one_is(client: Client, store: MongoStore) -> None:
    """Its workflow, class, key and budget stay; its deadline is that of the newest."""
    second = BUNDLE.workflow.model_copy(update={"name": "second"})
    await store.register([BUNDLE.model_copy(update={"workflow": second})])
    first = client.submit("x", debounce_key="doc", debounce_s=30.0)
    for other in ({"workflow": "second"}, {"priority": "batch"}, {"key": "k"}, {"budget_usd": 0.5}):
        with pytest.raises(Conflict) as caught:
            client.submit("y", debounce_key="doc", debounce_s=30.0, **other)
        assert caught.value.code == "debounce_differs"
        assert caught.value.details["run_id"] == first.run_id
    assert (await load(store, first.run_id))["input"] == "x"
    client.submit("z", debounce_key="doc", debounce_s=30.0, deadline_s=60.0)
    run = await load(store, first.run_id)
    assert abs(run["deadline_at"] - store.now() - timedelta(seconds=90)) < timedelta(seconds=5)
    assert run["next_due"] == run["deadline_at"]


def test_what_is_refused_is_told_without_the_callers_words(client: Client) -> None:
    """A conversation or a key may be a mail address, and a message goes to logs."""
    client.submit("x", conversation="ann@example.com", idempotency_key="mail-of-ann@example.com")
    for changed in ({"conversation_policy": "reject"}, {"idempotency_key": "mail-of-ann@example.com"}):
        with pytest.raises(AgentqError) as caught:
            client.submit("y", conversation="ann@example.com", **changed)
        assert "ann" not in f"{caught.value} {caught.value.as_dict()}"


async def test_a_conversation_without_overlap_passes_its_turn_with_one_write(client: Client, store: MongoStore) -> None:
    """And looks for the next turn as soon as one has ever had to wait."""
    first = client.submit("x", conversation="c")
    await store._db.command({"profile": 2, "filter": {"appName": "agentq"}})
    run = await load(store, first.run_id)
    await store.pass_turn(run)
    await store._db.command({"profile": 0})
    ours = {"ns": {"$regex": "(runs|conversations)$"}, "op": {"$in": ["query", "update"]}}
    seen = [(doc["op"], doc["ns"].split(".")[1]) async for doc in store._db["system.profile"].find(ours)]
    assert seen == [("query", "runs"), ("update", "conversations")], "the first is ours, from loading the run"


async def test_what_a_run_reads_of_its_conversation_is_found_by_an_index(client: Client, store: MongoStore) -> None:
    for number in range(30):
        client.submit("x", conversation=f"c{number}")
    run = await load(store, client.submit("x", conversation="c7").run_id)
    await store._db.command({"profile": 2, "filter": {"appName": "agentq", "op": "query"}})
    await store.history(run, 1_000)
    assert len(await store.conversation("default", "c7")) == 2
    await store._db.command({"profile": 0})
    seen = [doc async for doc in store._db["system.profile"].find({"ns": {"$regex": "runs$"}})]
    assert ["COLLSCAN" in doc["planSummary"] for doc in seen] == [False, False]
