"""The rules of supervision, with small programs in place of servers."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from agentq.embedded import supervisor as module
from agentq.embedded.supervisor import Component, Restart, Supervisor
from agentq.errors import Unavailable

FAST = Restart(first_pause_s=0.01, max_pause_s=0.05, quick_s=30, give_up_after=3, start_tries=2)
SERVE = "import pathlib, signal, sys; pathlib.Path(sys.argv[1]).touch(); signal.pause()"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + SERVE
DIE_AT_ONCE = "import sys; sys.exit('no such setting: colour')"
DIE_ONCE_SEEN = "import sys; open(sys.argv[1]).read(); sys.exit({})"  # of a pipe that is closed by who saw it ready


class World:
    """A folder for fake components, and the supervisors to stop afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self.changes = 0
        self.supervisors: list[Supervisor] = []

    def component(self, name: str, program: str = SERVE, **fields: object) -> Component:
        file = self.folder / f"{name}.ready"
        argv = [sys.executable, "-I", "-S", "-c", program, str(file)]
        return Component(name, argv, ready=lambda _pid: file.exists(), ready_file=file, **fields)  # type: ignore[arg-type]

    def mortal(self, name: str, last_words: object = 7) -> Component:
        """Dies when it has been seen ready: it is ready while it waits for the pipe to be opened and closed."""
        pipe = self.folder / f"{name}.pipe"
        os.mkfifo(pipe)

        def ready(_pid: int) -> bool:
            try:
                os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
            except OSError:  # nobody waits there yet
                return False
            return True

        argv = [sys.executable, "-I", "-S", "-c", DIE_ONCE_SEEN.format(repr(last_words)), str(pipe)]
        return Component(name, argv, ready=ready)

    def supervisor(self, *components: Component, restart: Restart = FAST) -> Supervisor:
        def count() -> None:
            self.changes += 1

        made = Supervisor(
            components, log_dir=self.folder / "logs", report=self.lines.append, restart=restart, on_change=count
        )
        self.supervisors.append(made)
        return made

    def said(self, text: str) -> bool:
        return any(text in line for line in self.lines)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    for one in made.supervisors:
        one.stop()


