"""The client other back ends import, against the real MongoDB and Redis; nothing of the system runs beside it."""

from __future__ import annotations

import base64
import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis as redis_client
from kombu import Connection
from pymongo import MongoClient

from agentq.client import Client, Handle
from agentq.embedded.servers import Server, start_redis
from agentq.engine.audit import check
from agentq.errors import (
    AgentqError,
    Conflict,
    IdempotencyConflict,
    InvalidRequest,
    NotFound,
    Unavailable,
    UnknownWorkflow,
)
from agentq.protocol import Hint, Pool, Request
from agentq.runtime.scheduler import Scheduler
from agentq.store.mongo import MongoStore
from schemas.run import RUN, RunDoc
from tests.unit.runtime.world import Shop, make_bundle

pytestmark = pytest.mark.servers

BUNDLE = make_bundle(Shop().toolbox())
THREADS = 20
CANARY = "zKANARIENVOGELz"


@pytest.fixture
async def store(mongo_url: str, database: str) -> AsyncIterator[MongoStore]:
    """A database with the workflow ``default``, as a worker leaves it at its start."""
    made = MongoStore(mongo_url, database)
    await made.open()
    await made.register([BUNDLE])
    yield made
    await made._client.drop_database(database)
    await made.close()


@pytest.fixture
def connect(store: MongoStore, mongo_url: str, database: str) -> Iterator[Callable[..., Client]]:
    made: list[Client] = []

    def client(broker_url: str | None = None) -> Client:
        made.append(Client(mongo_url, broker_url, database))
        return made[-1]

    yield client
    for one in made:
        one.close()


@pytest.fixture
def client(connect: Callable[..., Client]) -> Client:
    return connect()


@pytest.fixture
def broker(redis: Server) -> Iterator[redis_client.Redis]:
    """The empty Redis that the clients under test publish to."""
    with redis_client.Redis.from_url(redis.url) as connection:
        connection.flushall()
        yield connection
        connection.config_set("maxmemory", 0)


def messages(broker: redis_client.Redis, queue: str) -> list[list[Any]]:
    """The hints of every message in a queue, as a worker would read them."""
    bodies = [json.loads(raw)["body"] for raw in broker.lrange(queue, 0, -1)]
    return [json.loads(base64.b64decode(body))[1]["hints"] for body in bodies]


def at_once(work: Callable[[int], Any], count: int = THREADS) -> list[Any]:
    """Results of so many threads that start together."""
    gate = threading.Barrier(count)

    def one(index: int) -> Any:
        gate.wait()
        return work(index)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


async def tick(store: MongoStore) -> list[tuple[Pool, Hint]]:
    """One look of a scheduler; gives the hints it published."""
    published: list[tuple[Pool, Hint]] = []

    async def publish(hints: Any) -> None:
        published.extend(hints)

    async def no() -> bool:
        return False

    async def reply(run: RunDoc) -> None:
        """Nobody waits."""

    await Scheduler(store, publish, no, name="s", reply=reply, max_attempts=5).tick()
    return published


async def dispatched(store: MongoStore, count: int) -> list[tuple[Pool, Hint]]:
    """The first hints of a scheduler; looks until there are so many, at most a third of a hint's own half minute."""
    hints: list[tuple[Pool, Hint]] = []
    end = time.monotonic() + 10
    while len(hints) < count and time.monotonic() < end:
        hints += await tick(store)
    return hints


