"""Processes die and freeze under a stream of runs: every run ends right, and soon."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable

import pytest

from agentq.runtime.runtime import CRASH_POINTS
from tests.fault.conftest import judged
from tests.fault.load import Load
from tests.fault.plant import Plant
from tests.fault.system import LEASE_S, eventually

pytestmark = [pytest.mark.servers, pytest.mark.timeout(240)]

KILLS = 20
SOON_S = LEASE_S + 5


def test_twenty_sigkills_at_each_crash_point(make_plant: Callable[..., Plant]) -> None:
    """Nothing is lost, no finished step runs again, no payment is doubled, every extra call is on record."""
    plant = make_plant(schedulers=0, settings={"AGENTQ_MAX_ATTEMPTS": "50"})  # nobody else has so much bad luck
    plant.worker("first")
    workers = Mortals(plant, [point for point in CRASH_POINTS for _ in range(KILLS)], at_once=4)
    schedulers = Mortals(plant, ["scheduler_after_commit"] * KILLS, at_once=1)
    with plant.client() as client, Load(client, rate=20) as load:
        eventually(lambda: all([schedulers.all_died(), workers.all_died()]), "everybody has died", 150)
        plant.start_scheduler("last-scheduler")
        plant.worker("last")
    verdict = judged(plant, load.accepted, timeout_s=120)
    assert workers.deaths == Counter(dict.fromkeys(CRASH_POINTS, KILLS))
    assert schedulers.deaths == {"scheduler_after_commit": KILLS}
    assert verdict.accepted > 100
    assert verdict.lost_steps > KILLS


class Mortals:
    """Processes that live until they pass their crash point for the n-th time, so many at once, one after the other."""

    def __init__(self, plant: Plant, points: list[str], at_once: int) -> None:
        self._plant = plant
        self._todo = list(reversed(points))
        self._at_once = at_once
        self._living: dict[str, str] = {}
        self.deaths: Counter[str] = Counter()

    def all_died(self) -> bool:
        """Count the dead, start who comes next; is nobody left?"""
        for name, point in list(self._living.items()):
            process = self._plant.processes[name]
            if process.poll() is not None:
                assert process.returncode == -signal.SIGKILL, f"{name} ended otherwise; see {self._plant.directory}"
                del self._living[name], self._plant.processes[name]
                self.deaths[point] += 1
        while self._todo and len(self._living) < self._at_once:
            self._start(self._todo.pop())
        return not self._living

    def _start(self, point: str) -> None:
        number = len(self._todo)
        name = f"{point}-{number}"
        self._living[name] = point
        if point in CRASH_POINTS:
            self._plant.launch(name, failpoint=f"{point}:{1 + number % 5}")
        else:
            self._plant.start_scheduler(name, f"{point}:{1 + number % 2}")


def test_a_killed_workers_step_is_worked_on_again_within_its_lease_and_five_seconds(plant: Plant) -> None:
    plant.worker("doomed")
    plant.model.hold = {"turn"}
    with plant.client() as client:
        handles = [client.submit("pay A") for _ in range(20)]
        runs = plant.mongo["agentq"]["runs"]
        doomed = f":{plant.processes['doomed'].pid}"
        eventually(lambda: _held_by(runs, doomed, "s2") == 20, "all runs wait for their first turn")
        killed = time.monotonic()
        plant.kill("doomed")
        plant.worker("next")
        heir = f":{plant.processes['next'].pid}"
        eventually(lambda: _held_by(runs, heir, "s2") == 20, "the next worker has all steps", SOON_S)
        assert time.monotonic() - killed <= SOON_S
        plant.model.release()
        verdict = judged(plant, [handle.run_id for handle in handles])
    assert verdict.extra_calls == 20


def _held_by(runs: object, worker: str, step_id: str) -> int:
    live = runs.find({"next_due": {"$type": "date"}}, {"leases": 1})  # type: ignore[attr-defined]
    return sum(run["leases"].get(step_id, {"worker": ""})["worker"].endswith(worker) for run in live)


def test_a_worker_frozen_past_its_lease_changes_nothing_when_it_wakes(plant: Plant) -> None:
    """Another worker finishes its runs; what it was paid for is booked as waste, no payment is doubled."""
    frozen = plant.worker("frozen")
    plant.model.hold = {"turn"}
    with plant.client() as client:
        handles = [client.submit("pay A") for _ in range(10)]
        runs = plant.mongo["agentq"]["runs"]
        eventually(lambda: _held_by(runs, f":{frozen.pid}", "s2") == 10, "all runs wait for their first turn")
        os.kill(frozen.pid, signal.SIGSTOP)
        plant.model.release()  # the answers wait in the frozen worker's sockets
        plant.worker("awake")
        for handle in handles:
            assert handle.wait(60).status == "succeeded"
        os.kill(frozen.pid, signal.SIGCONT)
        eventually(lambda: runs.count_documents({"waste.llm_calls": 1}) == 10, "the woken worker books its waste")
        verdict = judged(plant, [handle.run_id for handle in handles])
        assert verdict.extra_calls == 10
        assert runs.count_documents({"waste.lost_calls": 1, "waste.cost_nano_usd": 20_000}) == 10
        plant.kill("awake")
        assert client.submit("pay A").wait(60).status == "succeeded", "the woken worker works on"


def test_a_rolling_restart_by_sigterm_costs_nothing(plant: Plant) -> None:
    """Every worker is told to stop and replaced, twice, under load: 0 lost, 0 extra calls, 0 steps run twice."""
    for number in range(3):
        plant.worker(f"old-{number}")
    with plant.client() as client, Load(client, rate=20) as load:
        for generation in range(2):
            for number in range(3):
                old = next(name for name in plant.processes if name.startswith("old"))
                plant.worker(f"old-{generation}-{number}-new")
                process = plant.processes.pop(old)
                process.terminate()
                assert process.wait(30) == 0, f"{old} did not stop well"
    verdict = judged(plant, load.accepted, excused=lambda _worker, _at: False)
    assert verdict.extra_calls == verdict.lost_steps == verdict.failed_attempts == verdict.held == 0
    assert verdict.statuses == {"succeeded": verdict.accepted}


def test_no_run_is_lost_when_the_only_worker_stops_with_a_queue_before_it(plant: Plant) -> None:
    """What a stopping worker has not begun it hands back: the next one finds it at once, not after a lease."""
    plant.worker("first")
    with plant.client() as client:
        handles = list(client.submit_many({"input": "pay A"} for _ in range(300)))
        first = plant.processes.pop("first")
        first.terminate()
        assert first.wait(30) == 0
        plant.worker("second")
        verdict = judged(plant, [handle.run_id for handle in handles], excused=lambda _worker, _at: False)  # type: ignore[union-attr]
    assert verdict.extra_calls == verdict.lost_steps == 0
