"""Which hints count as lost: those that are older than what their pool's queue has been heard of since.

Every message of hints carries its time of publication, and workers report how far they have heard (``Hearing``). A
hint that is older and led to no claim was lost. One that is younger still waits in its queue: publishing it again
would make a long queue longer. Where a queue stands still and nothing younger is on its way, a few hints are published
again as a probe; when they are heard, so is everything before them (``Unheard``).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from agentq.engine.recovery import HEARD_MARGIN, look_again, unheard
from agentq.protocol import Pool
from agentq.store.api import Queue
from schemas.run import RunDoc

PROBE_HINTS = 8
PROBE_WAIT = timedelta(seconds=5)  # doubled while a queue stays unheard
MOST_DOUBLINGS = 6
MOVES = timedelta(seconds=5)  # a queue out of which something was begun so lately moves, however long it is
PATIENCE = (timedelta(seconds=2), timedelta(seconds=60))  # at least and at most until a waiting hint is looked at again


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
        at = min(at, now)  # a client's clock may run ahead, and nothing published later has been heard
        if pool not in self._heard or self._heard[pool].heard < at:
            self._heard[pool] = Queue(at, int((now - at).total_seconds() * 1000), now)

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
    """The hints published again since a pool's queue was last heard to move; ``silent``: since when it was not."""

    began: datetime
    silent: datetime
    left: int = PROBE_HINTS
    doublings: int = 0


class Unheard:
    """One scheduler's view of the queues. ``refresh`` once a look, then what it says holds for each run that is due."""

    def __init__(self) -> None:
        self._queues: Mapping[Pool, Queue] = {}
        self._heard: Mapping[Pool, datetime] = {}
        self._probes: dict[Pool, _Probe] = {}

    def refresh(self, queues: Mapping[Pool, Queue], now: datetime) -> None:
        """What the workers have reported. A probe that was heard, or waited for in vain, makes room for the next."""
        self._queues = queues
        self._heard = {pool: queue.heard for pool, queue in queues.items()}
        for pool, probe in list(self._probes.items()):
            if pool in self._heard and self._heard[pool] >= probe.began:
                del self._probes[pool]
            elif now - probe.began >= PROBE_WAIT * 2.0**probe.doublings:
                doublings = min(probe.doublings + 1, MOST_DOUBLINGS)
                self._probes[pool] = _Probe(now, probe.silent, doublings=doublings)

    def heard_for(self, run: RunDoc, now: datetime) -> Mapping[Pool, datetime]:
        """``heard`` as ``engine.recovery.look`` takes it: a run whose hint becomes a probe counts as heard of."""
        silent = [pool for pool in unheard(run, now, self._heard) if not self._moves(pool, now)]
        if not silent:
            return self._heard
        heard = dict(self._heard)
        for pool in silent:
            probe = self._probes.setdefault(pool, _Probe(now, now))
            if probe.left > 0:
                probe.left -= 1
                heard[pool] = now
        return heard

    def look_again(self, run: RunDoc, now: datetime) -> datetime:
        """When to look next at a run about which nothing is to be done now."""

        def expected(pool: Pool, hinted_at: datetime) -> datetime:
            return self._expected(pool, hinted_at, now)

        return look_again(run, now, self._heard, expected)

    def _expected(self, pool: Pool, hinted_at: datetime, now: datetime) -> datetime:
        """When a hint that waits may have been heard. In a queue that moves, when its turn comes. Else soon after the
        probe, and the longer that is in vain the later: looking costs little in all, however many wait."""
        least, most = PATIENCE
        wait = least
        if self._moves(pool, now):
            wait = hinted_at + timedelta(milliseconds=self._queues[pool].wait_ms) + HEARD_MARGIN - now
        elif pool in self._probes:
            wait = (now - self._probes[pool].silent) / 2
        return now + min(max(wait, least), most)

    def _moves(self, pool: Pool, now: datetime) -> bool:
        return pool in self._queues and now - self._queues[pool].moved <= MOVES
