"""Notifications on the real MongoDB and Redis: durable, tried again, at least once under the same id, visible."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis as redis_client
from celery import Celery
from click.testing import CliRunner
from pymongo import MongoClient
from standardwebhooks.webhooks import Webhook

from agentq.batch.submit import Order, submit_file
from agentq.cli.main import cli
from agentq.client import Client
from agentq.embedded.servers import Server
from agentq.engine.delivery import MAX_ATTEMPTS
from agentq.notify.address import Guard, parse_networks
from agentq.notify.failure import NotDelivered
from agentq.notify.notifier import LANE_AT_ONCE, Notifier
from agentq.notify.signature import parse_secrets
from agentq.notify.webhook import WebhookSender
from agentq.protocol import parse_request
from agentq.store.mongo import MongoStore
from schemas.batch import BATCH
from schemas.delivery import DELIVERY
from tests.integration.batch.conftest import BUNDLE
from tests.unit.notify.receiver import Receiver, delivery, receiving
from workers.follow_up import FollowUpSender, task_id

pytestmark = pytest.mark.servers

SECRET = "whsec_" + base64.b64encode(b"k" * 32).decode()
SECRETS = json.dumps({"default": SECRET})
CHECKOUT = Path(__file__).resolve().parents[2]


class Office:
    """A store, a notifier over it, and a clock that a test can put forward."""

    def __init__(self, store: MongoStore) -> None:
        self.store = store
        self.deliveries = store.deliveries
        self.ahead = timedelta(0)
        real = self.deliveries.now
        self.deliveries.now = lambda: real() + self.ahead
        self.sent: list[str] = []

    def notifier(self, send: Any = None, **options: Any) -> Notifier:
        async def note(one: Any) -> None:
            self.sent.append(one["_id"])

        hook = WebhookSender(parse_secrets(SECRETS), Guard(parse_networks("127.0.0.0/8")))
        return Notifier(self.deliveries, {"webhook": send or hook, "follow_up": send or note}, **options)

    async def once(self, notifier: Notifier) -> int:
        begun = await notifier.tick()
        await notifier.settle()
        return begun

    async def all(self) -> list[Any]:
        found = await self.deliveries.latest({}, 1_000)
        for one in found:
            DELIVERY.validate_python(one)
        return found

    async def the(self) -> Any:
        [one] = await self.all()
        return one


@pytest.fixture
async def office(mongo_url: str, database: str) -> AsyncIterator[Office]:
    store = MongoStore(mongo_url, database)
    await store.open()
    await store.register([BUNDLE])
    yield Office(store)
    await store._client.drop_database(database)
    await store.close()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


def made(number: int, url: str, **fields: Any) -> Any:
    at = datetime.now(UTC).replace(microsecond=0) - timedelta(seconds=5)
    new = {"_id": f"r{number}:1:webhook", "attempts": 0, "token": None, "not_before": at, "created_at": at}
    return delivery(url, **{**new, **fields})


async def test_a_delivery_is_made_once_however_often_it_is_asked_for(office: Office) -> None:
    one = made(1, "https://shop.example/")
    await asyncio.gather(*(office.deliveries.add([one]) for _ in range(20)))
    assert (await office.the())["attempts"] == 0
    claimed = await office.deliveries.claim(one["lane"])
    await office.deliveries.add([one])
    assert (await office.the())["token"] == claimed["token"], "one that is there stays as it is"  # type: ignore[index]


async def test_several_notifiers_deliver_each_once(office: Office, receiver: Receiver) -> None:
    await office.deliveries.add([made(n, receiver.url()) for n in range(40)])
    notifiers = [office.notifier() for _ in range(3)]
    while any(await asyncio.gather(*(office.once(one) for one in notifiers))):
        pass
    ids = [headers["webhook-id"] for _, headers, _ in receiver.got]
    assert sorted(ids) == sorted(f"r{n}:1:webhook" for n in range(40))
    assert {one["status"] for one in await office.all()} == {"delivered"}


async def test_what_does_not_arrive_is_tried_again_later_and_under_the_same_id(
    office: Office, receiver: Receiver
) -> None:
    receiver.status = 503
    await office.deliveries.add([made(1, receiver.url())])
    notifier = office.notifier(chance=lambda: 0.0)
    assert await office.once(notifier) == 1
    waiting = await office.the()
    assert (waiting["status"], waiting["attempts"], waiting["error"]["code"]) == ("pending", 1, "http_503")
    assert waiting["not_before"] - waiting["error"]["at"] == timedelta(seconds=5)
    assert await office.once(notifier) == 0, "not before its time"
    office.ahead, receiver.status = timedelta(seconds=6), 200
    assert await office.once(notifier) == 1
    arrived = await office.the()
    assert (arrived["status"], arrived["error"]) == ("delivered", None)
    assert {headers["webhook-id"] for _, headers, _ in receiver.got} == {"r1:1:webhook"}
    assert Webhook(SECRET).verify(receiver.got[1][2], receiver.got[1][1])


async def test_the_receivers_wish_moves_the_next_try(office: Office, receiver: Receiver) -> None:
    receiver.status, receiver.headers = 429, {"Retry-After": "1000"}
    await office.deliveries.add([made(1, receiver.url())])
    await office.once(office.notifier())
    waiting = await office.the()
    assert waiting["not_before"] - waiting["error"]["at"] == timedelta(seconds=1000)


async def test_after_a_day_of_failures_it_is_dead_and_visible_and_can_be_retried(
    office: Office, receiver: Receiver
) -> None:
    receiver.status = 500
    await office.deliveries.add([made(1, receiver.url())])
    notifier = office.notifier()
    for _ in range(MAX_ATTEMPTS):
        assert await office.once(notifier) == 1
        office.ahead += timedelta(hours=9)
    dead = await office.the()
    assert (dead["status"], dead["attempts"], dead["error"]["code"]) == ("dead", MAX_ATTEMPTS, "http_500")
    assert await office.once(notifier) == 0
    receiver.status = 200
    assert await office.deliveries.redrive({"_id": dead["_id"]}) == 1
    assert await office.deliveries.redrive({"_id": dead["_id"]}) == 0, "it is not dead any more"
    assert await office.once(notifier) == 1
    assert (await office.the())["status"] == "delivered"


async def test_a_refused_address_is_dead_at_once(office: Office) -> None:
    await office.deliveries.add([made(1, "https://10.0.0.1/")])
    await office.once(office.notifier())
    dead = await office.the()
    assert (dead["status"], dead["attempts"], dead["error"]["code"]) == ("dead", 1, "address_refused")


async def test_one_that_kills_whoever_tries_it_ends_dead_and_not_in_a_loop(office: Office) -> None:
    """Each claim counts as a try, so one whose try never comes to an outcome uses its tries up, too."""
    await office.deliveries.add([made(1, "https://shop.example/")])
    for _ in range(MAX_ATTEMPTS):
        assert await office.deliveries.claim("default|127.0.0.1") is not None
        office.ahead += timedelta(minutes=1)
    assert await office.once(office.notifier()) == 1
    dead = await office.the()
    assert (dead["status"], dead["error"]["code"]) == ("dead", "attempts_used_up")


async def test_an_unexpected_error_counts_as_a_try_and_its_words_are_not_kept(office: Office) -> None:
    async def broken(one: Any) -> None:
        raise RuntimeError("Canary")

    await office.deliveries.add([made(1, "https://shop.example/")])
    await office.once(office.notifier(broken))
    waiting = await office.the()
    assert (waiting["status"], waiting["error"]["code"]) == ("pending", "internal")
    assert "Canary" not in repr(waiting)


async def test_a_receiver_that_hangs_holds_up_nobody_else(office: Office) -> None:
    gate = asyncio.Event()

    async def send(one: Any) -> None:
        if one["lane"] == "default|slow":
            await gate.wait()
            raise NotDelivered("too late", code="timeout")

    slow = [made(n, "https://slow/", lane="default|slow") for n in range(100)]
    await office.deliveries.add([*slow, made(500, "https://quick/", lane="default|quick")])
    notifier = office.notifier(send)
    begun = await notifier.tick()
    assert begun == LANE_AT_ONCE + 1
    quick = asyncio.ensure_future(_until_delivered(office, "r500:1:webhook"))
    await asyncio.wait_for(quick, 10)
    gate.set()
    await notifier.settle()


async def _until_delivered(office: Office, delivery_id: str) -> None:
    while (await office.deliveries.load(delivery_id))["status"] != "delivered":  # type: ignore[index]  # noqa: ASYNC110
        await asyncio.sleep(0.01)  # the state is in a database


async def test_one_that_was_claimed_by_another_meanwhile_is_not_marked(office: Office) -> None:
    """A notifier that was frozen past its claim changes nothing when it wakes up."""
    await office.deliveries.add([made(1, "https://shop.example/")])
    frozen = await office.deliveries.claim("default|127.0.0.1")
    office.ahead = timedelta(minutes=1)
    current = await office.deliveries.claim("default|127.0.0.1")
    assert frozen is not None
    assert current is not None
    failure = {"code": "timeout", "message": "late", "at": office.deliveries.now()}
    assert not await office.deliveries.failed(frozen, failure, None)  # type: ignore[arg-type]
    assert await office.deliveries.arrived(current)
    assert (await office.the())["status"] == "delivered"


async def test_the_end_of_a_batch_is_told_once_by_the_same_mechanism(office: Office, receiver: Receiver) -> None:
    batches = office.store._db["batches"]
    now = office.store.now()
    batch = {
        "tenant": "default", "workflow": "default", "total": 3, "counts": {"succeeded": 2, "failed": 1},
        "notify": {"webhook": {"url": receiver.url()}}, "told": False, "at": {"completed": now},
    }  # fmt: skip
    await batches.insert_one({"_id": "batch_1", "status": "completed", "live": False, "key": "1", **batch})
    await batches.insert_one({"_id": "batch_2", "status": "in_progress", "live": True, "key": "2", **batch})
    notifier = office.notifier()
    for _ in range(2):
        await office.once(notifier)
    [(_, headers, body)] = receiver.got
    told = Webhook(SECRET).verify(body, headers)
    assert (told["type"], told["data"]["batch_id"]) == ("batch.completed", "batch_1")
    assert told["data"]["counts"] == {"succeeded": 2, "failed": 1}
    assert (await batches.find_one({"_id": "batch_2"}))["told"] is False


async def test_a_batch_that_is_submitted_with_a_webhook_tells_its_end(office: Office, receiver: Receiver) -> None:
    order = Order(notify=parse_request({"input": "-", "webhook": {"url": receiver.url()}}).notify)
    now, batches = office.store.now, office.store.batches
    done = await submit_file(batches, now, io.BytesIO(b'{"id": "a", "input": "hello"}\n'), "requests.jsonl", order)
    BATCH.validate_python(done.batch)
    notifier = office.notifier()
    await office.once(notifier)
    assert receiver.got == [], "it has not ended"
    ended = await batches.move(done.batch["_id"], ["in_progress"], "completed")
    assert ended is not None
    await office.once(notifier)
    [(_, headers, body)] = receiver.got
    told = Webhook(SECRET).verify(body, headers)
    assert (told["type"], told["data"]["batch_id"]) == ("batch.completed", done.batch["_id"])


async def test_the_lanes_are_found_by_the_index(office: Office) -> None:
    """What waits for its next try costs nothing, however much it is."""
    later = datetime.now(UTC) + timedelta(hours=1)
    await office.deliveries.add(
        [made(n, "https://x/", lane=f"default|{n % 3}", not_before=later) for n in range(500)]
        + [made(900, "https://x/", lane="default|1")]
    )
    assert await office.deliveries.due_lanes() == ["default|1"]
    pipeline = [
        {"$match": {"status": "pending"}},
        {"$sort": {"status": 1, "lane": 1, "not_before": 1}},
        {"$group": {"_id": "$lane", "due": {"$first": "$not_before"}}},
    ]
    explained = await office.store._db.command(
        "explain", {"aggregate": "deliveries", "pipeline": pipeline, "cursor": {}, "hint": "lanes"},
        verbosity="executionStats",
    )  # fmt: skip
    assert "DISTINCT_SCAN" in repr(explained)


# -- the command line -----------------------------------------------------------------------------------------------


def test_an_operator_sees_what_did_not_arrive_and_tries_it_again(
    mongo_url: str, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    env = {"AGENTQ_MONGO_URL": mongo_url, "AGENTQ_MONGO_DATABASE": database}

    def agentq(*words: str, code: int = 0) -> str:
        done = CliRunner().invoke(cli, ["notifications", *words], env=env)
        assert done.exit_code == code, done.output
        return done.output

    error = {"code": "http_500", "message": "The receiver answered 500.", "at": datetime.now(UTC)}
    url = "https://shop.example/hooks?token=s3cret"
    with MongoClient[dict[str, Any]](mongo_url) as mongo:
        for number in (1, 2):
            mongo[database]["deliveries"].insert_one(made(number, url, status="dead", attempts=10, error=error))
        mongo[database]["deliveries"].insert_one(made(3, url, subject="r3"))
        shown = agentq("list", "--status", "dead")
        assert "https://shop.example/hooks" in shown
        assert "given up after 10 tries: http_500, The receiver answered 500." in shown
        assert "s3cret" not in shown, "what the receiver put into its address is not for the screen"
        [pending] = map(json.loads, agentq("list", "--of", "r3", "--json").splitlines())
        assert (pending["id"], pending["status"], pending["tries"]) == ("r3:1:webhook", "pending", 0)
        assert "1 on the way again" in agentq("retry", "r1:1:webhook")
        deliveries = mongo[database]["deliveries"]
        later = datetime.now(UTC) + timedelta(hours=8)
        waits = {"status": "pending", "attempts": 7, "not_before": later, "error": {**error, "code": "unknown_secret"}}
        deliveries.update_one({"_id": "r1:1:webhook"}, {"$set": waits})
        assert "1 on the way again" in agentq("retry", "r1:1:webhook")
        assert deliveries.count_documents({"_id": "r1:1:webhook", "attempts": 0, "not_before": {"$lt": later}}) == 1
        deliveries.update_one({"_id": "r1:1:webhook"}, {"$set": {"token": "t"}})
        assert "is being tried" in agentq("retry", "r1:1:webhook", code=2)
        deliveries.insert_one(made(4, url, status="delivered"))
        assert "has arrived" in agentq("retry", "r4:1:webhook", code=2)
        assert "No delivery matches" in agentq("list", "--of", "nope")
        assert "There is no delivery" in agentq("retry", "r9", code=2)
        assert "Name a delivery" in agentq("retry", code=2)
        assert "1 on the way again" in agentq("retry", "--dead")
        assert mongo[database]["deliveries"].count_documents({"status": "pending", "attempts": 0}) == 3
        mongo.drop_database(database)


# -- follow-up tasks ------------------------------------------------------------------------------------------------


async def test_a_follow_up_is_a_celery_message_on_the_callers_queue_with_ids_only(redis: Server) -> None:
    app = Celery("agentq", broker=redis.url, set_as_current=False)
    app.conf.update(task_queues=[], task_create_missing_queues=False)
    sender = FollowUpSender(app)
    one = delivery("", _id="r7:1:follow_up", kind="follow_up", to={"task": "shop.on_answer", "queue": "shop7"})
    for _ in range(2):
        await sender(one)
    sender.close()
    with redis_client.Redis.from_url(redis.url) as broker:
        messages = [json.loads(raw) for raw in broker.lrange("shop7", 0, -1)]
        assert not broker.exists("_kombu.binding.shop7"), "a queue that is not ours is not declared"
        broker.delete("shop7")
    assert len(messages) == 2
    for message in messages:
        args, kwargs, _ = json.loads(base64.b64decode(message["body"]))
        assert (args, kwargs) == ([], {"run_id": "r1", "status": "succeeded"})
        assert message["headers"]["task"] == "shop.on_answer"
        assert message["headers"]["id"] == task_id(one), "a repetition can be told by its id"


async def test_a_broker_that_is_away_is_a_failure_that_may_pass(unused_tcp_port: int) -> None:
    app = Celery("agentq", broker=f"redis://127.0.0.1:{unused_tcp_port}/0", set_as_current=False)
    app.conf.broker_transport_options = {"max_retries": 1, "socket_connect_timeout": 1}
    sender = FollowUpSender(app)
    with pytest.raises(NotDelivered) as failed:
        await sender(delivery("", kind="follow_up", to={"task": "shop.on_answer", "queue": "shop"}))
    assert (failed.value.code, failed.value.final) == ("broker_refused", False)
    sender.close()


# -- the process ----------------------------------------------------------------------------------------------------


class Schedulers:
    """Starts ``python -m workers.scheduler`` as an operator would."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder = folder
        self.env = env

    async def start(self, failpoint: str | None = None) -> asyncio.subprocess.Process:
        env = {**os.environ, **self.env, **({"AGENTQ_FAILPOINT": failpoint} if failpoint else {})}
        with (self.folder / "scheduler.log").open("ab") as log:
            return await asyncio.create_subprocess_exec(
                sys.executable, "-m", "workers.scheduler", env=env, stdout=log, stderr=log,
                cwd=CHECKOUT,
            )  # fmt: skip


