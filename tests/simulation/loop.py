"""Time and processes: one event queue for the world, one asyncio event loop for each simulated process.

A process runs until it waits for the outside; then the world's next event is taken. Nothing here is random.
"""

from __future__ import annotations

import asyncio
import heapq
from asyncio.events import _set_running_loop
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any


class Killed(BaseException):
    """Raised inside a process that dies at a crash point; nothing of the process runs after it."""


class Clock:
    """The world's event queue in virtual milliseconds. ``trace`` is a list of lines, or None where nobody reads it."""

    def __init__(self, trace: list[str] | None = None) -> None:
        self.ms = 0
        self.trace = trace
        self.stopped = False
        self._events: list[tuple[int, int, Process | None, Callable[..., Any], tuple[Any, ...]]] = []
        self._count = 0

    def after(self, delay_ms: int, process: Process | None, action: Callable[..., Any], *args: Any) -> None:
        """Do ``action`` later; in ``process`` (if it lives then, and once it is not frozen), or in the world."""
        self._count += 1
        heapq.heappush(self._events, (self.ms + delay_ms, self._count, process, action, args))

    def run(self, until_ms: int) -> None:
        """Let time pass until ``stop``, or ``until_ms``."""
        events = self._events
        while events and not self.stopped:
            moment, count, process, action, args = heapq.heappop(events)
            if moment > until_ms:
                return
            self.ms = max(self.ms, moment)
            if process is None:
                action(*args)
            elif process.alive:
                if process.frozen_until > self.ms:
                    heapq.heappush(events, (process.frozen_until, count, process, action, args))
                else:
                    process.enter(action, args)

    def note(self, line: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.ms / 1000:9.3f}  {line}")


class Timer:
    __slots__ = ("cancelled",)

    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Process:
    """A simulated process: as much of an asyncio event loop as tasks, futures, locks, ``gather`` and ``sleep`` need.

    ``skew_ms`` is how wrong its wall clock is; ``stood_still_ms`` how long its monotonic clock did not run.
    """

    def __init__(self, clock: Clock, name: str) -> None:
        self.clock = clock
        self.name = name
        self.alive = True
        self.frozen_until = 0
        self.skew_ms = 0
        self.stood_still_ms = 0
        self.disturbed_at: int | None = None  # when a fault last touched it
        self._ready: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- life -------------------------------------------------------------------------------------------------------

    def enter(self, action: Callable[..., Any], args: tuple[Any, ...] = ()) -> None:
        """Do ``action`` and everything that becomes ready by it."""
        _set_running_loop(self)  # type: ignore[arg-type]
        try:
            action(*args)
            ready = self._ready
            while ready:
                callback, values = ready.popleft()
                callback(*values)
        finally:
            _set_running_loop(None)

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a coroutine in this process, at the world's next event."""
        task = self.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def kill(self) -> None:
        """SIGKILL: nothing of it runs again. What it sent is on its way all the same."""
        self.alive = False
        self._ready.clear()
        self._tasks.clear()

    def freeze(self, for_ms: int, *, monotonic_runs: bool) -> None:
        self.frozen_until = max(self.frozen_until, self.clock.ms + for_ms)
        if not monotonic_runs:
            self.stood_still_ms += for_ms

    def monotonic(self) -> float:
        return (self.clock.ms - self.stood_still_ms) / 1000

    # -- the event loop ---------------------------------------------------------------------------------------------

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: Any = None) -> None:
        if self.alive:
            self._ready.append((callback, args))

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any, context: Any = None) -> Timer:
        timer = Timer()
        self.clock.after(round(delay * 1000), self, _fire, timer, callback, args)
        return timer

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any, context: Any = None) -> Timer:
        return self.call_later(max(0.0, when - self.time()), callback, *args)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)  # type: ignore[arg-type]

    def create_task(self, work: Coroutine[Any, Any, Any], **_: Any) -> asyncio.Task[Any]:
        return asyncio.Task(work, loop=self)  # type: ignore[arg-type]

    def time(self) -> float:
        return self.clock.ms / 1000

    def get_debug(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Tasks of a dead process are thrown away unfinished; a live one's errors are seen where they are awaited."""


def _fire(timer: Timer, callback: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if not timer.cancelled:
        callback(*args)


def answer(future: asyncio.Future[Any], result: Any) -> None:
    """The outside answers, if anybody still waits for it."""
    if not future.done():
        future.set_result(result)


def fail(future: asyncio.Future[Any], error: Exception) -> None:
    """The outside fails, if anybody still waits for it."""
    if not future.done():
        future.set_exception(error)
