"""The command line beside a running system, as a person uses it: another process, its output, its exit code."""

from __future__ import annotations

import json
import re
from typing import Any
from uuid import uuid4

from pymongo.database import Database

from agentq.client import Client
from tests.acceptance.running import SLOWLY, Running, until

QUESTION = "How much is express shipping and how long does it take?"
DESK = ("--workflow", "support_desk", "--user", "cust-011")


def one_sentence(text: str) -> str:
    """What an error prints: a sentence and a hint, never a traceback; gives it back without the colours."""
    assert "Traceback" not in text
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text).strip()
    assert 1 <= len(plain.splitlines()) <= 4, plain
    return plain


def test_submit_and_wait_prints_the_answer(running: Running) -> None:
    done = running.agentq("submit", *DESK, "--wait", QUESTION)
    assert done.returncode == 0, done.stderr
    assert "12.90 USD" in done.stdout
    assert "succeeded" in done.stderr, "the facts go to stderr, so that stdout is the answer alone"


def test_submit_reads_standard_input_and_wait_prints_json(running: Running) -> None:
    submitted = running.agentq("submit", *DESK, "--json", "-", text=QUESTION)
    assert submitted.returncode == 0, submitted.stderr
    run_id = json.loads(submitted.stdout)["run_id"]
    waited = running.agentq("wait", run_id, "--json")
    assert waited.returncode == 0, waited.stderr
    outcome = json.loads(waited.stdout)
    assert (outcome["run_id"], outcome["status"], outcome["citations"]) == (run_id, "succeeded", ["KB-013"])


def test_an_idempotency_key_gives_the_same_run_and_refuses_another_body(running: Running) -> None:
    key = ("--idempotency-key", f"mail-{uuid4()}")
    first = running.agentq("submit", *DESK, *key, QUESTION)
    again = running.agentq("submit", *DESK, *key, QUESTION)
    other = running.agentq("submit", *DESK, *key, "Another question")
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    assert first.stdout == again.stdout
    assert other.returncode == 2
    assert "belongs to another request" in one_sentence(other.stderr)
    assert first.stdout.strip() in other.stderr


def test_runs_lists_and_show_tells_what_happened(running: Running, client: Client) -> None:
    tenant = f"tenant-{uuid4().hex[:8]}"
    run = client.submit(QUESTION, workflow="support_desk", tenant=tenant, user="cust-011")
    run.wait(60)
    listed = running.agentq("runs", "--tenant", tenant, "--json")
    assert listed.returncode == 0, listed.stderr
    (row,) = [json.loads(line) for line in listed.stdout.splitlines()]
    assert (row["run_id"], row["status"], row["agent"]) == (run.run_id, "succeeded", "orders")
    assert running.agentq("runs", "--tenant", tenant, "--status", "failed", "--json").stdout == ""
    table = running.agentq("runs", "--tenant", tenant)
    assert run.run_id[:8] in table.stdout
    shown = running.agentq("show", run.run_id)
    assert shown.returncode == 0, shown.stderr
    for word in (run.run_id, "succeeded", tenant, "orders", "search_knowledge_base", "12.90 USD", "run.accepted"):
        assert word in shown.stdout, f"{word!r} is missing in:\n{shown.stdout}"
    whole = json.loads(running.agentq("show", run.run_id, "--json").stdout)
    assert whole["run"]["_id"] == run.run_id
    assert [event["seq"] for event in whole["events"]] == list(range(1, len(whole["events"]) + 1))


def test_cancel_ends_a_run_that_is_at_work(running: Running, client: Client) -> None:
    run = client.submit(f"Do it {SLOWLY}: {QUESTION}", workflow="support_desk", user="cust-011")
    until(lambda: run.status() == "running", "the run is at work")
    asked = running.agentq("cancel", run.run_id, "--reason", "no longer needed")
    assert asked.returncode == 0, asked.stderr
    waited = running.agentq("wait", run.run_id)
    assert waited.returncode == 1, "a run that did not succeed ends with code 1"
    assert "cancelled" in waited.stderr
    assert "no longer needed" in running.agentq("show", run.run_id).stdout
    again = running.agentq("cancel", run.run_id)
    assert (again.returncode, again.stdout) == (0, f"{run.run_id}: has been cancelled already\n")
    ended = client.submit(QUESTION, workflow="support_desk", user="cust-011")
    ended.wait(60)
    late = running.agentq("cancel", ended.run_id)
    assert late.returncode == 2
    assert "already succeeded" in one_sentence(late.stderr)


def test_conversation_prints_its_messages_in_order(running: Running) -> None:
    name = f"chat-{uuid4().hex}"
    for text in ("Where is my order LF-1002?", QUESTION):
        words = ("--workflow", "support_desk", "--user", "cust-001", "--conversation", name, "--wait", text)
        done = running.agentq("submit", *words)
        assert done.returncode == 0, done.stderr
    shown = running.agentq("conversation", name).stdout
    places = [shown.index(part) for part in ("LF-1002?", "2026-11-24", QUESTION, "12.90 USD")]
    assert places == sorted(places), shown


def test_audit_verify_passes_and_names_the_record_that_was_changed(
    running: Running, client: Client, mongo: Database[dict[str, Any]]
) -> None:
    """Every chain is whole; one edited record makes it fail and say which; put back, it is whole again."""
    run = client.submit(QUESTION, workflow="support_desk", user="cust-011")
    run.wait(60)
    key = f"{run.run_id}:"
    until(lambda: mongo["audit"].count_documents({"_id": {"$gte": key, "$lt": f"{run.run_id};"}}) >= 3, "copied out")
    whole = running.agentq("audit", "verify")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    record = mongo["audit"].find_one({"run": run.run_id, "seq": 2})
    assert record is not None
    mongo["audit"].update_one({"_id": record["_id"]}, {"$set": {"data.forged": True}})
    try:
        broken = running.agentq("audit", "verify")
        assert broken.returncode == 1
        named = [line for line in broken.stdout.splitlines() if run.run_id in line]
        assert named, broken.stdout
        assert any(re.search(r"\b2\b", line) for line in named), f"the record is not named: {named}"
        assert running.agentq("audit", "verify", run.run_id).returncode == 1
    finally:
        mongo["audit"].replace_one({"_id": record["_id"]}, record)
    assert running.agentq("audit", "verify", run.run_id).returncode == 0


def test_what_is_wrong_is_said_in_one_sentence_with_code_2(running: Running) -> None:
    """Mistakes of the caller: an unknown run, an unknown workflow, an empty text, a name that is none."""
    for words, said in (
        (("show", "r0"), "no run 'r0'"),
        (("wait", "r0"), "no run 'r0'"),
        (("cancel", "r0"), "no run 'r0'"),
        (("audit", "verify", "r0"), "no run 'r0'"),
        (("conversation", "nobody"), "no conversation 'nobody'"),
        (("submit", "--workflow", "suport_desk", "Hello"), "no workflow 'suport_desk'"),
        (("submit", ""), "The input is empty"),
        (("submit", "--tenant", "not a name", "Hello"), "tenant"),
        (("submit", "bell \x07"), "U+0007"),
    ):
        done = running.agentq(*words)
        assert done.returncode == 2, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        assert said in one_sentence(done.stderr), words
        assert done.stdout == "", words


def test_a_mistyped_option_is_refused_with_the_right_one(running: Running) -> None:
    done = running.agentq("submit", "--idempotencykey", "k", "Hello")
    assert done.returncode == 2
    assert "--idempotency-key" in one_sentence(done.stderr)
