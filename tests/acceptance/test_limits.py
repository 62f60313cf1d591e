"""Limits, waiting and recurring requests from the command line of a running system."""

from __future__ import annotations

import json
import re
from uuid import uuid4

from tests.acceptance.running import Running, until


def test_limits_are_set_shown_and_cleared_with_their_history(running: Running) -> None:
    tenant = f"t-{uuid4().hex[:8]}"
    done = running.agentq(
        "limits", "set", "--tenant", tenant, "--weight", "3", "--in-flight", "5", "--spend-usd", "0.5"
    )
    assert done.returncode == 0, done.stderr
    assert tenant in done.stdout
    done = running.agentq("limits", "set", "--tenant", tenant, "--in-flight", "none")
    assert done.returncode == 0, done.stderr
    done = running.agentq("limits", "set", "--tenant", tenant, "--in-flight", "none")
    assert done.returncode == 0
    assert "nothing changed" in done.stderr
    shown = json.loads(running.agentq("limits", "show", "--json").stdout)[tenant]
    assert (shown["weight"], shown["in_flight"], shown["spend"]) == (3.0, None, 500_000_000)
    assert running.agentq("limits", "clear", "--tenant", tenant).returncode == 0
    assert running.agentq("limits", "clear", "--tenant", tenant).returncode == 2
    history = running.agentq("limits", "show", "--history")
    assert history.returncode == 0
    assert sum(tenant in line for line in history.stdout.splitlines()) == 3
    assert "whole and unchanged" in history.stderr


def test_a_user_is_told_what_is_wrong_with_a_limit_or_a_priority(running: Running) -> None:
    for words in (
        ("limits", "set", "--tenant", "t"),
        ("limits", "set", "--tenant", "t", "--in-flight", "many"),
        ("limits", "set", "--tenant", "t", "--weight", "0"),
        ("limits", "set", "--tenant", "t", "--weight", "inf"),
        ("limits", "set", "--tenant", "t", "--spend-usd", "nan"),
        ("submit", "--priority", "urgent", "x"),
        ("submit", "--priority", "interactive:12", "x"),
        ("submit", "--at", "tomorrow", "x"),
        ("submit", "--cron", "every day", "x"),
        ("schedule", "drop", "nothing"),
    ):
        done = running.agentq(*words)
        assert done.returncode == 2, (words, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr


def test_a_delayed_request_waits_visibly_and_then_runs(running: Running) -> None:
    done = running.agentq("submit", "--json", "--delay", "4", "--priority", "interactive:7", "Where is LF-1002?")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["position"] == 0
    assert 0 < told["estimated_start_s"] <= 4
    assert "not before" in running.agentq("show", told["run_id"]).stdout
    plain = running.agentq("submit", "--delay", "1000", "Where is LF-1002?")
    assert re.fullmatch(r"r[0-9a-f]{28}\n", plain.stdout), "scripts take the id from stdout"
    assert plain.stderr == "waits: starts in about 17 min\n"
    assert running.agentq("cancel", plain.stdout.strip()).returncode == 0
    assert running.agentq("wait", told["run_id"]).returncode == 0


def test_a_batch_request_goes_through_the_backlog_and_is_answered(running: Running) -> None:
    done = running.agentq("submit", "--wait", "--priority", "batch", "Where is my order LF-1002?")
    assert done.returncode == 0, done.stderr


def test_a_recurring_request_is_listed_and_dropped(running: Running) -> None:
    done = running.agentq(
        "submit", "--cron", "*/1 * * * *", "--timezone", "Europe/Zurich", "--user", "cust-001", "Hello"
    )
    assert done.returncode == 0, done.stderr
    schedule = done.stdout.strip()
    assert re.fullmatch(r"first due \d{4}-\d\d-\d\d \d\d:\d\d UTC\n", done.stderr)
    assert schedule in running.agentq("schedule", "list").stdout

    def handed_in() -> bool:
        rows = [json.loads(row) for row in running.agentq("schedule", "list", "--json").stdout.splitlines()]
        return any(row["_id"] == schedule and row["last_run"] for row in rows)

    until(handed_in, "the request is handed in at the full minute", 75)
    assert running.agentq("schedule", "drop", schedule).returncode == 0
    assert schedule not in running.agentq("schedule", "list").stdout
