"""A stack of fake components: the record, the watching thread, the clean end."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from agentq.embedded.plan import Plan
from agentq.embedded.record import StackRecord, find_stack
from agentq.embedded.stack import Stack
from agentq.embedded.supervisor import Component, Restart
from agentq.errors import Conflict, Unavailable
from config.settings import Settings, load_settings

SERVE = "import pathlib, signal, sys; pathlib.Path(sys.argv[1]).touch(); signal.pause()"
URLS = {"broker_url": "redis://127.0.0.1:1/0", "mongo_url": "mongodb://127.0.0.1:2", "flower_url": "http://127.0.0.1:3"}


def component(folder: Path, name: str, program: str = SERVE) -> Component:
    file = folder / f"{name}.ready"
    argv = [sys.executable, "-I", "-S", "-c", program, str(file)]
    return Component(name, argv, ready=lambda _pid: file.exists(), ready_file=file, address=f"fake:{name}")


def settings_in(folder: Path) -> Settings:
    return load_settings(data_dir=folder / "data")


def plan_of(folder: Path, *names: str) -> Plan:
    return Plan([component(folder, name) for name in names], URLS)


def eventually(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while not condition():
        assert time.monotonic() < deadline
        pause.wait(0.02)


def found(folder: Path) -> StackRecord:
    record = find_stack(folder / "data")
    assert record is not None
    return record


def test_a_stack_is_found_while_it_runs_and_leaves_nothing(tmp_path: Path) -> None:
    with Stack(settings_in(tmp_path), plan=plan_of(tmp_path, "store", "worker")) as stack:
        record = found(tmp_path)
        assert record.settings == URLS == stack.settings
        assert [(one["name"], one["address"], one["state"]) for one in record.components] == [
            ("store", "fake:store", "up"),
            ("worker", "fake:worker", "up"),
        ]
        pids = [one["pid"] for one in record.components]
        assert all(psutil.pid_exists(pid) for pid in pids)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert find_stack(tmp_path / "data") is None


def test_a_component_that_dies_is_restarted_and_the_record_follows(tmp_path: Path) -> None:
    lines: list[str] = []
    restart = Restart(first_pause_s=0.01)
    with Stack(settings_in(tmp_path), plan=plan_of(tmp_path, "store"), report=lines.append, restart=restart):
        before = found(tmp_path).components[0]["pid"]
        psutil.Process(before).kill()
        eventually(lambda: found(tmp_path).components[0]["pid"] not in (None, before))
        assert any("died (signal SIGKILL)" in line for line in lines)


def test_a_second_stack_on_the_same_directory_is_refused(tmp_path: Path) -> None:
    with Stack(settings_in(tmp_path), plan=plan_of(tmp_path, "store")):
        pid = found(tmp_path).components[0]["pid"]
        with (
            pytest.raises(Conflict, match="already runs"),
            Stack(settings_in(tmp_path), plan=plan_of(tmp_path, "store")),
        ):
            pass
        assert psutil.pid_exists(pid), "the refused one has touched nothing"
        assert found(tmp_path).components[0]["pid"] == pid


def test_a_failed_start_stops_what_it_had_started(tmp_path: Path) -> None:
    lines: list[str] = []
    bad = component(tmp_path, "bad", "import sys; sys.exit('wrong')")
    plan = Plan([component(tmp_path, "store"), bad], URLS)
    with (
        pytest.raises(Unavailable, match="bad does not start"),
        Stack(settings_in(tmp_path), plan=plan, report=lines.append, restart=Restart(first_pause_s=0.01)),
    ):
        pass
    assert "stopping store" in lines
    with Stack(settings_in(tmp_path), plan=plan_of(tmp_path, "store")):
        assert find_stack(tmp_path / "data") is not None, "the lock was released"


def test_run_stops_when_told_and_hard_cuts_it_short(tmp_path: Path) -> None:
    stubborn = component(tmp_path, "stubborn", f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SERVE}")
    stop, hard, ready = threading.Event(), threading.Event(), threading.Event()
    stack = Stack(settings_in(tmp_path), plan=Plan([stubborn], URLS))
    runner = threading.Thread(target=stack.run, args=(stop, hard, lambda _stack: ready.set()))
    runner.start()
    assert ready.wait(20)
    pid = found(tmp_path).components[0]["pid"]
    stop.set()
    hard.set()
    runner.join(10)
    assert not runner.is_alive()
    assert not psutil.pid_exists(pid)


def test_a_stop_during_the_start_is_a_clean_stop(tmp_path: Path) -> None:
    never = component(tmp_path, "never", "import signal; signal.pause()")
    stop = threading.Event()
    stop.set()
    Stack(settings_in(tmp_path), plan=Plan([never], URLS)).run(stop, threading.Event())
    assert find_stack(tmp_path / "data") is None
