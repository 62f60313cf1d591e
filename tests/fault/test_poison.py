"""Runs and messages that nobody can work off: each ends visibly after its attempts, and nobody else suffers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from celery import Celery
from kombu import Connection

from agentq.client import Client
from agentq.protocol import POOLS, task_name
from tests.fault.conftest import judged
from tests.fault.load import Load
from tests.fault.plant import Plant, app_variant
from tests.fault.recovery import percentile
from tests.fault.system import eventually
from tests.fault.verdict import MAX_ATTEMPTS

pytestmark = [pytest.mark.servers, pytest.mark.timeout(240)]

GOOD, POISON, RATE = 1_000, 50, 30
KILLERS = 3


def _p95(plant: Plant, run_ids: list[str]) -> float:
    fields = {"created_at": 1, "ended_at": 1}
    found = plant.mongo["agentq"]["runs"].find({"_id": {"$in": run_ids}}, fields)
    return percentile([(run["ended_at"] - run["created_at"]).total_seconds() for run in found], 0.95)


def test_fifty_poison_runs_end_after_their_attempts_and_a_thousand_good_ones_do_not_notice(plant: Plant) -> None:
    """The provider fails every call of a poison run; broken messages of every shape come on top."""
    for number in range(2):
        plant.worker(f"worker-{number}")
    with plant.client() as client:
        calm = _calm_runs(client, "before")
        with (
            Load(client, rate=RATE, limit=GOOD, key="good") as good,
            Load(client, rate=RATE * POISON / GOOD, limit=POISON, wish=lambda _: "fail A", key="bad") as bad,
        ):
            _send_broken_messages(plant)
            good.wait()
            bad.wait()
        calm += _calm_runs(client, "after")
        everything = [*calm, *good.accepted, *bad.accepted]
        judged(plant, everything, excused=lambda _worker, _at: False, quarantined=bad.accepted)
        for run_id in bad.accepted:
            assert plant.model.calls[f"{run_id}:s1"] == MAX_ATTEMPTS
            events = [event for event in client.events(run_id) if event["type"] == "step.quarantined"]
            assert [event["data"]["attempt"] for event in events] == [MAX_ATTEMPTS]
    without, beside = _p95(plant, calm), _p95(plant, good.accepted)
    assert beside <= 1.5 * without + 0.5, f"p95 was {without:.2f} s without and {beside:.2f} s beside poison"
    assert all(process.poll() is None for process in plant.processes.values()), "nobody died of a message"


def _calm_runs(client: Client, key: str) -> list[str]:
    with Load(client, rate=RATE, limit=GOOD // 8, key=key) as load:
        load.wait()
    return load.accepted


def _send_broken_messages(plant: Plant) -> None:
    """To every pool: what is no JSON, no task, no list of hints, too deep, too big, or about runs that do not exist."""
    sender = Celery("sender", broker=plant.broker.url, set_as_current=False)
    deep: Any = []
    for _ in range(500):
        deep = [deep]
    shapes: list[Any] = [
        None, 7, "x", {}, [], [[]], [None], [["run"]], [["run", "s1", "1"]], [["run", "s1", -1]], [[1, 2, 3]],
        [["$where", "s1", 1]], [["run.steps", "s1", 1]], [["nobody", "s1", 1]] * 100,
        [["x" * 1_000_000, "s1", 1]], deep,
    ]  # fmt: skip
    for pool in POOLS:
        for shape in shapes:
            sender.send_task(task_name(pool), kwargs={"hints": shape}, queue=pool)
        sender.send_task(task_name(pool), args=[1, 2, 3], queue=pool)
        sender.send_task(task_name(pool), kwargs={"nonsense": 1}, queue=pool)
        sender.send_task("no.such.task", queue=pool)
    sender.close()
    raw = [
        ("{", "application/json"), ("[" * 5_000, "application/json"), (b"\xff\xfe", "application/x-python-serialize"),
        ("", "text/plain"),
    ]  # fmt: skip
    with Connection(plant.broker.url) as connection, connection.Producer() as producer:
        for pool in POOLS:
            for body, kind in raw:
                producer.publish(body, routing_key=pool, exchange="", content_type=kind, content_encoding="utf-8")


def test_a_run_that_kills_its_worker_is_quarantined_after_exactly_its_attempts(plant: Plant) -> None:
    """A tool that kills its process, in three runs beside good ones: what dies is replaced, the good ones end well."""
    plant.worker("models", "router,specialist,critic")
    with keeping_a_tool_runner(plant), plant.client() as client:
        killers: list[str] = []
        with Load(client, rate=20) as good:
            killers += [client.submit("die A").run_id for _ in range(KILLERS)]
            runs = plant.mongo["agentq"]["runs"]
            ended = {"_id": {"$in": killers}, "status": "failed"}
            eventually(lambda: runs.count_documents(ended) == KILLERS, "the killers are quarantined", 120)
        judged(plant, [*good.accepted, *killers], quarantined=killers)
        for run_id in killers:
            lost = [event for event in client.events(run_id) if event["type"] == "step.lost"]
            assert [event["data"]["attempt"] for event in lost] == list(range(1, MAX_ATTEMPTS + 1))
            assert 1 <= plant.model.bank.calls_of("die", run_id) <= MAX_ATTEMPTS


@contextmanager
def keeping_a_tool_runner(plant: Plant) -> Iterator[None]:
    """One serves; when it dies, the next."""
    over = threading.Event()

    def keep() -> None:
        number = 0
        while not over.wait(0.05):
            if number == 0 or plant.processes[f"tools-{number}"].poll() is not None:
                number += 1
                plant.launch(f"tools-{number}", "tools")

    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    try:
        yield
    finally:
        over.set()
        keeper.join(30)


def test_a_run_keeps_the_version_it_was_born_with_whichever_worker_serves_it(
    make_plant: Callable[..., Plant],
) -> None:
    """Two workers on two versions of the YAML: every run sees one prompt only, that of its own bundle."""
    plant = make_plant()
    second = app_variant(plant.directory / "v2", agents=("then pay.", "then pay. Version two."))
    runs = plant.mongo["agentq"]["runs"]
    seen = plant.model.instructions
    with plant.client() as client:
        plant.worker("v1-alone")
        old = [client.submit("pay A").run_id for _ in range(5)]
        plant.model.hold = {"turn"}
        old += [client.submit("pay A").run_id for _ in range(20)]
        plant.model.wait_held()
        plant.worker("v2", app=second)
        version_cached_s = 5.5
        threading.Event().wait(version_cached_s)  # the client pins new runs to the version it knows for that long
        new = [client.submit("pay A").run_id for _ in range(25)]
        plant.kill("v1-alone")  # its runs are v2's to finish, and those of v2 will be v1's
        plant.worker("v1-again")
        plant.model.release()
        judged(plant, [*old, *new])
    hashes = {run["_id"]: run["workflow"]["hash"] for run in runs.find({}, {"workflow": 1})}
    assert len({hashes[run_id] for run_id in old}) == len({hashes[run_id] for run_id in new}) == 1
    assert hashes[old[0]] != hashes[new[0]]
    for run_id in old:
        assert seen[run_id] == {"Look up the account, then pay."}
    for run_id in new:
        assert seen[run_id] == {"Look up the account, then pay. Version two."}
