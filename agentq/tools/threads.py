"""Threads for plain tool functions. A thread cannot be killed, so one that hangs is given up and replaced.

``concurrent.futures`` does not fit: its hanging threads use up the pool for good and hold up the exit of the process.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

T = TypeVar("T")


class Refused(Exception):
    """The job was not begun, and will not be: the pool is closed, or too many of the group's threads hang."""


@dataclass(slots=True, eq=False)
class Job(Generic[T]):
    """One function call. ``started_at`` is monotonic seconds, None while it waits for a thread."""

    group: str
    work: Callable[[], T]
    future: Future[T] = field(default_factory=Future)
    started_at: float | None = None
    finished: bool = False
    given_up: bool = False


class ThreadPool(Generic[T]):
    """At most ``size`` threads serve the queue; they start on demand and are daemons.

    A job that is given up keeps its thread, which leaves the pool when the job ends; a replacement serves on. A group
    (a tool) with ``hung_per_group`` such threads gets no more until one of them ends, so the number of threads is
    bounded and one hanging tool leaves the others their share.
    """

    def __init__(self, size: int, *, hung_per_group: int) -> None:
        self._size = size
        self._hung_per_group = hung_per_group
        self._changed = threading.Condition()
        self._jobs: deque[Job[T]] = deque()
        self._serving = 0
        self._idle = 0
        self._hung: Counter[str] = Counter()
        self._closed = False

    @property
    def hung(self) -> dict[str, int]:
        """How many abandoned threads each group has now."""
        with self._changed:
            return {group: count for group, count in self._hung.items() if count > 0}

    def submit(self, group: str, work: Callable[[], T]) -> Job[T]:
        """Queue a call. ``work`` must not raise. The future may end with ``Refused``."""
        job = Job(group, work)
        with self._changed:
            if not self._closed:
                self._jobs.append(job)
                self._staff()
                self._changed.notify()
                return job
        job.future.set_exception(Refused("The tool runner is shut down."))
        return job

    def give_up(self, job: Job[T]) -> Literal["waiting", "running", "finished"]:
        """Stop waiting for a job; says where it was. A waiting one never begins, a running one keeps its thread."""
        with self._changed:
            if job.finished or job.future.done():
                return "finished"
            if job.started_at is None:
                job.future.cancel()
                return "waiting"
            if not job.given_up:
                job.given_up = True
                self._hung[job.group] += 1
                self._serving -= 1
                self._staff()
            return "running"

    def close(self) -> None:
        """Refuse what waits and let idle threads end. Does not wait for running jobs: they may hang."""
        with self._changed:
            self._closed = True
            waiting = list(self._jobs)
            self._jobs.clear()
            self._changed.notify_all()
        for job in waiting:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(Refused("The tool runner is shut down."))

    def _staff(self) -> None:
        """Start a thread where more jobs wait than threads are idle. The lock is held."""
        if self._serving < self._size and len(self._jobs) > self._idle:
            self._serving += 1
            threading.Thread(target=self._serve, name="agentq-tool", daemon=True).start()

    def _serve(self) -> None:
        while (job := self._take()) is not None:
            job.future.set_result(job.work())
            if self._ended(job):
                return

    def _take(self) -> Job[T] | None:
        """The next job to begin; None where the thread should end."""
        while True:
            with self._changed:
                self._idle += 1
                self._changed.wait_for(lambda: self._jobs or self._closed)
                self._idle -= 1
                if not self._jobs:
                    self._serving -= 1
                    return None
                job = self._jobs.popleft()
                if not job.future.set_running_or_notify_cancel():
                    continue
                hung = self._hung[job.group]
                if hung < self._hung_per_group:
                    job.started_at = time.monotonic()
                    return job
            job.future.set_exception(Refused(f"{hung} earlier calls of this tool still hang."))

    def _ended(self, job: Job[T]) -> bool:
        """Book the end of a job; True if it was given up, so that its thread has been replaced and must end."""
        with self._changed:
            job.finished = True
            if job.given_up:
                self._hung[job.group] -= 1
            return job.given_up
