"""Named crash points for tests: ``AGENTQ_FAILPOINT=after_effect:3`` kills the process at the third passage."""

from __future__ import annotations

import itertools
import os
import signal

from agentq.errors import ConfigError
from agentq.runtime.joiner import JOB_CRASH_POINTS
from agentq.runtime.runtime import CRASH_POINTS, CrashPoint, no_crash

KNOWN = (*CRASH_POINTS, *JOB_CRASH_POINTS, "scheduler_after_commit", "after_admit", "after_delivery")


def crash_point(spec: str | None) -> CrashPoint:
    """What to call at every crash point; does nothing in production, where ``spec`` is None."""
    if not spec:
        return no_crash
    name, _, nth = spec.partition(":")
    if name not in KNOWN or not (nth or "1").isdigit():
        raise ConfigError(f"There is no crash point {spec!r}.", hint=f"Use name:count with one of {', '.join(KNOWN)}.")
    passages = itertools.count(1)

    def crash(point: str) -> None:
        if point == name and next(passages) == int(nth or "1"):
            os.kill(os.getpid(), signal.SIGKILL)

    return crash
