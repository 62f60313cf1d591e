"""The judge of the campaigns sees what it should: a good run passes, and each way to spoil it is told."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.fault.load import unended
from tests.fault.plant import Plant
from tests.fault.verdict import Judge, Verdict

pytestmark = [pytest.mark.servers, pytest.mark.timeout(60)]


def test_a_good_run_passes_and_everything_that_spoils_it_is_found(plant: Plant) -> None:
    plant.worker()
    with plant.client() as client:
        good = client.submit("pay A").run_id
    database = plant.mongo["agentq"]
    assert unended(database["runs"], 30) == 0
    run = next(database["runs"].find({}))
    events = list(database["audit"].find({}, {"_id": 0}).sort("_id", 1))
    calls, bank = plant.model.calls.copy(), copy.copy(plant.model.bank.calls)

    def verdict(accepted: tuple[str, ...] = (good,), **changes: Any) -> Verdict:
        judge = Judge(plant.model, set(), lambda _worker, _at: False)
        return judge.judge(accepted, {good: {**run, **changes}}, {good: events})

    assert verdict().wrong == []
    assert verdict(accepted=(good, "ghost")).lost == 1
    assert verdict(accepted=()).doubled == 1
    assert verdict(status="running", ended_at=None).lost == 1
    assert verdict(status="cancelled").wrong
    assert verdict(usage={**run["usage"], "llm_calls": 6}).wrong
    assert verdict(result={**run["result"], "answer": "no"}).wrong
    plant.model.calls[f"{good}:s1"] += 1
    assert (verdict().unexplained, verdict().extra_calls) == (1, 1)
    plant.model.calls = calls
    plant.model.bank.calls["pay", f"{good}:s9"] += 1
    plant.model.bank.payments.add(f"{good}:s9")
    assert verdict().doubled == 1
    plant.model.bank.calls = bank
    judge = Judge(plant.model, set(), lambda _worker, _at: True)
    assert judge.judge([good], {good: run}, {good: [*events[:2], *events[3:]]}).wrong
    twice = [*events, {**events[1], "seq": len(events) + 1}]
    judge = Judge(plant.model, set(), lambda _worker, _at: True)
    assert judge.judge([good], {good: run}, {good: twice}).doubled == 1
