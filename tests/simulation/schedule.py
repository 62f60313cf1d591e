"""Playing seeds: one, many, and the smallest set of faults with which one still fails."""

from __future__ import annotations

import copy
import gc
import logging
import multiprocessing
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from types import SimpleNamespace
from typing import Any
from unittest import mock

from agentq.runtime import joiner, perform, runtime, scheduler
from agentq.store import memory
from tests.simulation.faults import ALL_KINDS, Mute
from tests.simulation.loop import Killed
from tests.simulation.world import World


@dataclass(frozen=True, slots=True)
class Result:
    """How a schedule went. ``fired``: the faults that struck, by index; ``trace`` only where it was asked for."""

    seed: int
    problems: tuple[str, ...]
    fired: tuple[str, ...]
    ended: tuple[str, ...]  # status and audit head of each run
    points: frozenset[str]  # the named crash points at which a process died
    trace: tuple[str, ...] = ()


class _Copies:
    """Stands for the module ``copy`` in the in-memory store: copies only what that store itself changes in place.

    The engine and the runtime never change a document they were given; ``test_simulation`` holds them to it by
    playing the same seeds with whole copies.
    """

    @staticmethod
    def deepcopy(value: Any) -> Any:
        if isinstance(value, dict) and "leases" in value:
            leases = {step_id: {**lease} for step_id, lease in value["leases"].items()}
            return {**value, "leases": leases, "waste": {**value["waste"]}}
        return value


class _Log:
    """Stands for the loggers of the runtime: an unexpected exception there is a problem of the schedule."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def warning(self, *_: Any) -> None:
        """Expected under faults."""

    def info(self, *_: Any) -> None:
        """As it should be."""

    def error(self, line: str, *args: Any) -> None:
        error = sys.exc_info()[1]
        if "fault of the tool runner" not in str(error):
            self.problems.append(f"unexpected {error!r}: {line % args}")


_log = _Log()


@contextmanager
def stage(*, whole_copies: bool = False) -> Iterator[None]:
    """What schedules need around them: the cheap copies and the listening loggers."""
    cheap = copy if whole_copies else _Copies
    with (
        mock.patch.object(memory, "copy", cheap),
        mock.patch.object(runtime, "log", _log),
        mock.patch.object(scheduler, "log", _log),
        mock.patch.object(perform, "log", _log),
        mock.patch.object(joiner, "log", _log),
        mock.patch.object(joiner, "tempfile", SimpleNamespace(TemporaryFile=BytesIO)),
        mock.patch.object(runtime, "MAX_EVENTS_IN_RUN", runtime.MAX_EVENTS_IN_RUN),  # each schedule sets its own,
        mock.patch.multiple(joiner, GROUP=joiner.GROUP, MAX_JOB_BYTES=joiner.MAX_JOB_BYTES),  # and of these
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "coroutine .* was never awaited")  # killed before its first line
        collecting = gc.isenabled()
        gc.disable()  # dead processes are garbage in cycles; collected between schedules, not in them
        gc.freeze()
        try:
            yield
        finally:
            gc.unfreeze()
            gc.collect()
            if collecting:
                gc.enable()


def play(seed: int, mute: Mute | None = None, *, batch: int | None = None, trace: bool = False) -> Result:
    """One schedule, inside ``stage``. ``batch``: hints a message, where the seed is not to choose."""
    _log.problems = []
    world = World(seed, mute, trace=trace)
    world.batch = batch or world.batch
    runtime.MAX_EVENTS_IN_RUN = world.events_kept
    joiner.GROUP, joiner.MAX_JOB_BYTES = world.group, world.job_bytes
    try:
        world.live()
    except Killed:
        raise AssertionError("a process died outside of itself") from None
    problems = (*world.books.problems, *_log.problems)
    ended = tuple(f"{run['status']} {run['audit']['hash']}" for run in world.server.runs.values())
    return Result(
        seed, problems, tuple(world.faults.fired), ended, frozenset(world.points), tuple(world.clock.trace or ())
    )


def play_many(
    seeds: Iterable[int], *, stop_at_first: bool = False, batch: int | None = None
) -> tuple[int, list[Result]]:
    """Play seeds: how many were played, and those that failed."""
    failed: list[Result] = []
    played = 0
    with stage():
        for seed in seeds:
            result = play(seed, batch=batch)
            played += 1
            if played % 100 == 0:
                gc.collect()
            if result.problems:
                failed.append(result)
                if stop_at_first:
                    break
    return played, failed


def with_jobs(seeds: Iterable[int]) -> Iterator[int]:
    """Those of the seeds in whose schedules calls may wait for a provider's job."""
    return (seed for seed in seeds if World(seed).provider is not None)


def _slice(seeds: range) -> tuple[int, list[Result]]:
    logging.disable(logging.CRITICAL)
    return play_many(seeds)


def explore(first: int, count: int, processes: int) -> Iterator[tuple[int, list[Result]]]:
    """Play ``count`` seeds from ``first`` on, in slices over ``processes``; gives what each slice found."""
    size = max(1, min(1_000, count // processes))
    slices = [range(at, min(at + size, first + count)) for at in range(first, first + count, size)]
    if processes == 1:
        yield from map(_slice, slices)
        return
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        yield from pool.imap_unordered(_slice, slices)


def without_one(mute: Mute, result: Result) -> list[Mute]:
    """One more of the faults that struck is muted, each of them in turn."""
    left = [index for index, kind in enumerate(result.fired) if not mute.hits(kind, index)]
    return [replace(mute, indices=mute.indices | {index}) for index in left]


def shrink(seed: int) -> tuple[Mute, Result]:
    """Few faults with which a failing seed still fails, found greedily: the end cut off, kinds, single ones. None of
    those left can be left out: without it the schedule goes otherwise and fails no more."""
    with stage():
        best = Mute()
        result = play(seed)
        assert result.problems, f"seed {seed} does not fail"

        def better(mute: Mute) -> bool:
            nonlocal best, result
            tried = play(seed, mute)
            if tried.problems:
                best, result = mute, tried
                return True
            return False

        first, most = 0, len(result.fired)
        while first < most:
            middle = (first + most) // 2
            if better(replace(best, first=middle)):
                most = middle
            else:
                first = middle + 1
        for kind in ALL_KINDS:
            if kind in result.fired:
                better(replace(best, kinds=best.kinds | {kind}))
        while any(better(less) for less in without_one(best, result)):  # what could not go before, now may
            pass
        return best, play(seed, best, trace=True)