def tick_until(supervisor: Supervisor, condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, supervisor.components()
        supervisor.tick()
        pause.wait(0.01)


def start(supervisor: Supervisor) -> None:
    supervisor.start(threading.Event())


def part(supervisor: Supervisor, name: str) -> dict[str, object]:
    return next(one for one in supervisor.components() if one["name"] == name)


def pid_of(supervisor: Supervisor, name: str) -> int:
    pid = part(supervisor, name)["pid"]
    assert isinstance(pid, int)
    return pid


def test_start_returns_when_all_are_ready_and_each_waits_for_its_needs(world: World) -> None:
    needy = f"import os, sys; os.path.exists({str(world.folder / 'store.ready')!r}) or sys.exit('too early');{SERVE}"
    supervisor = world.supervisor(world.component("worker", needy, needs=("store",)), world.component("store"))
    start(supervisor)
    assert [one["state"] for one in supervisor.components()] == ["up", "up"]
    assert [line.split()[0] for line in world.lines] == ["store", "worker"]


def test_a_dead_component_is_restarted_and_one_line_says_how_it_died(world: World) -> None:
    supervisor = world.supervisor(world.component("store"))
    start(supervisor)
    before = pid_of(supervisor, "store")
    psutil.Process(before).kill()
    tick_until(supervisor, lambda: world.said("ready again"))
    assert pid_of(supervisor, "store") != before
    (died,) = [line for line in world.lines if "died" in line]
    assert died.startswith("store")
    assert "signal SIGKILL" in died
    assert "restart 1" in died
    assert str(world.folder / "logs" / "store.log") in died
    assert world.changes >= 2, "whoever publishes process ids hears of the death and of the new process"


def test_the_pause_before_a_restart_doubles(world: World) -> None:
    restart = Restart(first_pause_s=0.01, max_pause_s=0.04, give_up_after=5)
    supervisor = world.supervisor(world.mortal("flaky"), restart=restart)
    start(supervisor)
    tick_until(supervisor, lambda: part(supervisor, "flaky")["state"] == "broken")
    pauses = [line.split(" in ")[1].split(" s")[0] for line in world.lines if "died" in line]
    assert pauses == ["0.01", "0.02", "0.04", "0.04"]


def test_after_too_many_quick_deaths_it_is_broken_and_the_others_go_on(world: World) -> None:
    supervisor = world.supervisor(world.mortal("crasher", "the disk is on fire"), world.component("store"))
    start(supervisor)
    tick_until(supervisor, lambda: part(supervisor, "crasher")["state"] == "broken")
    assert world.said("BROKEN: exit code 1; given up after 3 starts")
    assert world.said("the disk is on fire")
    tick_until(supervisor, lambda: True)
    assert part(supervisor, "store")["state"] == "up"
    assert part(supervisor, "crasher")["pid"] is None


def test_a_component_that_cannot_start_fails_the_start_and_its_log_is_quoted(world: World) -> None:
    supervisor = world.supervisor(world.component("worker", DIE_AT_ONCE))
    with pytest.raises(Unavailable, match=r"worker does not start[\s\S]*no such setting: colour") as caught:
        start(supervisor)
    assert caught.value.details["component"] == "worker"
    assert caught.value.code == "component_start_failed"


def test_a_program_that_does_not_exist_is_named(world: World) -> None:
    missing = Component("tool", ["/nonexistent/program"], ready=lambda _pid: False)
    with pytest.raises(Unavailable, match=r"cannot run /nonexistent/program"):
        start(world.supervisor(missing))


def test_the_start_survives_a_component_that_is_not_essential(world: World) -> None:
    supervisor = world.supervisor(world.component("dashboard", DIE_AT_ONCE, essential=False), world.component("store"))
    start(supervisor)
    assert part(supervisor, "dashboard")["state"] == "broken"
    assert part(supervisor, "store")["state"] == "up"


def test_one_that_is_never_ready_counts_as_dead(world: World) -> None:
    silent = world.component("silent", "import signal; signal.pause()", start_timeout_s=0.2)
    with pytest.raises(Unavailable, match="silent does not start"):
        start(world.supervisor(silent))
    assert world.said("not ready within 0.2 s")


def test_start_gives_way_to_a_stop_request(world: World) -> None:
    silent = world.component("silent", "import signal; signal.pause()")
    stop = threading.Event()
    supervisor = world.supervisor(silent)
    supervisor.tick()
    stop.set()
    supervisor.start(stop)
    assert part(supervisor, "silent")["state"] == "starting"


def test_stop_goes_by_order_and_leaves_nothing(world: World) -> None:
    supervisor = world.supervisor(
        world.component("store", stop_order=2),
        world.component("router", stop_order=1),
        world.component("critic", stop_order=1),
        world.component("flower"),
    )
    start(supervisor)
    pids = [pid_of(supervisor, name) for name in ("store", "router", "critic", "flower")]
    supervisor.stop()
    assert world.lines[-3:] == ["stopping flower", "stopping router, critic", "stopping store"]
    assert not any(psutil.pid_exists(pid) for pid in pids)
    world.lines.clear()
    supervisor.stop()
    assert world.lines == [], "a second stop has nothing to do"


def test_whoever_ignores_sigterm_is_killed_after_its_time(world: World) -> None:
    supervisor = world.supervisor(world.component("stubborn", STUBBORN, stop_timeout_s=0.1))
    start(supervisor)
    pid = pid_of(supervisor, "stubborn")
    supervisor.stop()
    assert not psutil.pid_exists(pid)
    assert world.said("signal SIGKILL")


def test_a_hard_stop_does_not_wait(world: World) -> None:
    supervisor = world.supervisor(world.component("stubborn", STUBBORN, stop_timeout_s=600))
    start(supervisor)
    pid = pid_of(supervisor, "stubborn")
    hard = threading.Event()
    hard.set()
    supervisor.stop(hard)
    assert not psutil.pid_exists(pid)


def test_grandchildren_of_a_killed_component_are_killed_too(world: World) -> None:
    child_file = world.folder / "child"
    parent = (
        "import subprocess, sys, pathlib, signal;"
        "p = subprocess.Popen([sys.executable, '-I', '-S', '-c', 'import signal; signal.pause()']);"
        f"pathlib.Path({str(child_file)!r}).write_text(str(p.pid)); {SERVE}"
    )
    supervisor = world.supervisor(world.component("parent", parent))
    start(supervisor)
    child = int(child_file.read_text())
    supervisor.stop()
    deadline, pause = time.monotonic() + 10, threading.Event()
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        pause.wait(0.02)


def test_a_ctrl_c_at_the_terminal_does_not_reach_the_components(world: World) -> None:
    supervisor = world.supervisor(world.component("store"))
    start(supervisor)
    import os

    pid = pid_of(supervisor, "store")
    assert os.getsid(pid) == pid != os.getsid(0)


def test_a_log_past_its_cap_is_moved_aside_at_the_next_start(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOG_CAP_BYTES", 10)
    log = world.folder / "logs" / "store.log"
    log.parent.mkdir()
    log.write_text("twelve bytes")
    start(world.supervisor(world.component("store")))
    assert log.with_name("store.log.1").read_text() == "twelve bytes"
    assert log.read_text() == ""
    assert log.stat().st_mode & 0o777 == 0o600


def test_passwords_in_the_environment_do_not_show(world: World) -> None:
    component = world.component("store", env={"AGENTQ_BROKER_URL": "redis://:secret@host"})
    assert "secret" not in repr(component)


@pytest.mark.parametrize(
    ("code", "text"), [(3, "exit code 3"), (-signal.SIGSEGV, "signal SIGSEGV"), (-99, "signal 99")]
)
def test_how_a_process_ended_in_words(code: int, text: str) -> None:
    from agentq.embedded.process import describe_exit

    assert describe_exit(code) == text
