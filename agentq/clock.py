"""Elapsed time that nobody can set: it goes on while the machine is suspended, whatever the wall clock does."""

from __future__ import annotations

import time

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # not every platform counts suspended time


def elapsed_s() -> float:
    """Seconds since some moment in the past; only differences mean anything."""
    return time.clock_gettime(_CLOCK)
