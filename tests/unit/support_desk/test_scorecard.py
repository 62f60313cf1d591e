"""The scorecard finds every kind of wrong outcome, and fails unless all are right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError
from rich.console import Console

from agentq.client import Outcome
from examples.support_desk.demo import talks
from examples.support_desk.scorecard import (
    DeskRequest,
    Expectation,
    Score,
    exit_code,
    load_requests,
    outcome_faults,
    show,
)

EXPECT = Expectation(
    specialist=["orders", "general"], tools=["get_order_status"], facts=[r"on 2026-11-\d\d"], forbidden=["secret"],
    citations=["KB-001"],
)  # fmt: skip
RIGHT = Outcome(
    run_id="r1", status="succeeded", answer="It arrives on 2026-11-24. [KB-001]", agent="orders", acceptance="critic",
    tools=["get_order_status", "get_order_status"], citations=["KB-001"],
)  # fmt: skip


def test_a_right_outcome_has_no_faults() -> None:
    assert outcome_faults(EXPECT, RIGHT) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"status": "failed"}, "status is failed"),
        ({"agent": "billing"}, "answered by billing, not by orders or general"),
        ({"acceptance": "revisions_exhausted"}, "accepted by revisions_exhausted"),
        ({"tools": []}, "called no tool"),
        ({"tools": ["get_order_status", "process_refund"]}, "process_refund"),
        ({"answer": "Soon. [KB-001]"}, "does not say"),
        ({"answer": "on 2026-11-24, secret"}, "says /secret/"),
        ({"citations": []}, "does not cite KB-001"),
        ({"answer": None}, "does not say"),
    ],
)
def test_every_kind_of_wrong_outcome_is_named(change: dict[str, object], fault: str) -> None:
    found = outcome_faults(EXPECT, replace(RIGHT, **change))  # type: ignore[arg-type]
    assert any(fault in one for one in found), found


def test_a_tool_that_does_not_exist_does_not_count_as_called() -> None:
    assert outcome_faults(EXPECT, replace(RIGHT, tools=["get_order_status_v2", "get_order_status"])) == []


def test_the_exit_code_is_0_only_if_all_are_right() -> None:
    request = DeskRequest(id="a", text="x", expect=EXPECT)
    right, wrong = Score(request, RIGHT, ()), Score(request, RIGHT, ("bad",))
    assert [exit_code(scores) for scores in ([right], [right, wrong], [])] == [0, 1, 1]


@pytest.mark.parametrize("terminal", [True, False])
def test_it_is_shown_with_and_without_a_terminal(terminal: bool, capsys: pytest.CaptureFixture[str]) -> None:
    request = DeskRequest(id="where-is-it", text="x", expect=EXPECT)
    scores = [Score(request, RIGHT, ()), Score(request, RIGHT, ("says too much",))]
    show(scores, Console(force_terminal=terminal, width=200))
    shown = capsys.readouterr().out
    assert "where-is-it" in shown
    assert "says too much" in shown
    assert "1 of 2 requests answered as expected (50 %)" in shown


def test_a_mistyped_expectation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "requests.yaml"
    path.write_text("requests: [{id: a, text: x, expect: {specialist: orders, fact: [y]}}]")
    with pytest.raises(ValidationError, match="fact"):
        load_requests(path)


def test_a_repeated_id_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "requests.yaml"
    path.write_text("requests: [{id: a, text: x, expect: {specialist: s}}, {id: a, text: y, expect: {specialist: s}}]")
    with pytest.raises(ValueError, match="repeated"):
        load_requests(path)


def test_requests_of_one_conversation_stay_together_and_in_order() -> None:
    grouped = [[request.id for request in talk] for talk in talks(load_requests())]
    assert ["talk-1", "talk-2", "talk-3"] in grouped
    assert sum(len(talk) for talk in grouped) == len(load_requests())
