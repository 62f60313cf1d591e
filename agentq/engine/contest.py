"""The tenants of one priority class, the one furthest behind first. Pure, as is its caller ``agentq.engine.admission``.

What a decision costs is what it admits times the logarithm of the tenants. They are put in order anew only where other
ones have work than before, or an account was corrected.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import NamedTuple

from agentq.protocol import Priority

UNIT = 1000  # weights and accounts count in thousandths: accounts are integers, so that they never lose anything


class Waiting(NamedTuple):
    """A run that waits. ``rank`` 0 is the most urgent; ``cost`` is estimated, in nano-dollars, at least 1."""

    run_id: str
    rank: int
    cost: int


class Line(NamedTuple):
    """The head of one flow's line, in order. ``more``: others wait behind those that are known here. A line of which
    neither is known is not to be decided on."""

    heads: Sequence[Waiting]
    more: bool = False


class Quota(NamedTuple):
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


class Order(NamedTuple):
    """What a decision has worked out and the next need not, as long as the same lines wait: ``flows`` by tenant, and
    the busy tenants as a heap by account. It follows from the rest of a ledger and the lines: leaving it out changes no
    decision, only what the next one costs."""

    lines: frozenset[str]
    flows: Mapping[str, Sequence[str]]
    heap: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True)
class Ledger:
    """The accounts of one class: its own, and its tenants'. A newcomer starts level with the busy tenant furthest
    behind, or at the ``clock``: the account of the tenant served last. ``busy``: who had something to admit when we
    last looked."""

    served: int
    clock: int = 0
    tenants: Mapping[str, int] = field(default_factory=dict)
    busy: frozenset[str] = frozenset()
    order: Order | None = field(default=None, compare=False, repr=False)


def tenant_of(flow: str) -> str:
    """A flow is a tenant, or ``tenant|key``."""
    return flow.partition("|")[0] if "|" in flow else flow


def by_weight(cost: int, weight: float) -> int:
    """What a cost counts for in an account: in thousandths, a weight of 2 halves it."""
    return cost * UNIT * UNIT // max(1, round(weight * UNIT))


class Unknown(Exception):
    """Nothing can be decided before more is known of the lines that are used up in this contest."""

    def __init__(self, contest: Contest) -> None:
        self.contest = contest


class Contest:
    """The tenants of one class, the one furthest behind first.

    Quotas only shrink during a decision, so what they stop stays stopped: a tenant that its own stops from the start
    takes no part, another one leaves when it would be next.
    """

    def __init__(
        self,
        priority: Priority,
        ledger: Ledger,
        lines: Mapping[str, Line],
        weights: Mapping[str, float],
        quotas: Mapping[str, Quota],
    ) -> None:
        self.priority = priority
        self._before = ledger
        self._clock = ledger.clock
        self._lines = lines
        self._weights = weights
        self._quotas = quotas
        self._accounts = dict(ledger.tenants)
        self._gone: set[str] = set()
        self._fronts: dict[str, list[tuple[int, str, str, int]]] = {}
        self._taken: dict[str, int] = {}
        self._head: tuple[str, Waiting] | None = None  # kept until it goes or a quota that it needs shrinks
        known = ledger.order
        same = known is not None and lines.keys() == known.lines
        self._names = known.lines if known is not None and same else frozenset(lines)
        self._flows = known.flows if known is not None and same else _by_tenant(lines)
        stopped = [name for name in quotas.keys() & self._flows.keys() if not quotas[name].allows(0)]
        self._tenants: Set[str] = self._flows.keys() - stopped if stopped else self._flows.keys()
        # Who is busy was among the tenants of the same lines, so none but all of them are as many.
        as_many = len(self._tenants) == len(ledger.busy)
        self._as_before = as_many and ((same and not stopped) or self._tenants <= ledger.busy)
        self._heap = list(known.heap) if known is not None and self._as_before else self._in_order()

    def _in_order(self) -> list[tuple[int, str]]:
        """The accounts as a heap, newcomers among them."""
        tenants, busy, accounts = self._tenants, self._before.busy, self._accounts
        # Not the clock where somebody works: a refund takes accounts below it.
        level = min((accounts[tenant] for tenant in tenants & busy), default=self._clock)
        for tenant in tenants - busy:
            accounts[tenant] = max(accounts.get(tenant, level), level)
        heap = [(accounts[tenant], tenant) for tenant in tenants]
        heapq.heapify(heap)
        return heap

    def head(self) -> tuple[str, Waiting] | None:
        """Flow and run that would go next; None if all that waits is stopped by a quota or there is nothing. Raises
        ``Unknown``."""
        while self._head is None and self._heap:
            tenant = self._heap[0][1]
            self._head = self._of_tenant(tenant)
            if self._head is None:
                self._gone.add(tenant)
                heapq.heappop(self._heap)
        return self._head

    def _of_tenant(self, tenant: str) -> tuple[str, Waiting] | None:
        quota = self._quotas.get(tenant)
        if quota is not None and not quota.allows(0):
            return None
        flows = self._flows[tenant]
        found = self._of_one(flows[0]) if len(flows) == 1 else self._of_many(tenant)
        if found is not None and quota is not None and not quota.allows(found[1].cost):
            return None  # the tenant's cheaper runs do not overtake it: what is in flight ends, then it goes
        return found

    def _of_one(self, flow: str) -> tuple[str, Waiting] | None:
        run, own = self._first(flow), self._quotas.get(flow)
        if own is not None and not own.allows(run.cost if run is not None else 0):
            return None
        if run is None and self._lines[flow].more:
            raise Unknown(self)
        return None if run is None else (flow, run)

    def _of_many(self, tenant: str) -> tuple[str, Waiting] | None:
        """As of one flow; of several that may go, the one whose first run is the most urgent, or the oldest."""
        fronts = self._fronts.get(tenant)
        if fronts is None:
            fronts = self._fronts[tenant] = [self._front(flow) for flow in self._flows[tenant]]
            heapq.heapify(fronts)
        while fronts:
            _, _, flow, place = fronts[0]
            if place != self._taken.get(flow, 0):  # that run went; the one behind it may come behind another flow's
                heapq.heapreplace(fronts, self._front(flow))
            elif (found := self._of_one(flow)) is not None:
                return found
            else:
                heapq.heappop(fronts)
        return None

    def _first(self, flow: str) -> Waiting | None:
        heads, place = self._lines[flow].heads, self._taken.get(flow, 0)
        return heads[place] if place < len(heads) else None

    def _front(self, flow: str) -> tuple[int, str, str, int]:
        """Rank, run id, flow, place in its line. A line that is used up comes first: it must be known."""
        run, place = self._first(flow), self._taken.get(flow, 0)
        return (-1, "", flow, place) if run is None else (run.rank, run.run_id, flow, place)

    def unknown(self, most: int) -> frozenset[tuple[Priority, str]]:
        """The lines that are used up, of so ``most`` tenants that are due first: they are fetched together."""
        first = heapq.nsmallest(most, self._heap)
        return frozenset(
            (self.priority, flow)
            for _, tenant in first
            for flow in self._flows[tenant]
            if self._lines[flow].more and self._taken.get(flow, 0) >= len(self._lines[flow].heads)
        )

    def take(self) -> tuple[str, Waiting]:
        """What ``head`` has named goes."""
        assert self._head is not None
        flow, run = self._head
        served, tenant = self._heap[0]
        self._clock = max(self._clock, served)
        served += by_weight(run.cost, self._weights.get(tenant, 1.0))
        self._accounts[tenant] = served
        heapq.heapreplace(self._heap, (served, tenant))
        self._taken[flow] = self._taken.get(flow, 0) + 1
        self._head = None
        return flow, run

    def look_again(self, tenant: str) -> None:
        """A quota of this tenant's, or of its flows, has shrunk."""
        if self._heap and self._heap[0][1] == tenant:
            self._head = None

    def close(self, served: int) -> Ledger:
        """What the books keep. A tenant that a quota stops is not busy, so being stopped earns no credit; one that is
        not there and not ahead of the others is a newcomer when it comes back."""
        accounts, tenants = self._accounts, self._tenants
        if len(accounts) > len(tenants):
            level = self._heap[0][0] if self._heap else self._clock
            for tenant in accounts.keys() - tenants:
                if accounts[tenant] <= level:
                    del accounts[tenant]
        busy = self._before.busy if self._as_before and not self._gone else frozenset(tenants - self._gone)
        return Ledger(served, self._clock, accounts, busy, Order(self._names, self._flows, tuple(self._heap)))


def _by_tenant(flows: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for flow in flows:
        found.setdefault(tenant_of(flow), []).append(flow)
    return found
