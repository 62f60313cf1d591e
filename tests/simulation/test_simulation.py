"""The durability protocol under deterministic simulation: 5,000 schedules, and that the simulation is what it says."""

from __future__ import annotations

import pytest

from agentq.runtime.joiner import JOB_CRASH_POINTS
from agentq.runtime.runtime import CRASH_POINTS
from tests.simulation.faults import ALL_KINDS
from tests.simulation.mutants import receipts_are_ignored
from tests.simulation.schedule import Result, play, play_many, shrink, stage, without_one

SLICE = 500


def told(failed: list[Result]) -> str:
    """What a developer needs of schedules that failed."""
    return "\n".join(
        f"python -m tests.simulation --seed {result.seed} --trace: {'; '.join(result.problems)}"
        for result in failed[:5]
    )


@pytest.mark.parametrize("first", range(0, 9 * SLICE, SLICE))
def test_every_invariant_holds_in_every_schedule(first: int) -> None:
    """Nothing lost, nothing done twice, the books balance: whatever dies, freezes, is lost or comes twice."""
    played, failed = play_many(range(first, first + SLICE))
    assert played == SLICE
    assert not failed, told(failed)


@pytest.mark.parametrize("batch", [1, 50])
def test_the_number_of_hints_in_a_message_changes_no_promise(batch: int) -> None:
    played, failed = play_many(range(10_000, 10_000 + SLICE // 2), batch=batch)
    assert played == SLICE // 2
    assert not failed, told(failed)


def test_a_seed_is_one_schedule() -> None:
    """Played twice, a seed gives the same events at the same times."""
    with stage():
        for seed in range(100):
            assert play(seed, trace=True) == play(seed, trace=True)


def test_nothing_that_the_store_gave_or_took_is_changed_in_place() -> None:
    """The simulation copies documents as little as it can; with whole copies the same seeds go the same way."""
    with stage():
        cheap = [play(seed, trace=True) for seed in range(100)]
    with stage(whole_copies=True):
        assert [play(seed, trace=True) for seed in range(100)] == cheap


def test_every_kind_of_fault_and_every_crash_point_is_reached() -> None:
    expected = {*CRASH_POINTS, *JOB_CRASH_POINTS, "scheduler_after_commit"}
    fired: set[str] = set()
    points: set[str] = set()
    with stage():
        for seed in range(20_000, 23_000):
            if set(ALL_KINDS) <= fired and expected <= points:
                break
            result = play(seed)
            fired.update(result.fired)
            points |= result.points
    assert fired == set(ALL_KINDS)
    assert points == expected


def test_a_failing_seed_is_shrunk_to_the_faults_it_needs() -> None:
    """Of all the faults few remain, the lost answer that this bug needs among them, and none too many."""
    with receipts_are_ignored():
        _, failed = play_many(range(5_000), stop_at_first=True)
        mute, least = shrink(failed[0].seed)
        with stage():
            assert not any(play(least.seed, less).problems for less in without_one(mute, least))
    left = [kind for index, kind in enumerate(least.fired) if not mute.hits(kind, index)]
    assert least.problems
    assert least.trace
    assert len(left) < len(failed[0].fired)
    assert {"lose_answer", "outage"} & {*left}
