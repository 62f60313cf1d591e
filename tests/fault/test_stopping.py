"""Cancelling a run and stopping a worker, on the real system."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.fault.model import ScriptedServer
from tests.fault.system import System, eventually

pytestmark = [pytest.mark.servers, pytest.mark.timeout(240)]


@pytest.fixture
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with ScriptedServer() as model:
        system = System(tmp_path_factory.mktemp("stopping"), model)
        system.start()
        yield system
        system.stop()


def test_cancelling_a_run_closes_its_connection_to_the_provider_within_a_second(system: System) -> None:
    """The call is cut, the run ends, and what the call took is booked as waste."""
    system.worker()
    system.model.hold = {"turn"}
    with system.client() as client:
        handle = client.submit("pay A")
        system.model.wait_held()
        # The worker asks about steps that last; this one does not begin in the moment of the question.
        eventually(lambda: system.run_doc(handle.run_id)["leases"], "the call is under way")
        began = time.monotonic()
        handle.cancel("enough")
        assert system.model.cut.wait(10)
        took = time.monotonic() - began
        outcome = handle.wait(10)
    assert outcome.status == "cancelled"
    eventually(lambda: system.run_doc(handle.run_id)["waste"].get("cut_calls") == 1, "the cut call is booked")
    assert outcome.cost_usd > 0
    assert took < 1.5, "a second, and something for a busy machine"


def test_a_worker_that_is_stopped_finishes_its_call_and_hands_the_run_on(system: System) -> None:
    """SIGTERM in mid-call: the answer is committed, another worker goes on at once, nothing is called twice."""
    system.worker("old")
    system.model.hold = {"turn"}
    with system.client() as client:
        handle = client.submit("pay A")
        system.model.wait_held()
        system.processes["old"].terminate()
        system.worker("new")
        system.model.release()
        run = system.check_ended_right(handle, crashes=0)
    assert run["waste"] == {}
    eventually(lambda: system.processes["old"].poll() is not None, "the old worker has ended")
    assert system.processes["old"].returncode == 0
