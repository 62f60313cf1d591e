"""The shape of the command line: quick help, sentences instead of tracebacks, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import click
import pytest
from click.testing import CliRunner

from agentq.cli import main
from agentq.cli.connect import mongo_url, settings_for
from agentq.cli.main import COMMANDS, cli
from agentq.embedded.record import StackLock
from agentq.errors import AgentqError, ConfigError, Conflict, InvalidRequest, NotFound, Unavailable

ROOT = Path(__file__).resolve().parents[3]
HEAVY = ("celery", "kombu", "pymongo", "redis", "pydantic", "aiohttp")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Invoke the command line in an empty directory with no AGENTQ_ setting."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("AGENTQ_")]:
        monkeypatch.delenv(name)
    return lambda *argv: CliRunner().invoke(cli, list(argv), catch_exceptions=False)


def publish(folder: Path, settings: dict[str, str]) -> StackLock:
    from datetime import UTC, datetime

    lock = StackLock(folder)
    part = {"name": "redis", "pid": 1, "address": "127.0.0.1:1", "log_file": "x", "state": "up"}
    lock.publish(settings, [part], datetime(2026, 11, 21, tzinfo=UTC))
    return lock


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    program = (
        "import sys; from click.testing import CliRunner; from agentq.cli.main import cli;"
        "print(CliRunner().invoke(cli, ['--help']).output);"
        f"sys.exit(', '.join(name for name in {HEAVY} if name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stderr.strip() == ""
    for name in COMMANDS:
        assert f"  {name} " in done.stdout


def test_the_settings_are_shown_without_celery() -> None:
    program = (
        "import sys; from click.testing import CliRunner; from agentq.cli.main import cli;"
        "assert CliRunner().invoke(cli, ['config', 'show']).exit_code == 0;"
        "sys.exit(', '.join(name for name in ('celery', 'kombu', 'pymongo', 'redis') if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_unknown_command_is_wrong_usage(run: Any) -> None:
    result = run("fly")
    assert result.exit_code == 2
    assert "No such command 'fly'" in result.output


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("The file is wrong."), 2),
        (Conflict("It runs already."), 2),
        (InvalidRequest("Too long."), 2),
        (NotFound("No such run."), 2),
        (Unavailable("MongoDB does not answer."), 1),
        (AgentqError("Something broke."), 1),
    ],
)
def test_an_error_is_a_sentence_a_hint_and_a_code(
    run: Any, monkeypatch: pytest.MonkeyPatch, error: AgentqError, code: int
) -> None:
    error.hint = "Do this."

    @click.command()
    @click.option("--json", "as_json", is_flag=True)
    def doctor(as_json: bool) -> None:
        raise error

    monkeypatch.setattr("agentq.cli.doctor.doctor", doctor)
    result = run("doctor")
    assert result.exit_code == code
    assert result.stderr == f"error: {error.message} [{error.code}]\n  Do this.\n"
    assert result.stdout == ""
    result = run("doctor", "--json")
    assert result.exit_code == code
    assert json.loads(result.stderr)["error"]["code"] == error.code


def test_a_second_up_is_refused_with_the_others_process_id(run: Any, tmp_path: Path) -> None:
    lock = StackLock(tmp_path / "data")
    result = run("up", "--data-dir", str(tmp_path / "data"))
    lock.release()
    assert result.exit_code == 2
    assert f"(process {os.getpid()})" in result.stderr
    assert "--data-dir" in result.stderr
    assert "Traceback" not in result.output


def test_up_refuses_a_port_and_a_directory_that_cannot_be(run: Any) -> None:
    assert run("up", "--redis-port", "70000").exit_code == 2
    assert run("up", "--app", "does-not-exist").exit_code == 2
    assert run("up", "--scenario", "does-not-exist.yaml").exit_code == 2


def test_config_show_masks_secrets(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTQ_OPENAI_API_KEY", "sk-very-secret")
    monkeypatch.setenv("AGENTQ_BROKER_URL", "redis://:hush-hush@far:6379/0")
    for argv in (("config", "show"), ("config", "show", "--json")):
        result = run(*argv)
        assert result.exit_code == 0
        assert "openai_api_key" in result.stdout
        assert "very-secret" not in result.output
        assert "hush-hush" not in result.output
    rows = {row["name"]: row for row in json.loads(run("config", "show", "--json").stdout)}
    assert set(rows["data_dir"]) == {"name", "value", "source"}


def test_commands_find_the_stack_that_runs_here(run: Any, tmp_path: Path) -> None:
    lock = publish(tmp_path / "data", {"mongo_url": "mongodb://here", "broker_url": "redis://here", "flower_url": "x"})
    settings = settings_for(tmp_path / "data")
    lock.release()
    assert mongo_url(settings) == "mongodb://here"
    assert settings.broker_url is not None
    assert settings.broker_url.get_secret_value() == "redis://here"


def test_an_explicit_setting_wins_over_the_running_stack(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = publish(tmp_path / "data", {"mongo_url": "mongodb://here", "broker_url": "redis://here"})
    monkeypatch.setenv("AGENTQ_MONGO_URL", "mongodb://far")
    settings = settings_for(tmp_path / "data")
    lock.release()
    assert mongo_url(settings) == "mongodb://far"
    assert settings.broker_url is not None
    assert settings.broker_url.get_secret_value() == "redis://here"


def test_where_nothing_runs_the_sentence_says_how_to_start(run: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No agentq is running") as caught:
        mongo_url(settings_for(tmp_path / "data"))
    assert str(tmp_path / "data") in caught.value.message
    for word in ("agentq up", "--data-dir", "AGENTQ_DATA_DIR"):
        assert word in caught.value.hint


def test_up_on_another_directory_says_how_a_second_terminal_finds_it(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ready:
        settings: ClassVar[dict[str, str]] = {}

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def run(self, _stop: Any, _hard: Any, when_ready: Any) -> None:
            when_ready(self)

    monkeypatch.setattr("agentq.cli.up.Stack", Ready)
    assert f"export AGENTQ_DATA_DIR='{tmp_path}/my data'" in run("up", "--data-dir", "my data").stdout
    assert "export" not in run("up").stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cron", "* * * * *", "--wait"], "--wait does not go with --cron"),
        (["--timezone", "Europe/Zurich"], "--timezone goes with --cron"),
        (["--conversation-policy", "merge"], "--conversation-policy needs a --conversation"),
        (["--priority", "urgent"], "'urgent' is no priority. Write interactive"),
        (["--at", "2999-01-01T00:00Z", "--delay", "5"], "--at and --delay exclude each other"),
        (["--debounce", "5"], "--debounce needs a --debounce-key"),
        (["--singleton-key", "s", "--conversation", "c"], "--singleton-key and --conversation exclude each other"),
        (["--at", "tomorrow"], "--at: that is no time, write one as 2026-12-01T09:00:00+01:00"),
        (["--expires-at", "2026-12-01T09:00:00"], "--expires-at: a time needs its offset"),
        (["--deadline", "-1"], "--deadline: "),
        (["--budget-usd", "-1"], "Change --budget-usd as the message says."),
    ],
)
def test_what_submit_refuses_is_told_by_the_names_of_the_options(
    run: Any, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.setenv("AGENTQ_MONGO_URL", "mongodb://127.0.0.1:1")  # it is not asked
    result = run("submit", *words, "x")
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert result.stdout == ""


def test_a_limit_that_is_no_number_is_told_with_its_option(run: Any) -> None:
    for option, value, what in (
        ("--in-flight", "1.5", "a whole number"), ("--waiting", "many", "a whole number"),
        ("--weight", "x", "a number"), ("--spend-usd", "inf", "a number"),
    ):  # fmt: skip
        result = run("limits", "set", "--tenant", "t", option, value)
        assert result.exit_code == 2
        assert f"{option}: '{value}' is not {what} (or 'none')." in result.stderr


def test_doctor_fails_with_a_remedy_where_nothing_runs(run: Any) -> None:
    result = run("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(result.stdout)}
    assert result.exit_code == 1
    assert checks["python"]["level"] == "ok"
    assert checks["libraries"]["level"] == "ok"
    assert checks["stack"]["level"] == "fail"
    assert "agentq up" in checks["stack"]["mend"]


def test_doctor_names_servers_that_do_not_answer(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTQ_BROKER_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("AGENTQ_MONGO_URL", "mongodb://127.0.0.1:1/?serverSelectionTimeoutMS=200")
    monkeypatch.setenv("AGENTQ_OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    result = run("doctor")
    assert result.exit_code == 1
    for text in ("AGENTQ_BROKER_URL right?", "AGENTQ_MONGO_URL right?", "Check the base URL"):
        assert text in result.stdout
    assert "Traceback" not in result.output


def test_doctor_works_where_a_library_is_missing(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentq.cli.check_machine._LIBRARIES", ("celery", "no-such-library"))
    result = run("doctor")
    assert result.exit_code == 1
    assert "missing: no-such-library" in result.stdout
    assert "agentq[server]" in result.stdout


def test_a_full_disk_is_seen_before_mongodb_stops(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage(10, 10, 100_000_000))
    checks = {check["name"]: check for check in json.loads(run("doctor", "--json").stdout)}
    assert checks["disk"]["level"] == "fail"


def test_the_table_names_modules_of_the_command_line_only() -> None:
    assert all(module.startswith("agentq.cli.") for module, _ in main.COMMANDS.values())
