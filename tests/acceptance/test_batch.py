"""A batch through the whole running system: handed in with the command, admitted, worked off, counted, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import uuid4

from openai.types import Batch
from openai.types.chat import ChatCompletion

from tests.acceptance.running import Running

QUESTION = "How much is express shipping and how long does it take?"


def openai_line(number: int, text: str) -> str:
    body = {"model": "agentq/support_desk", "user": "cust-011", "messages": [{"role": "user", "content": text}]}
    line = {"custom_id": f"c-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(line)


def results(running: Running, batch_id: str, *words: str) -> list[dict[str, Any]]:
    done = running.agentq("batch", "results", batch_id, *words)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_batch_in_openais_format_comes_back_in_openais_format(running: Running, tmp_path: Path) -> None:
    """Every line has one result or one error; the cost of the batch is the sum of its lines."""
    file = tmp_path / "requests.jsonl"
    asked = [openai_line(number, f"{QUESTION} ({uuid4().hex[:6]})") for number in range(1, 13)]
    file.write_text("\n".join([*asked, "{broken", openai_line(3, "again")]), encoding="utf-8")
    submitted = running.agentq("batch", "submit", str(file), "--workflow", "support_desk", "--watch")
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    batch_id, *watched = submitted.stdout.splitlines()
    assert "14 of 14 lines, 2 failed" in "\n".join(watched)
    found = results(running, batch_id)
    assert [line["custom_id"] for line in found] == [f"c-{n}" for n in range(1, 13)] + [None, "c-3"]
    for line in found[:12]:
        completion = ChatCompletion.model_validate(line["response"]["body"], strict=True)
        assert "12.90 USD" in (completion.choices[0].message.content or "")
    assert [line["error"]["code"] for line in found[12:]] == ["invalid_json", "duplicate_id"]
    read = Batch.model_validate_json(running.agentq("batch", "status", batch_id, "--openai").stdout)
    assert read.request_counts is not None
    assert (read.status, read.request_counts.completed, read.request_counts.failed) == ("completed", 12, 2)
    ours = results(running, batch_id, "--format", "agentq")
    facts = json.loads(running.agentq("batch", "status", batch_id, "--json").stdout)
    assert facts["cost_nano_usd"] == sum(line["cost_nano_usd"] for line in ours) > 0
    assert read.usage is not None
    assert read.usage.input_tokens == sum(line["usage"]["input_tokens"] for line in ours[:12])


def test_a_paused_batch_waits_and_cancel_ends_it(running: Running, tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    lines = [{"id": f"m-{n}", "input": f"{QUESTION} {uuid4()}", "user": "cust-011"} for n in range(40)]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    submitted = running.agentq("batch", "submit", str(file), "--workflow", "support_desk", "--budget", "0.000000001")
    batch_id = submitted.stdout.strip()
    watched = running.agentq("batch", "watch", batch_id)
    assert watched.returncode == 1
    assert "paused (budget)" in watched.stdout
    facts = json.loads(running.agentq("batch", "status", batch_id, "--json").stdout)
    assert facts["ended"] <= 1, "nobody knew what a line costs, so one went first"
    cancelled = running.agentq("batch", "cancel", batch_id)
    assert cancelled.returncode == 0, cancelled.stderr
    assert running.agentq("batch", "watch", batch_id).returncode == 1
    codes = [line["error"] and line["error"]["code"] for line in results(running, batch_id)]
    assert codes.count("batch_cancelled") >= 39
