"""A campaign's workers and schedulers: each place is filled again the moment its process dies, however it died."""

from __future__ import annotations

import random
import signal
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from agentq.runtime.runtime import CRASH_POINTS
from tests.fault.plant import ALL_POOLS, Plant

Cause = Literal["killed", "crash point", "asked", "by itself"]

# One worker that does everything and goes on in place, two that hand over to each other through the broker.
PLACES = {"all": ALL_POOLS, "front": "router,specialist", "back": "tools,critic"}
SCHEDULERS = ("scheduler-a", "scheduler-b")
ONCE_A_RUN = ("before_settle", "before_claim")  # crash points that are passed less often than once a step
EXIT_S = 40.0  # a worker that was asked to stop is gone by then


@dataclass
class Member:
    """One process in its place. ``disturbed`` are the moments (epoch seconds) at which something was done to it."""

    place: str
    name: str
    process: Any
    failpoint: str | None = None
    cause: Cause = "by itself"
    disturbed: list[float] = field(default_factory=list)
    asked_at: float | None = None
    code: int | None = None
    died_at: float | None = None

    @property
    def point(self) -> str | None:
        return self.failpoint.split(":")[0] if self.failpoint else None


class Fleet:
    """``with Fleet(plant, rng) as fleet``: all places are filled when it is entered.

    ``armed``: the share of new processes that get a crash point to die at. ``gone`` are the dead, in order.
    """

    def __init__(self, plant: Plant, rng: random.Random, *, armed: float) -> None:
        self._plant = plant
        self._rng = rng
        self.armed = armed
        self.members: dict[str, Member] = {}
        self.gone: list[Member] = []
        self._count = 0
        self._lock = threading.RLock()
        self._stop = threading.Event()

    def __enter__(self) -> Fleet:
        for place in (*PLACES, *SCHEDULERS):
            self._fill(place)
        self._keeper = threading.Thread(target=self._keep, name="fleet", daemon=True)
        self._keeper.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._keeper.join(20)

    def pick(self, rng: random.Random, places: tuple[str, ...] = tuple(PLACES)) -> Member | None:
        """A process that serves and to which nothing is being done, or None."""
        with self._lock:
            fit = [member for place in places if (member := self.members[place]) and self._serves(member)]
        return rng.choice(fit) if fit else None

    def _serves(self, member: Member) -> bool:
        return member.process.poll() is None and member.asked_at is None and self._plant.is_ready(member.name)

    def kill(self, member: Member) -> None:
        with self._lock:
            member.cause = "killed"
            member.disturbed.append(time.time())
            member.process.send_signal(signal.SIGKILL)

    def ask_to_stop(self, member: Member) -> None:
        with self._lock:
            member.cause, member.asked_at = "asked", time.time()
            member.process.terminate()

    def freeze(self, member: Member) -> None:
        member.disturbed.append(time.time())
        member.process.send_signal(signal.SIGSTOP)

    def thaw(self, member: Member) -> None:
        member.process.send_signal(signal.SIGCONT)
        member.disturbed.append(time.time())

    def disarm(self) -> None:
        """From here on nobody dies at a crash point: who carries one is asked to stop and replaced."""
        with self._lock:
            self.armed = 0.0
            carrying = [member for member in self.members.values() if member.failpoint and self._serves(member)]
        for member in carrying:
            self.ask_to_stop(member)

    def ready(self) -> bool:
        """Everybody serves, or has died already."""
        with self._lock:
            return all(self._plant.is_ready(member.name) for member in self.members.values())

    def settled(self) -> bool:
        """Every place is filled with a process that serves and carries no crash point."""
        with self._lock:
            return all(self._serves(member) and not member.failpoint for member in self.members.values())

    def everybody(self) -> list[Member]:
        with self._lock:
            return [*self.gone, *self.members.values()]

    def deaths(self, since: int) -> list[Member]:
        with self._lock:
            return self.gone[since:]

    def _keep(self) -> None:
        while not self._stop.wait(0.02):
            for place, member in list(self.members.items()):
                if member.process.poll() is not None:
                    with self._lock:
                        self._bury(member)
                        self._fill(place)
                elif member.asked_at is not None and time.time() - member.asked_at > EXIT_S:
                    member.cause = "by itself"  # reported: it did not go when it was asked
                    member.process.send_signal(signal.SIGKILL)

    def _bury(self, member: Member) -> None:
        member.died_at, member.code = time.time(), member.process.returncode
        if member.cause in ("by itself", "asked") and member.code == -signal.SIGKILL and member.failpoint:
            member.cause = "crash point"
        member.disturbed.append(member.died_at)
        self.gone.append(member)

    def _fill(self, place: str) -> None:
        self._count += 1
        name = f"{place}-{self._count:03d}"
        failpoint = self._failpoint(place) if self._rng.random() < self.armed else None
        if place in SCHEDULERS:
            process = self._plant.start_scheduler(name, failpoint)
        else:
            process = self._plant.launch(name, PLACES[place], failpoint)
        self.members[place] = Member(place, name, process, failpoint)

    def _failpoint(self, place: str) -> str:
        if place in SCHEDULERS:
            return f"scheduler_after_commit:{self._rng.randint(1, 5)}"
        point = self._rng.choice([point for point in CRASH_POINTS if place != "front" or point != "before_settle"])
        return f"{point}:{self._rng.randint(5, 30 if point in ONCE_A_RUN else 150)}"
