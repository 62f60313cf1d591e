"""How many runs a pool may have in flight, learned from what it does. Pure.

Runs in flight are either *taken* (a worker has claimed them; so they keep it busy) or *untaken* (their hint waits in
the pool's queue). By Little's law, untaken runs wait for ``untaken / rate`` seconds. While none wait, the workers could
do more: the window grows, by half until the first queue was seen, then slowly. Once some wait longer than ``AIM_S``,
the window becomes what the workers hold plus what they take in ``AIM_S``: they never idle and nobody waits much longer.
A queue of a later pool that grows too long shrinks the window by an eighth a look, as TCP would, but not by more below
what the workers hold: it follows them down as runs end, however slowly they do.

All this holds where runs wait for a slot. Where much fewer are in flight than one worker holds, what waits waits for a
machine that is busy. Shrinking then makes the pool slower, because fewer steps share a write, and so shrinks the window
again, down to nothing. So it never falls below a quarter of what one worker holds while runs are taken: more would be
faster still, but an urgent request shares the processor with all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

AIM_S = 0.25  # how long a run should wait in a pool's queue; a quarter of what an urgent request is promised
LEAST = 8


@dataclass(frozen=True, slots=True)
class Window:
    """``size``: runs in flight. ``knee``: how many the workers held when some first had to wait; None: not yet."""

    size: int
    knee: int | None = None


@dataclass(frozen=True, slots=True)
class Sight:
    """One look at a pool. ``rate``: runs that ended a second, smoothed; ``later_s``: the longest wait in the queues of
    the pools its runs go on to, None if nothing new is known. ``used``: it was full after the last look, and more
    waited. ``holds``: runs that one worker can hold."""

    taken: int
    untaken: int
    rate: float
    later_s: float | None = None
    used: bool = True
    holds: int = LEAST


def adapt(window: Window, sight: Sight) -> Window:
    """The window after one look."""
    least = _least(sight)
    if sight.later_s is not None and sight.later_s > 2 * AIM_S:
        return Window(max(least, _eighth_less(window.size), _eighth_less(sight.taken)), sight.taken)
    wait_s = sight.untaken / sight.rate if sight.rate > 0 else float(sight.untaken)
    if sight.untaken > 2 and wait_s > AIM_S:
        return Window(max(least, sight.taken + int(sight.rate * AIM_S)), sight.taken)
    if not sight.used or wait_s > AIM_S / 2:  # it was not needed, or is about right
        return window
    if window.knee is None:
        return replace(window, size=window.size + window.size // 2 + 1)
    return replace(window, size=max(least, window.size + max(1, window.size // 32)))


def _least(sight: Sight) -> int:
    """Below this nobody waits for a slot. Where nothing is taken, there may be no worker."""
    return max(LEAST, sight.holds // 4) if sight.taken else LEAST


def _eighth_less(runs: int) -> int:
    return runs - runs // 8
