"""Which hints count as lost: those that are older than what their pool's queue has been heard of since.

Every message of hints carries its time of publication, and workers report how far they have heard (``Hearing``). A
hint that is older and led to no claim was lost. One that is younger still waits in its queue: publishing it again
would make a long queue longer. Where nothing younger is on its way, a few hints are published again as a probe; when
they are heard, so is everything before them (``Unheard``).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from agentq.engine.recovery import unheard
from agentq.protocol import Pool
from agentq.store.api import Queue
from schemas.run import RunDoc

PROBE_HINTS = 32
PROBE_WAIT = timedelta(seconds=60)  # doubled while a queue stays unheard
MOST_DOUBLINGS = 6


class Hearing:
    """What one worker process has heard of the queues of its pools; belongs to the engine's event loop."""

    def __init__(self) -> None:
        self._heard: dict[Pool, Queue] = {}
        self._unbegun: dict[int, tuple[Pool, datetime]] = {}
        self._count = itertools.count()

    def received(self, pool: Pool, at: datetime) -> int:
        """A message that was published at ``at`` has come; the number is for ``begun``."""
        number = next(self._count)
        self._unbegun[number] = (pool, at)
        return number

    def begun(self, number: int, now: datetime) -> None:
        """All hints of that message have led to a claim or to nothing."""
        pool, at = self._unbegun.pop(number)
        if pool not in self._heard or self._heard[pool].heard < at:
            self._heard[pool] = Queue(at, max(0, int((now - at).total_seconds() * 1000)))

    def forget(self, number: int | None) -> None:
        """Nothing of that message waits here any more, whatever became of it."""
        if number is not None:
            self._unbegun.pop(number, None)

    def report(self) -> dict[str, dict[str, Any]]:
        """By pool: ``heard`` up to where, with what ``wait_ms``, and the ``oldest`` message not yet begun."""
        told: dict[str, dict[str, Any]] = {
            pool: {"heard": queue.heard, "wait_ms": queue.wait_ms, "oldest": None}
            for pool, queue in self._heard.items()
        }
        for pool, at in self._unbegun.values():
            entry = told.setdefault(pool, {"heard": None, "wait_ms": 0, "oldest": None})
            entry["oldest"] = at if entry["oldest"] is None else min(at, entry["oldest"])
        return told


@dataclass(slots=True)
class _Probe:
    """The hints published again since a pool's queue was last heard to move."""

    began: datetime
    left: int = PROBE_HINTS
    doublings: int = 0


class Unheard:
    """One scheduler's view of the queues. ``refresh`` once a look, then ``heard_for`` each run that is due."""

    def __init__(self) -> None:
        self._heard: dict[Pool, datetime] = {}
        self._probes: dict[Pool, _Probe] = {}

    def refresh(self, queues: Mapping[Pool, Queue], now: datetime) -> None:
        """What the workers have reported. A probe that was heard, or waited for in vain, makes room for the next."""
        self._heard = {pool: queue.heard for pool, queue in queues.items()}
        for pool, probe in list(self._probes.items()):
            if pool in self._heard and self._heard[pool] >= probe.began:
                del self._probes[pool]
            elif now - probe.began >= PROBE_WAIT * 2.0**probe.doublings:
                self._probes[pool] = _Probe(now, doublings=min(probe.doublings + 1, MOST_DOUBLINGS))

    def heard_for(self, run: RunDoc, now: datetime) -> Mapping[Pool, datetime]:
        """``heard`` as ``engine.recovery.look`` takes it: a run whose hint becomes a probe counts as heard of."""
        waiting = unheard(run, now)
        if not waiting:
            return self._heard
        heard = dict(self._heard)
        for pool in waiting:
            probe = self._probes.setdefault(pool, _Probe(now))
            if probe.left > 0:
                probe.left -= 1
                heard[pool] = now
        return heard
