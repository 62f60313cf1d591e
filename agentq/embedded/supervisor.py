"""Keep a list of processes running: start them as their needs are ready, restart what dies, stop them in order.

Knows nothing about agentq: a ``Component`` is data, so the rules are tested with small fake programs.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Literal

from agentq.embedded.process import Process, describe_exit, kill_process, log_tail, spawn
from agentq.errors import Unavailable

LOG_CAP_BYTES = 10_000_000  # a log longer than this is moved to NAME.log.1 when its component starts
_TICK_S = 0.1

Report = Callable[[str], None]
State = Literal["waiting", "starting", "up", "backoff", "broken"]


@dataclass(frozen=True)
class Restart:
    """When and how often to try again. A quick death comes within ``quick_s`` seconds of the start.

    The pause doubles with each quick death from ``first_pause_s`` to ``max_pause_s``; after ``give_up_after`` quick
    deaths in a row the component is broken. One that has not been ready yet gets ``start_tries`` starts in all: whoever
    waits for the first start wants to hear of a wrong setting at once.
    """

    first_pause_s: float = 0.5
    max_pause_s: float = 30.0
    quick_s: float = 10.0
    give_up_after: int = 6
    start_tries: int = 2


def last_lines(log_file: Path, start: int) -> str:
    return log_tail(log_file, start=start)


@dataclass(frozen=True)
class Component:
    """One process to keep running."""

    name: str
    argv: Sequence[str]
    ready: Callable[[int], bool]  # given the process id: does it serve? Asked ten times a second, so must answer fast
    env: Mapping[str, str] = field(default_factory=dict, repr=False)  # added to ours; may hold passwords
    cwd: Path | None = None
    address: str = ""  # where it is reached, for people
    needs: tuple[str, ...] = ()  # names of components that must have been ready before this one starts
    essential: bool = True  # the first start fails if this one cannot start
    ready_file: Path | None = None  # removed before each start, so that an old one says nothing
    start_timeout_s: float = 90.0
    stop_order: int = 0  # equal numbers stop together, lowest first
    stop_timeout_s: float = 20.0  # from SIGTERM to SIGKILL
    explain: Callable[[Path, int], str] = last_lines  # what its log says, from byte N on, to a person after a failure


class _Child:
    """A component and the process that is it at the moment."""

    def __init__(self, component: Component, log_file: Path) -> None:
        self.component = component
        self.log_file = log_file
        self.process: Process | None = None
        self.state: State = "waiting"
        self.since = 0.0  # monotonic time of the last start
        self.next_start = 0.0
        self.log_start = 0
        self.was_ready = False
        self.starts = 0
        self.quick_deaths = 0

    @property
    def name(self) -> str:
        return self.component.name

    def launch(self, now: float) -> None:
        if self.component.ready_file:
            self.component.ready_file.parent.mkdir(parents=True, exist_ok=True)
            self.component.ready_file.unlink(missing_ok=True)
        self.log_start = _rotate(self.log_file)
        self.process = spawn(
            self.component.argv, log_file=self.log_file, env=self.component.env, cwd=self.component.cwd
        )
        self.starts += 1
        self.since = now
        self.state = "starting"

    def explanation(self) -> str:
        return self.component.explain(self.log_file, self.log_start)


class Supervisor:
    """Runs components. ``start``, then ``tick`` again and again (or ``run``), then ``stop``; all from one thread."""

    def __init__(
        self,
        components: Sequence[Component],
        *,
        log_dir: Path,
        report: Report,
        restart: Restart | None = None,
        on_change: Callable[[], None] | None = None,
    ) -> None:
        """``report`` gets one line for a person per thing that happened; ``on_change`` is called
        after ``start`` whenever a component's process or state has changed."""
        self._children = [_Child(component, log_dir / f"{component.name}.log") for component in components]
        self._report = report
        self._restart = restart or Restart()
        self._on_change = on_change or (lambda: None)
        self._started = False
        self._width = max((len(child.name) for child in self._children), default=0)

    # ------------------------------------------------------------------------------------------------------ start

    def start(self, stop: threading.Event) -> None:
        """Start everything and wait until all are ready (or, if not essential, broken) or ``stop`` is set.

        Raises Unavailable when an essential component cannot start; the others are still running then: call ``stop``.
        """
        while not stop.is_set():
            self.tick()
            for child in self._children:
                if child.state == "broken" and child.component.essential:
                    raise Unavailable(
                        f"{child.name} does not start.",
                        code="component_start_failed",
                        hint=f"The end of its log ({child.log_file}):\n{child.explanation()}",
                        component=child.name,
                    )
            if all(child.was_ready or child.state == "broken" for child in self._children):
                self._started = True
                return
            stop.wait(_TICK_S)

    def run(self, stop: threading.Event) -> None:
        """Watch and restart until ``stop`` is set."""
        while not stop.wait(_TICK_S):
            self.tick()

    def tick(self) -> None:
        """Look at each component once and do what is due. Never waits."""
        now = time.monotonic()
        ready = {child.name for child in self._children if child.was_ready}
        for child in self._children:
            may_start = child.state == "waiting" and ready.issuperset(child.component.needs)
            if may_start or (child.state == "backoff" and now >= child.next_start):
                child.launch(now)
            elif child.state in ("starting", "up"):
                self._look_at(child, now)

    def _look_at(self, child: _Child, now: float) -> None:
        process = child.process
        assert process is not None
        code = process.poll()
        if code is not None:
            kill_process(process)  # what it may have started
            self._died(child, describe_exit(code), now)
        elif child.state == "starting":
            if child.component.ready(process.pid):
                self._became_ready(child, now)
            elif now - child.since > child.component.start_timeout_s:
                kill_process(process)
                self._died(child, f"not ready within {child.component.start_timeout_s:g} s", now)

    def _became_ready(self, child: _Child, now: float) -> None:
        child.state = "up"
        again = "again " if child.was_ready else ""
        where = f"  {child.component.address}" if child.component.address else ""
        self._say(child, f"ready {again}after {now - child.since:.1f} s{where}  log {_short(child.log_file)}")
        child.was_ready = True
        self._changed()

    def _died(self, child: _Child, how: str, now: float) -> None:
        policy = self._restart
        child.process = None
        child.quick_deaths = child.quick_deaths + 1 if now - child.since <= policy.quick_s else 1
        too_often = child.quick_deaths >= policy.give_up_after
        if too_often or (not child.was_ready and child.starts >= policy.start_tries):
            child.state = "broken"
            self._say(child, f"BROKEN: {how}; given up after {child.starts} starts; log {child.log_file}")
            for line in child.explanation().splitlines():
                self._say(child, f"  {line}")
            self._changed()
            return
        pause = min(policy.max_pause_s, policy.first_pause_s * 2 ** (child.quick_deaths - 1))
        child.state = "backoff"
        child.next_start = now + pause
        self._say(child, f"died ({how}); restart {child.starts} in {pause:g} s; log {child.log_file}")
        self._changed()

    def _changed(self) -> None:
        if self._started:
            self._on_change()

    # ------------------------------------------------------------------------------------------------------- stop

    def stop(self, hard: threading.Event | None = None) -> None:
        """Stop everything in ``stop_order``: SIGTERM, then SIGKILL after each one's time or as soon as ``hard`` is set.

        Returns when nothing is left. Safe to repeat.
        """
        hard = hard or threading.Event()
        for _, together in groupby(
            sorted(self._running(), key=lambda child: child.component.stop_order),
            key=lambda child: child.component.stop_order,
        ):
            self._stop_together(list(together), hard)

    def _stop_together(self, children: list[_Child], hard: threading.Event) -> None:
        self._report(f"stopping {', '.join(child.name for child in children)}")
        began = time.monotonic()
        for child in children:
            if child.process is not None and child.process.poll() is None:
                child.process.send_signal(signal.SIGTERM)
        left = children
        while left:
            late = [c for c in left if hard.is_set() or time.monotonic() - began > c.component.stop_timeout_s]
            for child in left:
                assert child.process is not None
                if child.process.poll() is not None or child in late:
                    code = kill_process(child.process)
                    if child in late:
                        self._say(child, f"did not stop in {time.monotonic() - began:.1f} s: {describe_exit(code)}")
                    child.process, child.state = None, "waiting"
            left = [child for child in left if child.process is not None]
            if left:
                hard.wait(0.02)

    def _running(self) -> list[_Child]:
        return [child for child in self._children if child.process is not None]

    # ------------------------------------------------------------------------------------------------------- show

    def components(self) -> list[dict[str, object]]:
        """``{name, pid, address, log_file, state}`` of each component; pid is None while it is not running."""
        return [
            {
                "name": child.name,
                "pid": child.process.pid if child.process else None,
                "address": child.component.address,
                "log_file": str(child.log_file),
                "state": child.state,
            }
            for child in self._children
        ]

    def _say(self, child: _Child, text: str) -> None:
        self._report(f"{child.name:<{self._width}}  {text}")


def _short(file: Path) -> str:
    """A path as a person types it: relative where that is shorter."""
    return min(str(file), os.path.relpath(file), key=len)


def _rotate(log_file: Path) -> int:
    """Move a log that has grown past the cap aside; returns the byte where the next lines will be."""
    if not log_file.exists():
        return 0
    size = log_file.stat().st_size
    if size <= LOG_CAP_BYTES:
        return size
    log_file.replace(log_file.with_name(log_file.name + ".1"))
    return 0
