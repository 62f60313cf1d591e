"""Hunting deliberate bugs: which schedule catches which."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.simulation.job_mutants import JOB_MUTANTS
from tests.simulation.mutants import MUTANTS, Patch
from tests.simulation.schedule import Result, play_many, with_jobs

LIMIT = 20_000  # seeds within which each is caught
ALL_MUTANTS = (*MUTANTS, *JOB_MUTANTS)


def hunt(mutant: Callable[[], Patch], limit: int = LIMIT) -> Result | None:
    """The first schedule that catches a mutant; None if none of ``limit`` does."""
    seeds = with_jobs(range(limit)) if mutant in JOB_MUTANTS else range(limit)
    with mutant():
        _, failed = play_many(seeds, stop_at_first=True)
    return failed[0] if failed else None


def hunt_all(limit: int) -> int:
    """Say for every mutant what catches it. 0 if all are caught."""
    survived = 0
    for mutant in ALL_MUTANTS:
        began = time.monotonic()
        caught = hunt(mutant, limit)
        spent = time.monotonic() - began
        if caught is None:
            survived += 1
            print(f"SURVIVED {mutant.__name__} ({limit} seeds, {spent:.1f} s)")
        else:
            print(f"caught by seed {caught.seed:5} in {spent:5.1f} s  {mutant.__name__}: {caught.problems[0][:90]}")
    return 1 if survived else 0
