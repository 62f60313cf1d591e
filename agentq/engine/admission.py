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

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from agentq.protocol import Priority

CLASSES: tuple[Priority, ...] = ("interactive", "standard", "batch")  # the most urgent first
SHARES: Mapping[Priority, float] = {"interactive": 0.5, "standard": 0.3, "batch": 0.1}  # the rest goes by urgency
_UNIT = 1000  # weights and accounts count in thousandths: accounts are integers, so that they never lose anything


class Waiting(NamedTuple):
    """A run that waits. ``rank`` 0 is the most urgent; ``cost`` is estimated, in nano-dollars, at least 1."""

    run_id: str
    rank: int
    cost: int


class Line(NamedTuple):
    """The head of one flow's line, in order. ``more``: others wait behind those that are known here."""

    heads: Sequence[Waiting]
    more: bool = False


@dataclass(frozen=True, slots=True)
class Quota:
    """What may still be admitted for a tenant, or for one key of it; None: no limit.

    ``idle``: nothing of it is in flight. Then the next run goes though it costs more than may be spent, because it
    would never go otherwise; a cap of nothing lets nothing through.
    """

    runs: int | None = None
    spend: int | None = None  # nano-dollars
    rate: int | None = None
    idle: bool = False

    def allows(self, cost: int) -> bool:
        return (
            (self.runs is None or self.runs > 0)
            and (self.rate is None or self.rate > 0)
            and (self.spend is None or self.spend >= cost or (self.idle and self.spend > 0))
        )

    def less(self, cost: int) -> Quota:
        """After one more run of ``cost``."""
        return Quota(
            None if self.runs is None else self.runs - 1,
            None if self.spend is None else self.spend - cost,
            None if self.rate is None else self.rate - 1,
        )


@dataclass(frozen=True, slots=True)
class Ledger:
    """The accounts of one class: its own, and its tenants'. A newcomer starts level with the busy tenant furthest
    behind, or at the ``clock``: the account of the tenant served last. ``busy``: who had something to admit when we
    last looked."""

    served: int
    clock: int = 0
    tenants: Mapping[str, int] = field(default_factory=dict)
    busy: frozenset[str] = frozenset()


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