async def looked_after(store: MongoStore, run: Handle) -> None:
    """Let a scheduler look until the run has ended and is settled, a few seconds at most."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        await tick(store)
        stored = await store.load(run.run_id)
        if stored is not None and stored["next_due"] is None:
            return


async def test_what_is_submitted_is_stored_whole_and_a_hint_without_any_text_is_out(
    connect: Callable[..., Client], store: MongoStore, redis: Server, broker: redis_client.Redis
) -> None:
    run = connect(redis.url).submit(CANARY, user="C-7", metadata={"ticket": CANARY})
    stored = await store.load(run.run_id)
    RUN.validate_python(stored)
    assert stored is not None
    assert (stored["input"], stored["user"], stored["status"]) == (CANARY, "C-7", "queued")
    assert stored["workflow"] == {"name": "default", "hash": BUNDLE.hash}
    assert messages(broker, "router") == [[[run.run_id, "s1", 1]]]
    assert CANARY not in repr([broker.dump(key) for key in broker.scan_iter()])


async def test_without_a_broker_the_scheduler_dispatches_at_its_next_look(client: Client, store: MongoStore) -> None:
    run = client.submit("hello")
    assert await dispatched(store, 1) == [("router", Hint(run.run_id, "s1", 1))]


def test_the_same_key_with_the_same_request_is_the_same_run(client: Client) -> None:
    first = client.submit("hello", idempotency_key="k")
    assert client.submit("hello", idempotency_key="k").run_id == first.run_id
    assert client.submit("hello", idempotency_key="k2").run_id != first.run_id
    assert client.submit("hello", idempotency_key="k", tenant="other").run_id != first.run_id


def test_the_same_key_with_another_request_is_a_conflict_that_names_the_run(client: Client) -> None:
    first = client.submit("hello", idempotency_key="k")
    with pytest.raises(IdempotencyConflict) as caught:
        client.submit("good bye", idempotency_key="k")
    assert caught.value.details["run_id"] == first.run_id
    assert not caught.value.retryable


async def test_twenty_threads_with_one_key_make_one_run(client: Client, store: MongoStore) -> None:
    runs = {run.run_id for run in at_once(lambda _: client.submit("hello", idempotency_key="k"))}
    assert len(runs) == 1
    assert await store.runs.count_documents({}) == 1


async def test_turns_of_a_conversation_from_twenty_threads_have_no_gap_and_no_repeat(
    client: Client, store: MongoStore
) -> None:
    at_once(lambda index: client.submit(f"message {index}", conversation="c"))
    runs = await store.conversation("default", "c")
    assert [run["turn"] for run in runs] == list(range(1, THREADS + 1))


async def test_conversations_of_two_tenants_never_share_their_count(client: Client, store: MongoStore) -> None:
    """Names may hold slashes: "a" with "b/c" is not "a/b" with "c"."""
    client.submit("x", tenant="a", conversation="b/c")
    client.submit("x", tenant="a/b", conversation="c")
    assert [run["turn"] for run in await store.latest({}, 9)] == [1, 1]


async def test_many_at_once_good_bad_known_and_repeated_come_back_in_order(
    connect: Callable[..., Client], store: MongoStore, redis: Server, broker: redis_client.Redis
) -> None:
    client = connect(redis.url)
    known = client.submit("known", idempotency_key="known")
    broker.flushall()
    results = list(
        client.submit_many(
            [
                {"input": "one", "idempotency_key": "a"},
                {"input": ""},
                {"input": "one", "idempotency_key": "a"},
                {"input": "another", "idempotency_key": "a"},
                {"input": "known", "idempotency_key": "known"},
                {"input": "x", "workflow": "nope"},
                {"input": "x", "metadata": {"n": 2**70}},
                {"input": "two"},
            ],
            chunk=3,
        )
    )
    shown = [type(one).__name__ if isinstance(one, Exception) else "run" for one in results]
    assert shown == [
        "run", "InvalidRequest", "run", "IdempotencyConflict", "run", "UnknownWorkflow", "InvalidRequest", "run"
    ]  # fmt: skip
    one, again, two = results[0], results[2], results[7]
    assert isinstance(one, Handle)
    assert isinstance(again, Handle)
    assert isinstance(two, Handle)
    assert (again.run_id, results[4].run_id) == (one.run_id, known.run_id)  # type: ignore[union-attr]
    assert await store.runs.count_documents({}) == 3
    hinted = [hint[0] for message in messages(broker, "router") for hint in message]
    assert sorted(hinted) == sorted([one.run_id, two.run_id])


async def test_many_stream_in_chunks(client: Client, store: MongoStore) -> None:
    """A handle that has come out is stored, before the rest has even been read."""
    taken = 0

    def requests() -> Iterator[dict[str, Any]]:
        nonlocal taken
        for index in range(1000):
            taken += 1
            yield {"input": f"request {index}"}

    stream = client.submit_many(requests(), chunk=10)
    first = next(stream)
    assert isinstance(first, Handle)
    assert first.status() == "queued"
    assert taken == 10
    assert await store.runs.count_documents({}) == 10
    stream.close()  # type: ignore[attr-defined]


def test_an_unknown_workflow_is_refused_and_the_known_ones_are_named(client: Client) -> None:
    with pytest.raises(UnknownWorkflow, match="default"):
        client.submit("hello", workflow="defualt")


def test_an_invalid_request_never_reaches_the_database() -> None:
    """The check needs no server at all."""
    with pytest.raises(InvalidRequest) as caught:
        Client("mongodb://127.0.0.1:1/").submit(" ")
    assert caught.value.code == "empty_input"


@pytest.mark.parametrize("broker_url", ["redis://127.0.0.1:1/0", "nosuch://127.0.0.1/", "amqp://x:y@127.0.0.1:1//"])
async def test_a_broker_that_cannot_be_reached_costs_no_request(
    connect: Callable[..., Client], store: MongoStore, broker_url: str
) -> None:
    """Accepted all the same, within the time-out of one attempt, and due for the scheduler at once."""
    client = connect(broker_url)
    began = time.monotonic()
    runs = [client.submit(f"hello {index}").run_id for index in range(5)]
    assert time.monotonic() - began < 10
    assert sorted(hint.run_id for _, hint in await dispatched(store, 5)) == sorted(runs)


async def test_a_broker_that_refuses_to_store_costs_no_request(
    connect: Callable[..., Client], store: MongoStore, redis: Server, broker: redis_client.Redis
) -> None:
    """Redis that is out of memory answers, with an error of its own kind."""
    client = connect(redis.url)
    client.submit("before")
    broker.config_set("maxmemory-policy", "noeviction")
    broker.config_set("maxmemory", 1)
    run = client.submit("hello")
    broker.config_set("maxmemory", 0)
    assert run.status() == "queued"
    assert [hint.run_id for _, hint in await dispatched(store, 1)] == [run.run_id]


async def test_a_broker_that_hangs_holds_nobody_for_long(
    connect: Callable[..., Client], mongod: Server, tmp_path: Any
) -> None:
    """Twenty threads submit while the broker is frozen: all are accepted within seconds, not one after another."""
    with start_redis(tmp_path) as frozen:
        client = connect(frozen.url)
        client.submit("before")
        os.kill(frozen.pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            runs = at_once(lambda index: client.submit(f"hello {index}"))
            assert time.monotonic() - began < 15
        finally:
            os.kill(frozen.pid, signal.SIGCONT)
        assert len({run.run_id for run in runs}) == THREADS


async def test_the_hosts_own_celery_settings_are_not_ours(
    connect: Callable[..., Client], redis: Server, broker: redis_client.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CELERY_BROKER_URL belongs to the back end that imports us; our hints go to the broker we were given."""
    for name in ("CELERY_BROKER_URL", "CELERY_BROKER_WRITE_URL", "CELERY_BROKER_READ_URL"):
        monkeypatch.setenv(name, "redis://127.0.0.1:1/0")
    run = connect(redis.url).submit("hello")
    assert messages(broker, "router") == [[[run.run_id, "s1", 1]]]


