"""A campaign's workers and schedulers: each place is filled again the moment its process dies, however it died."""

from __future__ import annotations

import contextlib
import os
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
OVERLOAD = 5  # processes that want to run, a core; a campaign by itself has about two
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
    frozen: bool = False
    code: int | None = None
    died_at: float | None = None

    @property
    def point(self) -> str | None:
        return self.failpoint.split(":")[0] if self.failpoint else None


def _signal(member: Member, sign: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it died at this moment
        member.process.send_signal(sign)


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
        self.overloaded: list[float] = []  # moments at which the machine had far more to do than this
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

    def _pick(self, rng: random.Random, places: tuple[str, ...]) -> Member | None:
        """A process that serves and to which nothing is being done, or None."""
        fit = [self.members[place] for place in places if self._serves(self.members[place])]
        return rng.choice(fit) if fit else None

    def _serves(self, member: Member) -> bool:
        living = member.process.poll() is None and self._plant.is_ready(member.name)
        return living and member.cause == "by itself" and not member.frozen

    def kill(self, rng: random.Random, places: tuple[str, ...] = tuple(PLACES)) -> Member | None:
        """SIGKILL to one of those that serve; None if nobody does."""
        with self._lock:
            if (member := self._pick(rng, places)) is not None:
                member.cause = "killed"
                member.disturbed.append(time.time())
                _signal(member, signal.SIGKILL)
            return member

    def ask_to_stop(self, rng: random.Random) -> Member | None:
        """SIGTERM to a worker that serves; None if none does."""
        with self._lock:
            if (member := self._pick(rng, tuple(PLACES))) is not None:
                self._ask(member)
            return member

    def _ask(self, member: Member) -> None:
        member.cause, member.asked_at = "asked", time.time()
        _signal(member, signal.SIGTERM)

    def freeze(self, rng: random.Random) -> Member | None:
        """SIGSTOP to a worker that serves; None if none does."""
        with self._lock:
            if (member := self._pick(rng, tuple(PLACES))) is not None:
                member.frozen = True
                member.disturbed.append(time.time())
                _signal(member, signal.SIGSTOP)
            return member

    def thaw(self, member: Member) -> None:
        with self._lock:
            member.frozen = False
            member.disturbed.append(time.time())
            _signal(member, signal.SIGCONT)

    def disarm(self) -> bool:
        """From here on nobody dies at a crash point: who carries one is asked to stop and replaced. True when every
        place is filled with a process that serves and carries none; call it again until then."""
        with self._lock:
            self.armed = 0.0
            for member in self.members.values():
                if member.failpoint and self._serves(member):
                    self._ask(member)
            return all(self._serves(member) and not member.failpoint for member in self.members.values())

    def ready(self) -> bool:
        """Everybody serves, or has died already."""
        with self._lock:
            return all(self._plant.is_ready(member.name) for member in self.members.values())

    def everybody(self) -> list[Member]:
        with self._lock:
            return [*self.gone, *self.members.values()]

    def deaths(self, since: int) -> list[Member]:
        with self._lock:
            return self.gone[since:]

    def _keep(self) -> None:
        while not self._stop.wait(0.02):
            if os.getloadavg()[0] > OVERLOAD * (os.cpu_count() or 1):
                self.overloaded.append(time.time())
            for place, member in list(self.members.items()):
                if member.process.poll() is not None:
                    with self._lock:
                        self._bury(member)
                        self._fill(place)
                elif member.asked_at is not None and time.time() - member.asked_at > EXIT_S:
                    member.cause = "by itself"  # reported: it did not go when it was asked
                    _signal(member, signal.SIGKILL)

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
