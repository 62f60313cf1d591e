"""A steady stream of requests, each repeated with its key until it is accepted, and the wait for their ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from agentq.client import Client
from agentq.errors import Unavailable

SUBMITTERS = 4


def pay_or_wire(number: int) -> str:
    """Every tenth run wires with the irreversible tool, the others pay with the keyed one."""
    return "wire A" if number % 10 == 0 else "pay A"


class Load:
    """``with Load(client, rate=20) as load``: so many requests a second until the block ends, or ``limit`` of them.

    ``accepted``: the ids of the runs, in order of acceptance. ``refused``: how often MongoDB did not answer.
    """

    def __init__(
        self, client: Client, *, rate: float, limit: int | None = None, wish: Callable[[int], str] = pay_or_wire,
        key: str = "load",
    ) -> None:  # fmt: skip
        self._client, self._rate, self._limit, self._wish, self._key = client, rate, limit, wish, key
        self._over = threading.Event()
        self._threads = ThreadPoolExecutor(SUBMITTERS + 1, "load")
        self.accepted: list[str] = []
        self.refused = 0

    def __enter__(self) -> Load:
        self._began = time.monotonic()
        self._feeding = self._threads.submit(self._feed)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.wait()

    def wait(self) -> None:
        """Until every request that was begun is accepted; without a limit, call it after the block only."""
        self._feeding.result()
        self._threads.shutdown()

    def _feed(self) -> None:
        number, places = 0, threading.Semaphore(SUBMITTERS)
        while not self._over.wait(max(0.0, self._began + number / self._rate - time.monotonic())):
            if number == self._limit:
                return
            places.acquire()
            self._threads.submit(self._submit, number, places)
            number += 1

    def _submit(self, number: int, places: threading.Semaphore) -> None:
        pause = threading.Event()
        try:
            while True:
                try:
                    handle = self._client.submit(self._wish(number), idempotency_key=f"{self._key}-{number}")
                    self.accepted.append(handle.run_id)
                    return
                except Unavailable:
                    self.refused += 1
                    pause.wait(0.1)
        finally:
            places.release()


def unended(runs: Any, timeout_s: float, also: Callable[[], bool] = lambda: True) -> int:
    """Wait until all runs have ended or wait for a person (and ``also`` is true); how many have not after that time."""
    pause, deadline = threading.Event(), time.monotonic() + timeout_s
    while True:
        live = sum(not _waits_for_a_person(run) for run in runs.find({"next_due": {"$type": "date"}}, {"steps": 1}))
        if (not live and also()) or time.monotonic() > deadline:
            return live
        pause.wait(0.1)


def _waits_for_a_person(run: dict[str, Any]) -> bool:
    return bool(run["steps"]) and all("held" in step for step in run["steps"].values())
