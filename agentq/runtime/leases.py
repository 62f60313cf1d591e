"""Keeping leases alive while their steps are worked on."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Callable

from agentq.clock import elapsed_s
from agentq.store.api import Held, Store

log = logging.getLogger(__name__)

WATCH_EVERY_S = 0.4  # a cancelled run's model calls are cut within a second
WATCHED_AT_ONCE = 2_000  # with more runs the question gets large, so it is asked more rarely
WATCH_AFTER_S = 0.3  # most steps are over before; nobody asks about them


class LeaseKeeper:
    """Renews the leases this process holds, in thirds of the lease time.

    ``run`` belongs on an event loop in a thread of its own (with a store of its own), so that neither a blocked call
    nor a busy loop can starve it. ``add``, ``drop`` and ``expired`` may be called from any thread.
    """

    def __init__(self, lease_ms: int, *, monotonic: Callable[[], float] = elapsed_s) -> None:
        self.lease_ms = lease_ms
        self._monotonic = monotonic
        self._since: dict[Held, float] = {}
        self._lost: set[Held] = set()
        self._watched = -math.inf
        self._lock = threading.Lock()

    def held_for(self, seconds: float) -> set[str]:
        """The runs of which leases have been held that long."""
        before = self._monotonic() - seconds
        with self._lock:
            return {held.run_id for held, since in self._since.items() if since <= before}

    def now(self) -> float:
        """Monotonic seconds, as ``add`` takes them."""
        return self._monotonic()

    def add(self, held: Held, since: float | None = None) -> None:
        """Start keeping a lease that was taken at ``since`` (monotonic seconds; now if not given)."""
        with self._lock:
            self._since[held] = self._monotonic() if since is None else since

    def drop(self, held: Held) -> None:
        """The step is done; its lease went with the commit."""
        with self._lock:
            self._since.pop(held, None)
            self._lost.discard(held)

    def expired(self, held: Held) -> bool:
        """Is the lease known lost, or so old that it may be? Then no effect may start under it."""
        since = self._since.get(held)
        return held in self._lost or since is None or (self._monotonic() - since) * 1000 >= self.lease_ms

    async def renew_due(self, store: Store) -> None:
        """Renew what is older than a third of the lease time and not known lost."""
        now = self._monotonic()
        with self._lock:
            due = [
                held
                for held, since in self._since.items()
                if (now - since) * 1000 >= self.lease_ms / 3 and held not in self._lost
            ]
        if not due:
            return
        lost = await store.renew(due, self.lease_ms)
        with self._lock:
            for held in due:
                if held in lost and held in self._since:
                    self._lost.add(held)
                elif held in self._since:
                    self._since[held] = now

    async def watch(self, store: Store, on_stopped: Callable[[str], None]) -> None:
        """Tell which of the runs that are worked on were cancelled or have ended: their model calls are of no use."""
        run_ids = self.held_for(WATCH_AFTER_S)
        now = self._monotonic()
        if not run_ids or now - self._watched < WATCH_EVERY_S * len(run_ids) / WATCHED_AT_ONCE:
            return
        self._watched = now
        for run_id in await store.stopped(run_ids):
            on_stopped(run_id)

    async def run(self, store: Store, on_stopped: Callable[[str], None]) -> None:
        """Renew and watch until cancelled. Whatever fails is tried again: the leases may still hold."""
        while True:
            await asyncio.sleep(min(self.lease_ms / 6000, WATCH_EVERY_S))
            try:
                await self.renew_due(store)
                await self.watch(store, on_stopped)
            except Exception as error:  # noqa: BLE001 - ending here would lose every lease of the process, in silence
                log.warning("leases could not be renewed: %s", type(error).__name__)