@pytest.fixture
def schedulers(tmp_path: Path, mongo_url: str, database: str, redis: Server) -> Schedulers:
    return Schedulers(
        tmp_path,
        {
            "AGENTQ_MONGO_URL": mongo_url, "AGENTQ_MONGO_DATABASE": database, "AGENTQ_BROKER_URL": redis.url,
            "AGENTQ_WEBHOOK_SECRETS": SECRETS, "AGENTQ_WEBHOOK_NETWORKS": "127.0.0.1",
            "AGENTQ_SCHEDULER_INTERVAL_S": "0.05",
        },
    )  # fmt: skip


async def test_a_scheduler_killed_between_sending_and_marking_delivers_twice_under_one_id_and_loses_nothing(
    office: Office, receiver: Receiver, schedulers: Schedulers, mongo_url: str, database: str
) -> None:
    """From the request to the receiver: the run ends, its end is told, the teller dies, another tells it again."""
    with Client(mongo_url, database=database) as client:
        run = await asyncio.to_thread(
            client.accept, parse_request({"input": "My name is Canary.", "webhook": {"url": receiver.url()}})
        )
        await asyncio.to_thread(run.cancel, "enough")
    first = await schedulers.start("after_delivery:1")
    try:
        assert await asyncio.wait_for(first.wait(), 60) == -9
    finally:
        _stop(first)
    sent = await office.the()
    assert (sent["status"], sent["attempts"]) == ("pending", 1), "it was sent and not marked"
    assert len(receiver.got) == 1
    # The claim of the dead runs out; here at once.
    await office.store._db["deliveries"].update_one({"_id": sent["_id"]}, {"$set": {"not_before": office.store.now()}})
    second = await schedulers.start()
    try:
        await asyncio.wait_for(_until_delivered(office, sent["_id"]), 60)
    finally:
        _stop(second)
        await second.wait()
    assert [headers["webhook-id"] for _, headers, _ in receiver.got] == [sent["_id"]] * 2
    told = Webhook(SECRET).verify(receiver.got[1][2], receiver.got[1][1])
    assert told["type"] == "run.cancelled"
    assert told["data"]["run_id"] == run.run_id
    assert "Canary" not in repr(receiver.got)
    stored = await office.store.load(run.run_id)
    assert stored is not None
    assert SECRET not in repr(stored) + repr(sent), "a secret is never in the database"


async def test_wrong_secrets_stop_the_scheduler_at_its_start_with_a_sentence(schedulers: Schedulers) -> None:
    schedulers.env["AGENTQ_WEBHOOK_SECRETS"] = '{"default": "hunter2"}'
    process = await schedulers.start()
    try:
        assert await asyncio.wait_for(process.wait(), 60) == 2
    finally:
        _stop(process)
    log = (schedulers.folder / "scheduler.log").read_text()
    assert "openssl rand" in log
    assert "hunter2" not in log
    assert "Traceback" not in log


def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
