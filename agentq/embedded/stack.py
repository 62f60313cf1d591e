"""The whole system on one machine, as one object.

    with Stack(load_settings(data_dir=tmp_path)) as stack:      # started, ready, watched by a thread
        Client(mongo_url=stack.settings["mongo_url"], ...)

``agentq up`` uses ``Stack.run`` instead, which watches from the calling thread until it is told to stop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from agentq.embedded.plan import Plan, make_plan
from agentq.embedded.record import StackLock
from agentq.embedded.supervisor import Report, Restart, Supervisor
from config.settings import Settings


class Stack:
    """Starts what a plan lists under one data directory, keeps it running, stops all of it.

    Nothing is left behind: the processes die even if this one is killed. Only one stack runs on a data directory; what
    was stored there by an earlier one is found again.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        scenario: Path | None = None,
        report: Report | None = None,
        restart: Restart | None = None,
        plan: Plan | None = None,
    ) -> None:
        """``report`` gets one line per event, for a person. ``plan`` replaces the usual components (for tests)."""
        self._data_dir = settings.data_dir.resolve()
        self._given = settings
        self._scenario = scenario
        self._report = report or (lambda _line: None)
        self._restart = restart
        self._plan = plan
        self._stop = threading.Event()
        self._watcher: threading.Thread | None = None
        self._lock: StackLock | None = None
        self._supervisor: Supervisor | None = None

    @property
    def settings(self) -> dict[str, str]:
        """How to reach the running stack, by the field names of ``Settings``: broker_url, mongo_url, flower_url ..."""
        assert self._plan is not None, "the stack has not been started"
        return self._plan.settings

    def components(self) -> list[dict[str, Any]]:
        """``{name, pid, address, log_file, state}`` of each process."""
        assert self._supervisor is not None, "the stack has not been started"
        return self._supervisor.components()

    def run(
        self, stop: threading.Event, hard: threading.Event, when_ready: Callable[[Stack], None] | None = None
    ) -> None:
        """Start, watch until ``stop`` is set, then stop everything; ``hard`` cuts the stopping short.

        Raises what ``__enter__`` raises. Nothing is left running in any case.
        """
        try:
            self._start(stop)
            if not stop.is_set():
                if when_ready:
                    when_ready(self)
                self._running.run(stop)
        finally:
            self._close(hard)

    def __enter__(self) -> Stack:
        """Conflict if another stack runs on the directory, ConfigError if a binary is missing, Unavailable (quoting the
        log) if something does not start."""
        try:
            self._start(self._stop)
        except BaseException:
            self._close()
            raise
        self._watcher = threading.Thread(
            target=self._running.run, args=(self._stop,), name="agentq-supervisor", daemon=True
        )
        self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        if self._watcher:
            self._watcher.join()
        self._close()

    @property
    def _running(self) -> Supervisor:
        assert self._supervisor is not None
        return self._supervisor

    def _start(self, stop: threading.Event) -> None:
        lock = self._lock = StackLock(self._data_dir)
        plan = self._plan = self._plan or make_plan(self._given, scenario=self._scenario)
        started = datetime.now(UTC)

        def publish() -> None:
            lock.publish(plan.settings, supervisor.components(), started)

        supervisor = self._supervisor = Supervisor(
            plan.components,
            log_dir=self._data_dir / "logs",
            report=self._report,
            restart=self._restart,
            on_change=publish,
        )
        supervisor.start(stop)
        if not stop.is_set():
            publish()

    def _close(self, hard: threading.Event | None = None) -> None:
        try:
            if self._supervisor:
                self._supervisor.stop(hard)
        finally:
            if self._lock:
                self._lock.release()
                self._lock = None
