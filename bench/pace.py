"""How fast the machine is right now: the CPU time that a fixed piece of work takes, sampled while others are measured.

CPU seconds are no fixed unit on a shared host: the same instructions were seen to take 1.0 to 1.6 times as long within
a minute. A figure is comparable with another day's only beside the pace it was measured at.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import threading
import time
from types import TracebackType

REFERENCE_US = 65.0  # one unit in a quiet minute on the machine of README.md's table: that is pace 1.00
_PAUSE_S = 0.05
_UNITS = 10
_DOCUMENT = {"a": [{f"k{number}": "v" * 20, "n": number} for number in range(50)]}


class Pace:
    """Samples in a thread while the ``with`` block runs; takes about 1.5 % of a core."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pace", daemon=True)

    def __enter__(self) -> Pace:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def between(self, began: float, ended: float) -> float:
        """The mean between two ``time.monotonic()`` moments, in units of the reference: 1.5 is half as slow again."""
        found = [us for at, us in self._samples if began <= at <= ended]
        return statistics.fmean(found) / REFERENCE_US if found else float("nan")

    def _run(self) -> None:
        while not self._stop.wait(_PAUSE_S):
            _work(2)  # warms the caches that others have used meanwhile
            began = time.thread_time_ns()
            _work(_UNITS)
            self._samples.append((time.monotonic(), (time.thread_time_ns() - began) / _UNITS / 1000))


def _work(units: int) -> None:
    for _ in range(units):
        text = json.dumps(_DOCUMENT)
        json.loads(text)
        hashlib.sha256(text.encode()).hexdigest()
