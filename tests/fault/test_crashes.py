"""Processes die at every named point, servers die under load: every run ends right, no finished step runs again."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from agentq.errors import ConfigError
from agentq.runtime.runtime import CRASH_POINTS
from tests.fault.model import ScriptedServer
from tests.fault.system import System, eventually

pytestmark = [pytest.mark.servers, pytest.mark.timeout(240)]


@pytest.fixture(scope="module", params=["redis", "rabbitmq"])
def shared(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[System]:
    """Servers and scheduler for the module; tests start and kill workers of their own. Where a server's program is
    missing, skips locally and fails in CI."""
    with ScriptedServer() as model:
        system = System(tmp_path_factory.mktemp("fault"), model, broker=request.param)
        try:
            system.start()
        except ConfigError as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"needs a server: {error}")
        yield system
        system.stop()


@pytest.fixture
def system(shared: System) -> Iterator[System]:
    """The shared system without workers; those a test starts are gone after it."""
    yield shared
    shared.model.release()
    for name in [name for name in shared.processes if name != "scheduler"]:
        shared.kill(name)
    shared.model.reset()


@pytest.mark.parametrize("nth", [1, 4])
@pytest.mark.parametrize("point", CRASH_POINTS)
def test_a_worker_killed_at_any_point_costs_at_most_one_call(system: System, point: str, nth: int) -> None:
    """SIGKILL at the named point, early and late in the run; another worker finishes it."""
    nth = 1 if point in ("before_claim", "before_settle") else nth
    doomed = system.worker("doomed", failpoint=f"{point}:{nth}")
    with system.client() as client:
        handle = client.submit("pay A")
        eventually(lambda: doomed.poll() is not None, f"the worker dies at {point}")
        assert doomed.returncode == -9
        system.worker("next")
        system.check_ended_right(handle, crashes=1)


def test_a_specialist_killed_in_mid_call_is_replaced(system: System) -> None:
    """One process a pool, as in production; the specialist dies while the provider works on its call."""
    for pool in ("router", "critic", "tools"):
        system.worker(pool, pool)
    system.worker("specialist", "specialist")
    system.model.hold = {"turn"}
    with system.client() as client:
        handle = client.submit("pay A")
        system.model.wait_held()
        system.kill("specialist")
        system.model.release()
        system.worker("specialist2", "specialist")
        run = system.check_ended_right(handle, crashes=1)
    assert run["waste"]["lost_calls"] == 1


def test_broker_killed_and_back_empty_loses_nothing(system: System) -> None:
    """Runs under way and runs only queued: all end; the scheduler notices the empty broker."""
    system.worker()
    system.model.hold = {"turn"}
    with system.client() as client:
        under_way = client.submit("pay A")
        system.model.wait_held()
        system.end("worker")  # a warm stop would wait for the held call: from here on nobody consumes
        queued = [client.submit("pay A") for _ in range(5)]
        system.lose_broker()
        system.model.release()
        system.worker("worker2")
        system.check_ended_right(under_way, crashes=1)
        for handle in queued:
            system.check_ended_right(handle, crashes=0)


def test_broker_lost_while_a_worker_runs_is_survived_by_the_worker(system: System) -> None:
    system.worker()
    system.model.hold = {"turn"}
    with system.client() as client:
        handle = client.submit("pay A")
        system.model.wait_held()
        system.lose_broker()
        system.model.release()
        system.check_ended_right(handle, crashes=0)
        system.check_ended_right(client.submit("pay A"), crashes=0)


def test_mongod_killed_during_a_call_costs_nothing(system: System) -> None:
    """The worker holds the answer and commits it when the database is back: no call is repeated."""
    system.worker()
    system.model.hold = {"turn"}
    with system.client() as client:
        handle = client.submit("pay A")
        system.model.wait_held()
        system.mongod.kill()
        system.model.release()
        system.restart_mongod()
        system.check_ended_right(handle, crashes=0)


def test_the_scheduler_killed_between_commit_and_publish_is_made_good_by_the_next(system: System) -> None:
    system.kill("scheduler")
    doomed = system.worker("doomed", failpoint="after_effect:2")
    with system.client() as client:
        handle = client.submit("pay A")
        eventually(lambda: doomed.poll() is not None, "the worker dies")
        scheduler = system.scheduler(failpoint="scheduler_after_commit:1")
        eventually(lambda: scheduler.poll() is not None, "the scheduler dies")
        system.scheduler()
        system.worker("next")
        system.check_ended_right(handle, crashes=1)
