"""What a batch will cost and how long it takes, told before and while it runs."""

from __future__ import annotations

import io
import json
from datetime import timedelta
from typing import Any

import pytest

from agentq.batch import preflight
from agentq.batch.estimate import forecast, history, quantile
from agentq.cli.batch_preflight import report
from agentq.cli.batch_watch import Pace, advice, describe, headline, span, state
from tests.unit.batch.test_batch_lines import DEFAULTS
from tests.unit.batch.test_batch_output import NOW, batch


def runs(*costs: int, apart_s: float = 1.0) -> list[dict[str, Any]]:
    return [
        {
            "usage": {"cost_nano_usd": cost, "input_tokens": 10, "output_tokens": 2}, "waste": {},
            "created_at": NOW, "ended_at": NOW + timedelta(seconds=apart_s * (place + 1)),
        }
        for place, cost in enumerate(costs)
    ]  # fmt: skip


def test_quantiles_are_values_that_were_seen() -> None:
    values = list(range(1, 11))
    assert [quantile(values, share) for share in (0.1, 0.5, 0.9, 1.0)] == [1, 5, 9, 10]
    assert quantile([7], 0.5) == quantile([7], 0.9) == 7


def test_history_sums_up_earlier_runs() -> None:
    known = history(runs(1, 2, 3, 4, 5, 6, 7, 8, 9, 100))
    assert known is not None
    assert (known.cost_p50, known.cost_p90, known.cost_mean, known.input_tokens) == (5, 9, 14.5, 10)
    assert known.rate == 1.0, "of few runs, all together"
    assert known.as_estimate() == {"runs": 10, "p50_nano_usd": 5, "p90_nano_usd": 9}
    assert history([]) is None
    (alone,) = [history(runs(1))]
    assert alone is not None
    assert alone.rate is None


def test_the_rate_of_many_runs_is_the_best_that_lasted_for_a_quarter_of_them() -> None:
    slow, fast = runs(*[1] * 100, apart_s=10), runs(*[1] * 100, apart_s=0.5)
    known = history([*slow, *fast])
    assert known is not None
    assert known.rate == pytest.approx(2.0, rel=0.2)


def test_preflight_counts_lines_and_multiplies() -> None:
    lines = [
        {"id": "a", "input": "x" * 40},
        {"id": "b", "input": "y", "workflow": "support_desk"},
        {"id": "a", "input": "z"},
    ]
    checked = preflight.check(io.BytesIO("\n".join(map(json.dumps, lines)).encode()), DEFAULTS)
    assert (checked.good, checked.bad, checked.first_bad[0].code) == (2, 1, "duplicate_id")
    known = preflight.forecast("default", checked, history(runs(2_000, 4_000)))
    assert (known.lines, known.low, known.expected, known.high) == (1, 2_000, 3_000, 4_000)
    unknown = preflight.forecast("support_desk", checked, None)
    assert unknown.expected is None
    told = "\n".join(report(checked, [known, unknown], {known.workflow: 0.5, unknown.workflow: None}))
    for word in (
        "3 lines: 2 good, 1 bad",
        "down to $0.000002",
        "line 3: duplicate_id",
        "2 earlier runs",
        "not known",
        "--sample",
    ):
        assert word in told


def test_a_live_batch_is_forecast_from_what_it_did() -> None:
    """Bad lines cost nothing and are not counted on."""
    doc = batch(total=10, submitted={"line": 10, "good": 8, "bad": 2}, entries=4, cost_nano_usd=30,
                counts={"succeeded": 3, "failed": 0, "cancelled": 0, "expired": 0, "bad": 1})  # fmt: skip
    likely = forecast(doc, NOW + timedelta(seconds=8))
    assert (likely.rate, likely.cost, likely.seconds_left) == (0.5, 80, 12.0)
    assert forecast(doc, NOW, rate=2.0).seconds_left == 3.0
    assert forecast(batch(entries=0, total=None), NOW).cost is None


def test_the_pace_is_that_of_the_last_half_minute() -> None:
    pace = Pace()
    assert pace.rate(0, 0) is None
    assert pace.rate(10, 100) == 10
    assert pace.rate(60, 100) is None, "nothing has ended of late"
    assert pace.rate(70, 150) == 5


def test_a_line_of_progress_says_everything_that_moves() -> None:
    text = headline(batch(total=3, cost_nano_usd=2_000_000), 1, NOW + timedelta(seconds=4))
    assert text == (
        "2 of 3 lines, 1 failed, 1 in flight, 0.5/s, $0.002000 so far, about $0.004000 in all, done in about 2 s"
    )
    ending = headline(batch(status="cancelling", ending="cancelled"), 1, NOW + timedelta(seconds=4))
    assert "about" not in ending


def test_while_calls_wait_at_a_provider_no_rate_says_when_it_ends() -> None:
    job: Any = {"calls": 1_800, "sent_at": NOW}
    text = headline(batch(total=3), 2, NOW + timedelta(minutes=12), jobs=[job])
    assert "a job of 1,800 calls at the provider for 12 min" in text
    assert "/s" not in text
    assert "done in" not in text


def test_what_a_person_has_to_do_is_said() -> None:
    stopped = batch(paused={"by": "budget", "at": NOW}, budget_nano_usd=5_000_000_000)
    assert "agentq batch budget batch_1 USD" in (advice(stopped) or "")
    assert "batch resume" in (advice(batch(paused={"by": "person", "at": NOW})) or "")
    assert "same file again" in (advice(batch(status="validating")) or "")
    only_bad = advice(batch(status="completed", live=False)) or ""
    assert "--only errors" in only_bad
    assert "retry" not in only_bad
    told = "\n".join(describe(batch(waste_nano_usd=3, retry_of="batch_0", complete_by=NOW), 0, NOW))
    for word in ("waste", "retry of  batch_0", "window", "1 succeeded, 1 bad"):
        assert word in told
    assert [span(seconds) for seconds in (5, 600, 7200, 999_999)] == ["5 s", "10 min", "2.0 h", "11.6 d"]


def test_what_is_being_ended_is_not_paused_any_more() -> None:
    paused = batch(status="cancelling", ending="cancelled", paused={"by": "person", "at": NOW})
    assert (state(paused), advice(paused)) == ("cancelling", None)
    assert state(batch(paused={"by": "person", "at": NOW})) == "in_progress, paused (person)"


def test_a_description_says_for_whom_and_when_and_counts_one_as_one() -> None:
    submitted = {"line": 2, "good": 1, "bad": 1}
    doc = batch(submitted=submitted, total=1, entries=1, usage={"lost_llm_calls": 1, "llm_calls": 1})
    told = "\n".join(describe(doc, 0, NOW))
    for word in (
        "in.jsonl, 1 request, 1 bad line\n", "tenant acme, workflow desk", "1 of 1 line,",
        "1 call died with its worker", f"created {NOW:%Y-%m-%d %H:%M:%S}, started {NOW:%Y-%m-%d %H:%M:%S} UTC",
    ):  # fmt: skip
        assert word in told, told
    over = batch(status="completed", live=False, at={"validating": NOW, "completed": NOW + timedelta(hours=1)})
    assert f"ended {NOW + timedelta(hours=1):%Y-%m-%d %H:%M:%S} UTC" in "\n".join(describe(over, 0, NOW))


def test_a_dry_run_of_nothing_says_so() -> None:
    (told,) = report(preflight.check(io.BytesIO(b"\n \n"), DEFAULTS), [], {})
    assert "no line in the file" in told
