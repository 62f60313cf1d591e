"""A plant a test: servers, proxies and schedulers of its own, and the judgement of all its runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from agentq.errors import ConfigError
from tests.fault.load import unended
from tests.fault.model import ScriptedServer
from tests.fault.plant import Plant
from tests.fault.verdict import Judge, Verdict

MODEL_DELAY_S = 0.05  # so that calls are in flight when something happens


@pytest.fixture
def make_plant(tmp_path: Path) -> Iterator[Callable[..., Plant]]:
    """``make_plant(...)`` starts a plant with a scripted model; it is gone after the test."""
    with ExitStack() as stack:

        def make(**options: Any) -> Plant:
            model = stack.enter_context(ScriptedServer(MODEL_DELAY_S))
            try:
                plant = stack.enter_context(Plant(tmp_path, model, **options))
            except ConfigError as error:  # a server's program is missing
                if os.environ.get("CI"):
                    raise
                pytest.skip(f"needs a server: {error}")
            stack.callback(model.release)
            return plant

        yield make


@pytest.fixture
def plant(make_plant: Callable[..., Plant]) -> Plant:
    return make_plant()


def judged(
    plant: Plant,
    accepted: Iterable[str],
    *,
    timeout_s: float = 60,
    excused: Callable[[str, float], bool] = lambda _worker, _at: True,
    quarantined: Iterable[str] = (),
) -> Verdict:
    """All runs have ended in time and every promise held for each of them; how it went.

    ``excused(worker, at)``: may this worker have lost a lease? ``quarantined``: runs that had to fail.
    """
    database = plant.mongo["agentq"]
    live = unended(database["runs"], timeout_s)
    assert live == 0, f"{live} runs had not ended {timeout_s:g} s after the last fault; logs in {plant.directory}"
    verdict = Judge(plant.model, set(), excused).judge_all(database, accepted)
    assert verdict.wrong == [], f"logs in {plant.directory}"
    failed = {run["_id"] for run in database["runs"].find({"status": "failed"}, {"_id": 1})}
    assert failed == set(quarantined)
    return verdict
