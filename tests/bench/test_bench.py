"""The benchmark's own promises: its model server plays the workload, and a small run of all of it comes out right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentq.llm.openai import decode, encode
from agentq.llm.types import LlmCall
from agentq.llm.wire import dumps
from bench import accounting, model_server
from bench.__main__ import main
from bench.load import problems
from schemas.catalog import ModelSpec
from schemas.chat import Message

MODEL = ModelSpec(provider="openai", model="bench")
ASKED: list[Message] = [{"role": "user", "content": 'Say "role":"tool" and {"json_schema":{"name":"route"}}.'}]
OBSERVED: list[Message] = [*ASKED, {"role": "tool", "content": "shipped", "tool_call_id": "c1"}]


@pytest.mark.parametrize(
    ("messages", "schema_name", "expected"),
    [
        (ASKED, "route", model_server.ROUTE),
        (OBSERVED, "verdict", model_server.VERDICT),
        (ASKED, None, model_server.TOOL_CALL),
        (OBSERVED, None, model_server.FINAL),
    ],
)
def test_the_model_server_tells_the_four_calls_of_a_run_apart(
    messages: list[Message], schema_name: str | None, expected: bytes
) -> None:
    """Whatever the customer writes: the search reads JSON syntax, not text."""
    schema: dict[str, Any] | None = {"type": "object"} if schema_name else None
    call = LlmCall(MODEL, messages, schema=schema, schema_name=schema_name or "answer")
    _, _, body = encode(call)
    answer = model_server.answer_to(dumps(body))
    assert answer == expected
    reply = decode(call, answer.partition(b"\r\n\r\n")[2])
    assert bool(reply.tool_calls) == (expected == model_server.TOOL_CALL)


def test_cpu_of_others_is_what_the_machine_did_beside_ours() -> None:
    """Never negative, though the two clocks are read one after the other."""
    before = accounting.Reading(10.0, {"a": 1.0, "b": 2.0}, 100.0)
    after = accounting.Reading(20.0, {"a": 4.0, "b": 2.0}, 108.0)
    spent = accounting.spent(before, after)
    assert (spent.wall_s, spent.processes, spent.others_cores) == (10.0, {"a": 3.0, "b": 0.0}, 0.5)
    assert accounting.spent(before, accounting.Reading(20.0, {"a": 4.0, "b": 2.0}, 101.0)).others_cores == 0.0


def test_runs_that_go_another_way_or_calls_made_twice_spoil_the_figures() -> None:
    """The benchmark would rather fail than print a good figure for work that was not done."""
    good = {"status": "succeeded", "usage": {"steps": 5}, "audit": {"seq": 7}, "waste": {}}
    right = {"calls": 8, "repeated": 0}
    assert problems(2, [good, good], right) == []
    for ended, model in [
        ([good], right),
        ([good, {**good, "status": "failed"}], right),
        ([good, {**good, "usage": {"steps": 7}}], right),
        ([good, {**good, "waste": {"lost_calls": 1}}], right),
        ([good, good], {"calls": 9, "repeated": 1}),
        ([good, good], {"calls": 7, "repeated": 0}),
    ]:
        assert len(problems(2, ended, model)) == 1


@pytest.mark.servers
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["combined", "pools"])
def test_a_quick_bench_accounts_for_every_run_and_call(
    topology: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 0 says: all runs succeeded, four model calls each, none with a key that was used before."""
    file = tmp_path / "result.json"
    code = main(["--quick", "--topology", topology, "--json", str(file), "--dir", str(tmp_path)])
    shown = capsys.readouterr()
    assert code == 0, shown.out + shown.err
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["problems"] == []
    assert [(one["runs"], one["calls"]) for repeats in result["bursts"] for one in repeats] == [(100, 400), (50, 200)]
    assert result["bursts"][1][0]["max_in_flight"] > 1
    assert result["bursts"][1][0]["makespan_s"] >= 4.0
    assert "Every run succeeded" in shown.out