def test_waiting_ends_with_the_time_and_the_run_goes_on(client: Client) -> None:
    run = client.submit("hello")
    with pytest.raises(Unavailable) as caught:
        run.wait(timeout_s=0)
    assert caught.value.code == "wait_timeout"
    assert caught.value.retryable
    assert "queued" in str(caught.value)
    assert run.status() == "queued"


async def test_waiting_ends_with_the_run(client: Client, store: MongoStore) -> None:
    run = client.submit("hello")
    waiter = threading.Thread(target=lambda: outcomes.append(run.wait(timeout_s=60)))
    outcomes: list[Any] = []
    waiter.start()
    run.cancel("enough")
    await looked_after(store, run)
    waiter.join()
    assert (outcomes[0].status, outcomes[0].answer, outcomes[0].ended) == ("cancelled", None, True)


async def test_a_queued_run_is_cancelled_at_the_next_look_and_asking_again_is_fine(
    client: Client, store: MongoStore
) -> None:
    run = client.submit("hello")
    assert run.cancel("changed my mind")
    assert not run.cancel("really")
    await looked_after(store, run)
    assert run.status() == "cancelled"
    outcome = run.outcome()
    assert outcome.error == {"code": "cancelled", "message": "Cancelled: changed my mind.", "hint": ""}
    assert not run.cancel()


async def test_a_run_that_has_ended_otherwise_cannot_be_cancelled(client: Client, store: MongoStore) -> None:
    run = client.submit("hello")
    await store.runs.update_one({"_id": run.run_id}, {"$set": {"status": "succeeded"}})
    with pytest.raises(Conflict):
        run.cancel()


async def test_events_come_in_order_copied_out_or_not(client: Client, store: MongoStore) -> None:
    run = client.submit("hello")
    assert [event["type"] for event in run.events()] == ["run.accepted"]
    run.cancel()
    before = await store.load(run.run_id)
    assert before is not None
    await store.copy_audit(before["events"])
    assert [event["type"] for event in run.events()] == ["run.accepted"]
    await looked_after(store, run)
    ended = await store.load(run.run_id)
    assert ended is not None
    assert ended["events"] == []
    events = run.events()
    assert [event["type"] for event in events] == ["run.accepted", "run.cancelled"]
    assert check(run.run_id, ended["audit"], events) == []


