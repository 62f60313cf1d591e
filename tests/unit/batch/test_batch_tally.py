"""Counting: every line once, every nano-dollar once, and never past the budget."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from agentq.engine.tally import line_end, lost_estimate, slots, tally
from schemas.batch import BadLine
from tests.unit.batch.test_batch_output import batch, ended


def run(cost: int = 5, waste: int = 0, status: str = "succeeded", **fields: Any) -> Any:
    return ended(status, usage={"cost_nano_usd": cost, "input_tokens": 3}, waste={"cost_nano_usd": waste}, **fields)


def booked(run: Any) -> dict[str, Any]:
    """As the store writes it in the transaction that counts."""
    return {"end": line_end(run) or run.get("booked", {}).get("end"), "usage": run["usage"], "waste": run["waste"]}


def test_a_line_is_counted_once_and_what_comes_late_is_the_difference() -> None:
    first = tally([run()], [])["b"]
    assert (first.lines, first.added) == ([4], {"counts.succeeded": 1, "cost_nano_usd": 5, "usage.input_tokens": 3})
    again = tally([run(booked=booked(run()))], [])["b"]
    assert (again.lines, again.added) == ([], {})
    late = tally([run(waste=2, booked=booked(run()))], [])["b"]
    assert (late.lines, late.added) == ([], {"cost_nano_usd": 2, "waste_nano_usd": 2})


def test_calls_that_died_with_a_worker_are_counted_beside_the_cost_and_not_in_it() -> None:
    """Nobody knows whether they were paid: what they may have cost goes by the batch's other calls."""
    lossy = run()
    lossy["waste"] = {"lost_calls": 3, "lost_llm_calls": 2}
    found = tally([lossy], [])["b"]
    assert (found.added["cost_nano_usd"], found.added["usage.lost_llm_calls"]) == (5, 2)
    assert "usage.lost_llm_calls" not in tally([{**lossy, "booked": booked(lossy)}], [])["b"].added
    of = batch(cost_nano_usd=110, waste_nano_usd=10, usage={"llm_calls": 40, "lost_llm_calls": 3})
    assert lost_estimate(of) == 8, "2.5 a call, rounded up"
    assert lost_estimate(batch(usage={"lost_llm_calls": 3})) == 0


def test_a_run_that_is_still_under_way_books_its_money_and_no_line() -> None:
    under_way = run(status="running", waste=2)
    found = tally([under_way], [])["b"]
    assert found.lines == []
    assert found.added["cost_nano_usd"] == 7
    then = tally([run(waste=2, booked=booked(under_way))], [])["b"]
    assert (then.lines, then.added) == ([4], {"counts.succeeded": 1})


def test_a_redriven_line_moves_from_failed_to_succeeded_and_stays_one_line() -> None:
    failed = run(status="failed")
    open_again = run(status="running", booked=booked(failed))
    assert tally([open_again], [])["b"].added == {}
    done = tally([run(cost=9, booked=booked(open_again))], [])["b"]
    assert done.lines == []
    assert done.added == {"counts.succeeded": 1, "counts.failed": -1, "cost_nano_usd": 4}


def test_bad_lines_are_counted_and_cost_nothing() -> None:
    bad: BadLine = {"_id": "b:1", "batch": "b", "line": 1, "custom_id": None, "error": {}}
    found = tally([run()], [bad])["b"]
    assert found.lines == [1, 4]
    assert found.added["cost_nano_usd"] == 5


def test_what_keeps_a_batch_from_being_admitted() -> None:
    assert slots(batch(), 0) is None
    assert slots(batch(status="validating"), 0) == 0
    assert slots(batch(status="cancelling"), 0) == 0
    assert slots(batch(paused={"by": "person", "at": batch()["created_at"]}), 0) == 0


def test_where_nobody_knows_what_a_line_costs_one_goes_first() -> None:
    unknown = batch(budget_nano_usd=100, entries=1, cost_nano_usd=0, max_line_nano_usd=0)
    assert slots(unknown, 0) == 1
    assert slots(unknown, 1) == 0
    free = batch(budget_nano_usd=100, entries=6, cost_nano_usd=0, max_line_nano_usd=0)
    assert slots(free, 3) == 3, "five have ended and cost nothing; the next may cost something"


def test_however_little_a_line_is_thought_to_cost_no_more_start_than_have_ended_and_a_few() -> None:
    """The estimate may be of other lines than these."""
    estimate = {"runs": 900, "p50_nano_usd": 1, "p90_nano_usd": 1}
    known = batch(budget_nano_usd=100_000, cost_nano_usd=0, max_line_nano_usd=0, estimate=estimate, entries=1)
    assert slots(known, 0) == 16
    assert slots(known, 16) == 0
    assert slots({**known, "entries": 41, "max_line_nano_usd": 9}, 16) == 40
    windowed = {**known, "complete_by": known["created_at"]}
    assert slots(windowed, 16) == 99_984, "they are in one job of a provider, or in many that take as long"
    assert slots({**windowed, "live_only": True}, 16) == 0


@given(
    st.integers(1, 1000), st.integers(0, 1200), st.integers(1, 50), st.integers(0, 50), st.integers(0, 60)
)  # fmt: skip
def test_what_is_booked_set_aside_and_admitted_stays_within_the_budget(
    budget: int, cost: int, most: int, p90: int, under_way: int
) -> None:
    estimate = {"runs": 9, "p50_nano_usd": p90, "p90_nano_usd": p90}
    doc = batch(budget_nano_usd=budget, cost_nano_usd=cost, max_line_nano_usd=most, estimate=estimate)
    admitted = slots(doc, under_way)
    assert admitted is not None
    if admitted:
        assert cost + (under_way + admitted) * max(most, p90) <= budget
