"""What may go wrong, and what a seed lets go wrong.

Each seed has a profile of its own: some kinds of fault at some rates, a number of them at most, for some time (swarm
testing: schedules that know few kinds get deeper than schedules that know all). A fault that fires has an index, the
same in every replay, so a failing schedule is shrunk by muting kinds and indices.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

# By the kind of call in which a fault may strike.
KINDS: dict[str, tuple[str, ...]] = {
    "store": ("refuse", "lose_answer", "slow", "kill_before", "kill_after", "freeze", "suspend"),
    "llm": ("llm_busy", "llm_refused", "llm_slow", "kill_after", "freeze", "suspend"),
    "tool": ("tool_unknown_undone", "tool_unknown_done", "tool_bug", "tool_slow", "kill_before", "kill_after", "freeze",
             "suspend"),
    "publish": ("hint_lost", "hint_twice", "hint_late", "hint_astray", "kill_before", "kill_after"),
    "job": ("job_busy", "job_refused", "job_unheard", "job_slow", "kill_before", "kill_after", "freeze", "suspend"),
    "point": ("kill_at_point",),
    "world": ("wipe", "outage", "cancel", "skew", "drain", "endpoint_down"),
}  # fmt: skip
OFTENER = {"job": 4.0}  # calls of which a schedule has few
ALL_KINDS = sorted({kind for kinds in KINDS.values() for kind in kinds})


@dataclass(frozen=True, slots=True)
class Mute:
    """Faults that do not fire in a replay: whole kinds, single indices, and everything past ``first``."""

    kinds: frozenset[str] = frozenset()
    indices: frozenset[int] = frozenset()
    first: int = 1_000_000

    def hits(self, kind: str, index: int) -> bool:
        return index >= self.first or kind in self.kinds or index in self.indices


@dataclass(slots=True)
class Faults:
    """The faults of one schedule. ``strike`` says which fault strikes a call, and counts it."""

    rng: random.Random
    mute: Mute
    left: int
    tables: dict[str, list[tuple[float, str]]]
    fired: list[str] = field(default_factory=list)  # kinds by index, muted ones too
    on: bool = True
    spared: str = "-"  # processes whose names begin with this meet no faults

    @classmethod
    def of(cls, rng: random.Random, mute: Mute) -> Faults:
        rate = rng.choice((0.01, 0.03, 0.03, 0.06, 0.15))
        share = rng.choice((0.15, 0.35, 0.35, 1.0))
        left = rng.choice((2, 4, 8, 8, 16, 30)) if rng.random() < 0.97 else 0
        tables: dict[str, list[tuple[float, str]]] = {}
        for call, kinds in KINDS.items():
            chosen = [(kind, rng.random()) for kind in kinds if rng.random() < share]
            total, table = 0.0, []
            for kind, weight in chosen:
                total += rate * weight * OFTENER.get(call, 1.0)
                table.append((total, kind))
            tables[call] = table
        return cls(rng, mute, left, tables)

    def strike(self, call: str, process: str = "") -> str | None:
        """The fault that strikes a call of this process now, if any."""
        if not self.on or process.startswith(self.spared):
            return None
        drawn = self.rng.random()
        for bound, kind in self.tables[call]:
            if drawn < bound:
                return self._fire(kind)
        return None

    def world_events(self) -> list[str]:
        """Kinds of the faults that strike by time and not by call, one entry for each that may strike."""
        return [kind for _, kind in self.tables["world"] for _ in range(self.rng.choice((1, 1, 2)))]

    def fire_event(self, kind: str) -> bool:
        return self.on and self._fire(kind) is not None

    def _fire(self, kind: str) -> str | None:
        if self.left == 0:
            return None
        self.left -= 1
        index = len(self.fired)
        self.fired.append(kind)
        return None if self.mute.hits(kind, index) else kind