def tenant_of(flow: str) -> str:
    """A flow is a tenant, or ``tenant|key``."""
    return flow.partition("|")[0] if "|" in flow else flow


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
    both of which a run needs. Nothing that fits and may go is left waiting while there is room.
    """
    contests = {
        priority: _Contest(priority, books.ledgers.get(priority), lines[priority], weights or {})
        for priority in CLASSES
        if lines.get(priority)
    }
    pool = _Pool(books, contests, window, dict(flight), dict(quotas or {}), shares)
    admitted: list[Admitted] = []
    wanted: frozenset[tuple[Priority, str]] = frozenset()
    while len(admitted) < limit:
        try:
            chosen = pool.next()
        except _Unknown as unknown:
            wanted = unknown.lines
            break
        if chosen is None:
            break
        admitted.append(chosen)
    return Decision(admitted, pool.close(), pool.quotas, wanted)


def correct(books: Books, priority: Priority, tenant: str, weight: float, difference: int) -> Books:
    """Charge a tenant the ``difference`` between the actual and the estimated cost of a run that has ended."""
    ledger = books.ledgers.get(priority)
    if ledger is None or tenant not in ledger.tenants:
        return books
    served = ledger.tenants[tenant] + _by_weight(difference, weight)
    corrected = replace(ledger, tenants={**ledger.tenants, tenant: served})
    return replace(books, ledgers={**books.ledgers, priority: corrected})


def _by_weight(cost: int, weight: float) -> int:
    return cost * _UNIT * _UNIT // max(1, round(weight * _UNIT))


class _Unknown(Exception):
    """Nothing can be decided before more of these lines is known."""

    def __init__(self, lines: frozenset[tuple[Priority, str]]) -> None:
        self.lines = lines


class _Contest:
    """The tenants of one class, the one furthest behind first."""

    def __init__(
        self, priority: Priority, ledger: Ledger | None, lines: Mapping[str, Line], weights: Mapping[str, float]
    ) -> None:
        self.priority = priority
        self._before = ledger or Ledger(0)
        self._clock = self._before.clock
        self._weights = weights
        self._lines = lines
        self._next = dict.fromkeys(lines, 0)
        self._flows: dict[str, list[str]] = {}
        for flow, line in lines.items():
            if line.heads or line.more:
                self._flows.setdefault(tenant_of(flow), []).append(flow)
        known, busy = self._before.tenants, self._before.busy
        working = [known[tenant] for tenant in self._flows if tenant in busy]
        # Not the clock where somebody works: a refund takes accounts below it.
        level = min(working, default=self._clock)
        self._heap = [
            (known[tenant] if tenant in busy else max(known.get(tenant, level), level), tenant)
            for tenant in self._flows
        ]
        self._served = {tenant: served for served, tenant in self._heap}
        heapq.heapify(self._heap)

    def head(self, quotas: Mapping[str, Quota]) -> tuple[str, Waiting] | None:
        """Flow and run that would go next; None if all that waits is stopped by a quota or there is nothing.

        What a quota stops stays stopped for the whole decision: quotas only shrink.
        """
        while self._heap:
            found = self._of_tenant(self._heap[0][1], quotas)
            if found is not None:
                return found
            heapq.heappop(self._heap)
        return None

    def _of_tenant(self, tenant: str, quotas: Mapping[str, Quota]) -> tuple[str, Waiting] | None:
        quota = quotas.get(tenant)
        if quota is not None and not quota.allows(0):
            return None
        best: tuple[str, Waiting] | None = None
        for flow in self._flows[tenant]:
            own = quotas.get(flow)
            if own is not None and not own.allows(0):
                continue
            head = self._head_of(flow)
            if head is None or (own is not None and not own.allows(head.cost)):
                continue
            if best is None or (head.rank, head.run_id) < (best[1].rank, best[1].run_id):
                best = flow, head
        if best is not None and quota is not None and not quota.allows(best[1].cost):
            return None  # the tenant's cheaper runs do not overtake it: what is in flight ends, then it goes
        return best

    def _head_of(self, flow: str) -> Waiting | None:
        line, place = self._lines[flow], self._next[flow]
        if place < len(line.heads):
            return line.heads[place]
        if line.more:
            raise _Unknown(self._unknown())
        return None

    def _unknown(self, most: int = 64) -> frozenset[tuple[Priority, str]]:
        """The lines that are used up here, those that are due first: they are fetched together."""
        first = heapq.nsmallest(most, self._heap)
        return frozenset(
            (self.priority, flow)
            for _, tenant in first
            for flow in self._flows[tenant]
            if self._lines[flow].more and self._next[flow] >= len(self._lines[flow].heads)
        )

    def take(self, flow: str, run: Waiting) -> None:
        """The run that ``head`` named goes."""
        served, tenant = self._heap[0]
        self._clock = max(self._clock, served)
        self._served[tenant] = served + _by_weight(run.cost, self._weights.get(tenant, 1.0))
        self._next[flow] += 1
        heapq.heapreplace(self._heap, (self._served[tenant], tenant))

    def close(self, served: int) -> Ledger:
        """What the books keep. A tenant that a quota stops is not busy, so being stopped earns no credit; one that is
        not there and not ahead of the others is a newcomer when it comes back."""
        gone = self._before.tenants.items()
        level = self._heap[0][0] if self._heap else self._clock
        kept = {name: was for name, was in gone if name not in self._served and was > level}
        busy = frozenset([tenant for _, tenant in self._heap])
        return Ledger(served, self._clock, {**kept, **self._served}, busy)


class _Pool:
    """The classes of one pool, and what is left of its window."""

    def __init__(
        self,
        books: Books,
        contests: dict[Priority, _Contest],
        window: int,
        flight: dict[Priority, int],
        quotas: dict[str, Quota],
        shares: Mapping[Priority, float],
    ) -> None:
        self.quotas = quotas
        self._contests = contests
        self._window = window
        self._flight = flight
        self._shares = shares
        self._books = books
        self._total = books.total
        self._served: dict[Priority, int] = {}
        for priority in contests:
            ledger = books.ledgers.get(priority)
            self._served[priority] = ledger.served if ledger is not None and ledger.busy else self._total

    def next(self) -> Admitted | None:
        """Admit one run; None if there is no room, or nothing that may go. Raises ``_Unknown``."""
        full = sum(self._flight.values()) >= self._window
        ready = []
        for priority, contest in self._contests.items():
            reserve = max(1, int(self._shares[priority] * self._window)) if self._window > 0 else 0
            if full and self._flight.get(priority, 0) >= reserve:
                continue
            head = contest.head(self.quotas)
            if head is not None:
                ready.append((priority, *head))
        if not ready:
            return None
        behind = [one for one in ready if self._served[one[0]] < self._total]
        priority, flow, run = min(behind, key=lambda one: self._served[one[0]]) if behind else ready[0]
        self._contests[priority].take(flow, run)
        self._flight[priority] = self._flight.get(priority, 0) + 1
        # What a class got beyond its share, because nobody else had work, is not held against it later.
        served = min(self._served[priority], self._total) + _by_weight(run.cost, self._shares[priority])
        self._served[priority] = served
        self._total += run.cost * _UNIT
        for name in {flow, tenant_of(flow)}:
            if name in self.quotas:
                self.quotas[name] = self.quotas[name].less(run.cost)
        return Admitted(priority, flow, run)

    def close(self) -> Books:
        """The books after the decision. A class of which nothing was seen has nothing to do."""
        ledgers = {priority: contest.close(self._served[priority]) for priority, contest in self._contests.items()}
        absent = {priority: replace(one, busy=frozenset()) for priority, one in self._books.ledgers.items()}
        return Books(self._total, {**absent, **ledgers})
