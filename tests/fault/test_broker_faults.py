"""Hints are lost, repeated, held back and forged: nothing but latency changes."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable

import pytest
from celery import Celery

from agentq.protocol import POOLS, task_name
from tests.fault.conftest import judged
from tests.fault.load import Load
from tests.fault.plant import Plant
from tests.fault.system import eventually

pytestmark = [pytest.mark.servers, pytest.mark.timeout(180)]

NOTICED_S = 15.0  # until everything that an emptied broker had lost is dispatched again
ACCEPTED_S = 3.5  # what a request may take while the broker hangs


@pytest.mark.parametrize("lose", [Plant.empty_broker, Plant.lose_broker], ids=["emptied", "killed and back empty"])
@pytest.mark.parametrize("broker", ["redis", "rabbitmq"])
def test_an_emptied_broker_is_noticed_and_all_live_runs_are_dispatched_again(
    make_plant: Callable[..., Plant], broker: str, lose: Callable[[Plant], None]
) -> None:
    """200 runs whose hints are gone begin within seconds of the loss; none of them is worked on twice."""
    plant = make_plant(broker=broker)
    plant.worker("worker")
    with plant.client() as client:
        client.submit("pay A").wait(30)  # the workflow is registered, the marker of the broker is parked
        worker = plant.processes.pop("worker")
        worker.terminate()
        worker.wait(30)
        handles = [client.submit("pay A") for _ in range(200)]
        lose(plant)
        lost = time.monotonic()
        plant.worker("next")
        runs = plant.mongo["agentq"]["runs"]
        eventually(lambda: runs.count_documents({"status": "queued"}) == 0, "all runs have begun", NOTICED_S)
        assert time.monotonic() - lost <= NOTICED_S
        ids = [run["_id"] for run in runs.find({}, {"_id": 1})]
        assert {handle.run_id for handle in handles} < set(ids)
        verdict = judged(plant, ids, excused=lambda _worker, _at: False)
    assert verdict.extra_calls == verdict.lost_steps == 0


def test_a_broker_that_hangs_does_not_hold_up_requests(plant: Plant) -> None:
    """SIGSTOP for ten seconds: each request is accepted within 3.5 s, and all runs end after it."""
    plant.worker("one")
    plant.worker("two")
    with plant.client() as client:
        accepted = [client.submit("pay A").run_id for _ in range(20)]
        os.kill(plant.broker.pid, signal.SIGSTOP)
        frozen, slowest = time.monotonic(), 0.0
        try:
            while time.monotonic() - frozen < 10:
                began = time.monotonic()
                accepted.append(client.submit("pay A").run_id)
                slowest = max(slowest, time.monotonic() - began)
        finally:
            os.kill(plant.broker.pid, signal.SIGCONT)
        assert slowest <= ACCEPTED_S
        assert len(accepted) > 100
        judged(plant, accepted, excused=lambda _worker, _at: False)


def test_hints_sent_three_times_and_shuffled_cost_no_call(make_plant: Callable[..., Plant]) -> None:
    """While every step lasts longer than it takes to deliver its hints again and again: the lease is the lock."""
    plant = make_plant()
    plant.model.delay_s = 0.5
    for number in range(3):
        plant.worker(f"worker-{number}")
    sender, rng = Celery("sender", broker=plant.broker.url, set_as_current=False), random.Random(3)
    runs = plant.mongo["agentq"]["runs"]
    repeated = 0
    with plant.client() as client:
        accepted = [client.submit("pay A").run_id for _ in range(60)]
        while live := list(runs.find({"next_due": {"$type": "date"}}, {"steps": 1})):
            hints = [
                (step["pool"], [run["_id"], step_id, step["attempt"]])
                for run in live
                for step_id, step in run["steps"].items()
            ] * 3
            rng.shuffle(hints)
            for pool in POOLS:
                if some := [hint for name, hint in hints if name == pool]:
                    sender.send_task(task_name(pool), kwargs={"hints": some}, queue=pool, retry=False)
            repeated += len(hints)
        verdict = judged(plant, accepted, excused=lambda _worker, _at: False)
    sender.close()
    assert repeated > 1_000
    assert verdict.extra_calls == verdict.lost_steps == verdict.failed_attempts == 0


def test_workers_outlive_every_kind_of_broken_connection_to_the_broker(plant: Plant) -> None:
    """Reset, cut, slow, silent, refused, half-open: hints are late, nothing else."""
    plant.worker("one", "router,specialist")  # every run must cross the broker several times
    plant.worker("two", "tools,critic")
    proxy = plant.broker_proxy
    pause = threading.Event()
    with plant.client() as client, Load(client, rate=15) as load:
        for fault in (
            proxy.reset, lambda: proxy.cut_after(500), lambda: proxy.latency(0.1), proxy.black_hole, proxy.refuse,
            proxy.half_open,
        ):  # fmt: skip
            fault()
            pause.wait(2)
            proxy.heal()
            pause.wait(0.5)
    verdict = judged(plant, load.accepted, excused=lambda _worker, _at: False)
    assert verdict.extra_calls == verdict.lost_steps == 0
