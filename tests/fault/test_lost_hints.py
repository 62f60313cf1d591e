"""Hints die with the worker that took them out of the queue: recovery needs no traffic after them."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from agentq.run import HINT_GRACE
from tests.fault.conftest import judged
from tests.fault.plant import Plant
from tests.fault.system import eventually

pytestmark = [pytest.mark.servers, pytest.mark.timeout(240)]

RUNS = 60  # in one message, and far more than a probe carries
MARGIN_S = 8.0  # for the probe's way there and back, and for the runs themselves


def test_a_message_of_hints_that_dies_with_its_worker_is_made_good_within_seconds(
    make_plant: Callable[..., Plant],
) -> None:
    plant = make_plant()
    doomed = plant.worker("doomed", failpoint="before_claim:1")
    with plant.client() as client:
        accepted = [run.run_id for run in client.submit_many({"input": "pay A"} for _ in range(RUNS))]  # type: ignore[union-attr]
        eventually(lambda: doomed.poll() is not None, "the worker dies with the hints")
        died = time.monotonic()
        plant.worker("next")
        ready = time.monotonic()
        judged(plant, accepted)
        ended = time.monotonic()
    late = ended - max(ready, died + HINT_GRACE.total_seconds())
    assert late < MARGIN_S, f"the last of {RUNS} runs ended {late:.1f} s after it could have been looked at"
