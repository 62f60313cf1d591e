"""Who goes next: which of the waiting runs enter a pool. Pure: no I/O, no clock; same arguments, same decision.

Two levels, both by the same rule. A *party* (a priority class; in it, a tenant) has an account of what it was served,
in cost divided by its weight or share, and the party that is furthest behind is served next. That is a deficit round
robin whose quantum has gone to zero: no party is ever ahead by more than one run's cost. A party that had nothing to do
starts level with the others when it comes back: idleness earns no credit. When a run ends, its tenant's account is
corrected by the difference between the estimated and the actual cost.

Priority classes share a pool's window. A class that is behind its reserved share goes first, otherwise the more urgent
one; a class that has fewer runs in flight than its reserve may enter a full window, so an urgent request never waits
for a place behind a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from agentq.engine.contest import UNIT, Contest, Ledger, Line, Quota, Unknown, Waiting, by_weight, tenant_of
from agentq.protocol import Priority

__all__ = [
    "CLASSES", "SHARES", "Admitted", "Books", "Decision", "Line", "Quota", "Waiting",
    "correct", "decide", "places", "reserved", "tenant_of",
]  # fmt: skip

CLASSES: tuple[Priority, ...] = ("interactive", "standard", "batch")  # the most urgent first
AHEAD = 64  # tenants that are due next of which used up lines are wanted at once, or as many as there is room for
SHARES: Mapping[Priority, float] = {"interactive": 0.5, "standard": 0.3, "batch": 0.1}  # the rest goes by urgency


@dataclass(frozen=True, slots=True)
class Books:
    """What one decision leaves for the next, of one pool. Empty books are fair from now on: losing them costs nothing.

    ``total``: the cost of all that was admitted, in thousandths; a class behind its share has an account below it.
    """

    total: int = 0
    ledgers: Mapping[Priority, Ledger] = field(default_factory=dict)


class Admitted(NamedTuple):
    priority: Priority
    flow: str
    run: Waiting


@dataclass(frozen=True, slots=True)
class Decision:
    """``wanted``: the lines of which more must be known before anything else can be decided fairly; fetch them and
    decide again."""

    admitted: list[Admitted]
    books: Books
    quotas: Mapping[str, Quota]
    wanted: frozenset[tuple[Priority, str]] = frozenset()


def places(
    priority: Priority, window: int, flight: Mapping[Priority, int], shares: Mapping[Priority, float] = SHARES
) -> int:
    """How many runs of a class may enter a pool of which ``flight`` are in it by class, and ``window`` may be."""
    return max(0, window - sum(flight.values()), reserved(priority, window, flight, shares))


def reserved(
    priority: Priority, window: int, flight: Mapping[Priority, int], shares: Mapping[Priority, float] = SHARES
) -> int:
    """How many runs of a class may enter though the window is full."""
    return max(0, _reserve(shares[priority], window) - flight.get(priority, 0))


def _reserve(share: float, window: int) -> int:
    return max(1, int(share * window)) if window > 0 else 0


def decide(
    books: Books,
    lines: Mapping[Priority, Mapping[str, Line]],
    *,
    window: int,
    flight: Mapping[Priority, int],
    weights: Mapping[str, float] | None = None,
    quotas: Mapping[str, Quota] | None = None,
    shares: Mapping[Priority, float] = SHARES,
    limit: int = 500,
) -> Decision:
    """Admit up to ``limit`` runs into a pool of which ``flight`` are in it by class, and ``window`` may be.

    ``lines``: what waits, by class and flow; ``weights`` by tenant (1 if not given); ``quotas`` by tenant and by flow,
    both of which a run needs. Nothing that fits and may go is left waiting while there is room. It costs what it
    admits; what waits costs something only where other lines wait than at the decision before.
    """
    left = dict(quotas or {})
    contests = [
        Contest(priority, books.ledgers.get(priority) or Ledger(0), lines[priority], weights or {}, left)
        for priority in CLASSES
        if lines.get(priority)
    ]
    pool = _Pool(books, contests, window, flight, left, shares)
    admitted: list[Admitted] = []
    wanted: frozenset[tuple[Priority, str]] = frozenset()
    try:
        while len(admitted) < limit and (chosen := pool.next()) is not None:
            admitted.append(chosen)
    except Unknown as unknown:
        wanted = unknown.contest.unknown(max(AHEAD, min(limit - len(admitted), pool.room(unknown.contest.priority))))
    return Decision(admitted, pool.close(), left, wanted)


def correct(books: Books, priority: Priority, tenant: str, weight: float, difference: int) -> Books:
    """Charge a tenant the ``difference`` between the actual and the estimated cost of a run that has ended."""
    ledger = books.ledgers.get(priority)
    if ledger is None or tenant not in ledger.tenants:
        return books
    served = ledger.tenants[tenant] + by_weight(difference, weight)
    corrected = Ledger(ledger.served, ledger.clock, {**ledger.tenants, tenant: served}, ledger.busy)
    return Books(books.total, {**books.ledgers, priority: corrected})


class _Pool:
    """The classes of one pool, and what is left of its window."""

    def __init__(
        self,
        books: Books,
        contests: Sequence[Contest],
        window: int,
        flight: Mapping[Priority, int],
        quotas: dict[str, Quota],
        shares: Mapping[Priority, float],
    ) -> None:
        self._books = books
        self._contests = contests
        self._quotas = quotas
        self._shares = shares
        self._total = books.total
        self._free = window - sum(flight.values())
        self._below: dict[Priority, int] = {}  # how many more a class may have before it has its reserve
        self._served: dict[Priority, int] = {}
        for priority in (contest.priority for contest in contests):
            ledger = books.ledgers.get(priority)
            self._served[priority] = ledger.served if ledger is not None and ledger.busy else self._total
            self._below[priority] = _reserve(shares[priority], window) - flight.get(priority, 0)

    def room(self, priority: Priority) -> int:
        """How many more of a class may enter."""
        return max(0, self._free, self._below[priority])

    def next(self) -> Admitted | None:
        """Admit one run; None if there is no room, or nothing that may go. Raises ``Unknown``."""
        first: Contest | None = None
        behind: Contest | None = None
        least = self._total
        for contest in self._contests:
            if self.room(contest.priority) == 0 or contest.head() is None:
                continue
            first = first or contest
            if self._served[contest.priority] < least:
                behind, least = contest, self._served[contest.priority]
        chosen = behind or first
        return None if chosen is None else self._admit(chosen)

    def _admit(self, contest: Contest) -> Admitted:
        priority = contest.priority
        flow, run = contest.take()
        self._free -= 1
        self._below[priority] -= 1
        # What a class got beyond its share, because nobody else had work, is not held against it later.
        served = min(self._served[priority], self._total)
        self._served[priority] = served + by_weight(run.cost, self._shares[priority])
        self._total += run.cost * UNIT
        if self._quotas:
            self._shrink(flow, run.cost)
        return Admitted(priority, flow, run)

    def _shrink(self, flow: str, cost: int) -> None:
        tenant = tenant_of(flow)
        for name in {flow, tenant} & self._quotas.keys():
            self._quotas[name] = self._quotas[name].less(cost)
        for contest in self._contests:
            contest.look_again(tenant)

    def close(self) -> Books:
        """The books after the decision. A class of which nothing was seen has nothing to do."""
        ledgers = {one.priority: one.close(self._served[one.priority]) for one in self._contests}
        absent = {name: replace(one, busy=frozenset(), order=None) for name, one in self._books.ledgers.items()}
        return Books(self._total, {**absent, **ledgers})