def test_an_unknown_run_is_not_found(client: Client) -> None:
    for ask in (client.run, client.events, lambda run_id: Handle(client._runs, run_id).cancel()):
        with pytest.raises(NotFound):
            ask("r404")


def test_an_operator_in_place_of_an_id_finds_nothing(client: Client) -> None:
    client.submit("hello")
    operator: Any = {"$ne": None}
    for ask in (client.run, client.events, lambda run_id: Handle(client._runs, run_id).cancel()):
        with pytest.raises(AgentqError):
            ask(operator)


def test_closing_twice_is_fine_and_a_closed_client_connects_anew(client: Client) -> None:
    run = client.submit("hello")
    client.close()
    client.close()
    assert run.status() == "queued"


def test_a_url_that_is_none_is_told_without_its_password() -> None:
    for url in ("mongodb://user:s3cr/et@h:1/", "mongodb://127.0.0.1:99999999/", "mongodb://"):
        with pytest.raises(AgentqError) as caught:
            Client(url).submit("hello")
        assert caught.value.code == "bad_mongo_url"
        assert "et@h" not in f"{caught.value} {caught.value.as_dict()}"


def test_without_mongodb_nothing_is_accepted_and_no_thread_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The monitors of connections that never came up would pile up with every try."""
    monkeypatch.setattr(
        "agentq.connection.MongoClient",
        lambda url, **more: MongoClient(url, **{**more, "serverSelectionTimeoutMS": 200}),
    )
    before = threading.active_count()
    client = Client("mongodb://127.0.0.1:1/?directConnection=true")
    for _ in range(3):
        with pytest.raises(Unavailable) as caught:
            client.accept(Request(input="x"))
        assert caught.value.retryable
    pause, deadline = threading.Event(), time.monotonic() + 10  # a monitor that was told to stop takes a moment
    while threading.active_count() > before + 1:
        assert time.monotonic() < deadline, [thread.name for thread in threading.enumerate()]
        pause.wait(0.05)


def _in_a_child(client: Client, told: Any) -> None:
    faulthandler.dump_traceback_later(50, exit=True, file=sys.__stderr__)  # where it hangs, if it does
    told.send(client.submit("from the child").run_id)
    client.close()
    told.close()
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
async def test_a_client_works_on_both_sides_of_a_fork(
    connect: Callable[..., Client], store: MongoStore, redis: Server, broker: redis_client.Redis
) -> None:
    """Connections are made anew in the child; the parent's stay good. Other threads may be busy with the client at the
    moment of the fork."""
    client = connect(redis.url)
    mine = client.submit("from the parent").run_id
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            client.submit("meanwhile")

    threads = [threading.Thread(target=busy) for _ in range(3)]
    for thread in threads:
        thread.start()
    heard, told = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_in_a_child, args=(client, told))
    try:
        child.start()
        assert heard.poll(60), "the child never came through"
        theirs = heard.recv()
        child.join(60)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        if child.is_alive():
            child.kill()
            child.join()
    assert child.exitcode == 0
    after = client.submit("from the parent again").run_id
    assert {run["_id"] for run in await store.latest({"_id": {"$in": [mine, theirs, after]}}, 9)} == {
        mine, theirs, after
    }  # fmt: skip
    hinted = [hint[0] for message in messages(broker, "router") for hint in message]
    assert {mine, theirs, after} <= set(hinted)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_thread_that_publishes_at_the_moment_of_a_fork_holds_up_no_child(
    connect: Callable[..., Client], redis: Server, broker: redis_client.Redis
) -> None:
    """kombu's cached properties have one lock a class; its holder is not there in the child to release it."""
    client = connect(redis.url)
    client.submit("before")
    lock = vars(Connection)["recoverable_connection_errors"].lock
    held, done = threading.Event(), threading.Event()

    def publish() -> None:
        with lock:
            held.set()
            done.wait()

    publisher = threading.Thread(target=publish)
    publisher.start()
    held.wait()
    heard, told = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_in_a_child, args=(client, told))
    try:
        child.start()
        assert heard.poll(30), "the child never came through"
    finally:
        done.set()
        publisher.join()
        child.join(1)
        if child.is_alive():
            child.kill()
            child.join()
