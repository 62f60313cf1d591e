"""What the leader knows of the lines: whose runs wait, and the first runs of those lines that it had to know.

Each class is looked at as a whole: the flows that wait, and the first run of each. Where that is not the one we know,
a more urgent one has come or ours is gone, and what is known of that line is forgotten; everything else stays known
until it has been let in. So a line is read once for all the runs that one reading brings, not once a look.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Set

from agentq.engine.admission import Admitted, Line
from agentq.protocol import Pool, Priority
from agentq.store.backlog import Backlog

LOOK_S = 0.0005  # for each flow that waits, until its class is looked at again: two hundred at every tick,
LONGEST_S = 2.0  # a thousand twice a second, and never less often than this
FULL_S = 0.25  # how often to look at a class for which there is no place
STOPPED_S = 1.0  # how often to read a line whose first run may not go: it is paused or being cancelled
AT_ONCE = 64  # lines read by one question
UNKNOWN = Line((), more=True)


class Lines:
    """``heads``: how many runs to know at once, of all lines together; a line has 16 at least, 200 at most."""

    def __init__(self, backlog: Backlog, heads: int) -> None:
        self._backlog = backlog
        self._heads = heads
        self._known: dict[Pool, dict[Priority, dict[str, Line]]] = {}
        self._firsts: dict[tuple[Pool, Priority], dict[str, str]] = {}
        self._stopped: dict[tuple[Pool, Priority, str], float] = {}  # until when
        self._looked: dict[Priority, float] = {}

    @property
    def pools(self) -> list[Pool]:
        """Those in which something waits."""
        return sorted(pool for pool, classes in self._known.items() if any(classes.values()))

    @property
    def classes(self) -> set[Priority]:
        """Those of which something waits."""
        return {priority for classes in self._known.values() for priority, lines in classes.items() if lines}

    def of(self, pool: Pool) -> dict[Priority, dict[str, Line]]:
        """The lines of one pool, as a decision takes them."""
        return {priority: lines for priority, lines in self._known.get(pool, {}).items() if lines}

    def flows(self, priority: Priority) -> int:
        """How many flows wait in a class."""
        return sum(len(classes.get(priority, ())) for classes in self._known.values())

    def due(self, priority: Priority, now: float, *, full: bool) -> bool:
        """Is a class of which something waits to be looked at? One of which nothing is known always is."""
        flows = self.flows(priority)
        pause = max(FULL_S if full else 0.0, min(LONGEST_S, LOOK_S * flows))
        return not flows or now - self._looked[priority] >= pause

    def keep(self, classes: Set[Priority]) -> None:
        """In all other classes nothing waits any more."""
        for known in self._known.values():
            for priority in known.keys() - classes:
                del known[priority]

    async def look(self, priority: Priority, now: float) -> None:
        """See who waits in a class."""
        found = await self._backlog.waiting(priority)
        self._looked[priority] = now
        self._stopped = {name: until for name, until in self._stopped.items() if until > now}
        for pool in found.keys() | self._known.keys():
            firsts = self._firsts[pool, priority] = found.get(pool, {})
            known = self._known.setdefault(pool, {})
            before = known.get(priority, {})
            lines = {flow: _still(before.get(flow), first) for flow, first in firsts.items()}
            stopped = {flow for where, of, flow in self._stopped if (where, of) == (pool, priority)}
            for flow in stopped & lines.keys():
                del lines[flow]
                if flow in before:
                    lines[flow] = before[flow]
            known[priority] = lines

    async def fetch(self, pool: Pool, wanted: Collection[tuple[Priority, str]], now: float) -> None:
        """Read the heads of these lines."""
        flows: dict[Priority, list[str]] = defaultdict(list)
        for priority, flow in sorted(wanted):
            flows[priority].append(flow)
        parts = [(priority, some[first : first + AT_ONCE]) for priority, some in flows.items()
                 for first in range(0, len(some), AT_ONCE)]  # fmt: skip
        await asyncio.gather(*(self._fetch(pool, *part, now) for part in parts))

    async def _fetch(self, pool: Pool, priority: Priority, flows: list[str], now: float) -> None:
        count = sum(len(lines) for classes in self._known.values() for lines in classes.values())
        limit = min(200, max(16, self._heads // max(1, count)))
        heads = await self._backlog.heads(priority, pool, flows, limit)
        lines, firsts = self._known[pool][priority], self._firsts[pool, priority]
        for flow in flows:
            runs = heads.get(flow, [])
            if runs:
                lines[flow] = Line(runs, len(runs) == limit)
            else:
                lines.pop(flow, None)
            if flow in firsts and (not runs or runs[0].run_id != firsts[flow]):
                self._stopped[pool, priority, flow] = now + STOPPED_S

    def went(self, pool: Pool, admitted: Iterable[Admitted]) -> None:
        """These wait no more: the first runs of their lines, as a decision on ``of`` has them."""
        for (priority, flow), count in Counter((one.priority, one.flow) for one in admitted).items():
            lines, firsts = self._known[pool][priority], self._firsts[pool, priority]
            heads, more = lines.pop(flow)
            firsts.pop(flow, None)
            if more or len(heads) > count:
                lines[flow] = Line(heads[count:], more)
            if len(heads) > count:
                firsts[flow] = heads[count].run_id


def _still(known: Line | None, first: str) -> Line:
    """What is known of a line whose first run this is."""
    return known if known is not None and known.heads and known.heads[0].run_id == first else UNKNOWN
