"""Steps that died together are not started together again and again."""

from __future__ import annotations

import pytest

from agentq.engine.advance import MAX_APART_S, apart_s


def test_the_first_loss_of_a_step_is_made_good_at_once() -> None:
    assert {apart_s(f"r{number}", "s1", 1) for number in range(100)} == {0.0}


@pytest.mark.parametrize(("tried", "most_s"), [(2, 4.0), (3, 8.0), (4, 16.0), (9, MAX_APART_S)])
def test_from_the_second_on_steps_that_died_together_are_spread_over_more_and_more_time(
    tried: int, most_s: float
) -> None:
    waits = [apart_s(f"r{number}", "s1", tried) for number in range(1_000)]
    assert 0 <= min(waits) < most_s / 20
    assert most_s * 0.95 < max(waits) <= most_s
    quarters = [sum(most_s * part / 4 <= wait < most_s * (part + 1) / 4 for wait in waits) for part in range(4)]
    assert all(200 < count < 300 for count in quarters)


def test_two_that_meet_once_part_the_next_time() -> None:
    """The wait is fixed by run, step and try, and new each time: whom chance brought together it parts."""
    assert apart_s("r1", "s1", 2) == apart_s("r1", "s1", 2)
    near = [
        (one, other)
        for one in range(60)
        for other in range(one)
        if abs(apart_s(f"r{one}", "s1", 2) - apart_s(f"r{other}", "s1", 2)) < 0.1
    ]
    again = sum(abs(apart_s(f"r{one}", "s1", 3) - apart_s(f"r{other}", "s1", 3)) < 0.1 for one, other in near)
    assert len(near) > 30
    assert again < len(near) / 10
