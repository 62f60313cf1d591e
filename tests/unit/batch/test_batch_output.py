"""Output files in OpenAI's format are what the official package reads; ours joins by id."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from openai.types import Batch
from openai.types.chat import ChatCompletion

from agentq.batch import output
from agentq.engine.tally import line_end
from schemas.batch import BATCH, BadLine, BatchDoc
from schemas.run import RunDoc

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)


def ended(status: str = "succeeded", **fields: Any) -> RunDoc:
    result = {
        "answer": "It comes tomorrow.", "agent": "orders", "acceptance": "critic", "citations": ["KB-7"],
        "tools": ["look_up"], "revisions": 0, "problems": [],
    }  # fmt: skip
    run = {
        "_id": "r00", "status": status, "workflow": {"name": "desk"}, "batch": {"id": "b", "line": 4, "custom_id": "m"},
        "result": result if status == "succeeded" else None, "error": None, "cancel": None, "created_at": NOW,
        "usage": {"steps": 3, "llm_calls": 2, "input_tokens": 30, "output_tokens": 5, "cost_nano_usd": 40_000},
        "waste": {"cost_nano_usd": 2_000}, "ended_at": NOW + timedelta(seconds=3),
    }  # fmt: skip
    return cast("RunDoc", {**run, **fields})


def test_a_result_holds_a_chat_completion() -> None:
    is_error, record = output.of_run(ended(), "openai")
    assert not is_error
    assert (record["custom_id"], record["error"], record["response"]["status_code"]) == ("m", None, 200)
    completion = ChatCompletion.model_validate(record["response"]["body"], strict=True)
    assert completion.choices[0].message.content == "It comes tomorrow."
    assert completion.model == "agentq/desk"
    assert completion.usage is not None
    assert completion.usage.total_tokens == 35


def test_an_error_has_code_message_fix_and_line() -> None:
    error = {"code": "rate_limited", "message": "Busy.", "hint": "Later."}
    is_error, record = output.of_run(ended("failed", error=error), "openai")
    assert is_error
    assert record["response"] is None
    assert record["error"] == {**error, "line": 4}
    assert output.of_run(ended("failed", error=error), "agentq")[1]["error"] == {**error, "line": 4}


@pytest.mark.parametrize("reason", ["batch_expired", "batch_cancelled"])
def test_a_line_that_its_batch_did_not_wait_for_says_so_and_is_billed(reason: str) -> None:
    run = ended("cancelled", cancel={"reason": reason, "at": NOW}, error={"code": "cancelled", "message": "x"})
    _, record = output.of_run(run, "agentq")
    assert record["error"]["code"] == reason
    assert record["cost_nano_usd"] == 42_000
    assert record["status"] == line_end(run) == reason.removeprefix("batch_")


def test_ours_has_the_answer_and_exact_costs() -> None:
    _, record = output.of_run(ended(), "agentq")
    assert (record["id"], record["line"], record["answer"], record["error"]) == ("m", 4, "It comes tomorrow.", None)
    assert record["cost_nano_usd"] == 42_000, "the cost of calls that were lost belongs to the line"
    assert record["usage"] == {"steps": 3, "llm_calls": 2, "input_tokens": 30, "output_tokens": 5}


def test_a_bad_line_is_an_error_in_both_formats() -> None:
    error = {"code": "invalid_json", "message": "Not JSON.", "hint": "Write JSON.", "line": 9}
    bad: BadLine = {"_id": "b:0000000009", "batch": "b", "line": 9, "custom_id": None, "error": error}
    is_error, record = output.of_bad_line(bad, "openai")
    assert is_error
    assert (record["custom_id"], record["response"], record["error"]) == (None, None, error)
    assert output.of_bad_line(bad, "agentq")[1]["error"] == error


def batch(**fields: Any) -> BatchDoc:
    doc = {
        "_id": "batch_1", "v": 1, "key": "k", "tenant": "acme", "workflow": "desk", "priority": "batch",
        "format": "openai", "source": {"name": "in.jsonl", "bytes": 1, "sha256": "x"}, "retry_of": None,
        "workflows": [], "status": "in_progress", "live": True, "at": {"validating": NOW, "in_progress": NOW},
        "created_at": NOW, "complete_by": None, "budget_nano_usd": None, "estimate": None, "paused": None,
        "submitted": {"line": 3, "good": 2, "bad": 1}, "total": 3, "entries": 2,
        "counts": {"succeeded": 1, "failed": 0, "cancelled": 0, "expired": 0, "bad": 1},
        "usage": {"input_tokens": 30, "output_tokens": 5}, "cost_nano_usd": 7, "waste_nano_usd": 0,
        "max_line_nano_usd": 7, "ending": None, "swept": "", "error": None,
    }  # fmt: skip
    return BATCH.validate_python({**doc, **fields})


@pytest.mark.parametrize(
    "status",
    ["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"],
)
def test_a_batch_is_one_to_the_official_package(status: str) -> None:
    error = {"code": "empty_file", "message": "No line.", "hint": ""}
    window = NOW + timedelta(hours=2)
    doc = batch(status=status, at={"validating": NOW, status: NOW}, complete_by=window, error=error)
    read = Batch.model_validate(output.of_batch(doc), strict=True)
    assert read.status == status
    if status != "validating":
        assert getattr(read, f"{status}_at") == NOW.timestamp()
    assert (read.expires_at, read.completion_window) == (window.timestamp(), "7200s")
    assert read.request_counts is not None
    assert (read.request_counts.total, read.request_counts.completed, read.request_counts.failed) == (3, 1, 1)
    assert read.usage is not None
    assert read.usage.total_tokens == 35
    assert read.errors is not None
    assert read.errors.data is not None
    assert read.errors.data[0].code == "empty_file"
