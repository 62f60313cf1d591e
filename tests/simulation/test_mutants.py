"""A test of the test: the simulation catches every deliberate bug, each within 20,000 seeds and most within 100."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.simulation.hunting import ALL_MUTANTS, hunt
from tests.simulation.mutants import Patch


@pytest.mark.parametrize("mutant", ALL_MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_deliberate_bug_is_caught(mutant: Callable[[], Patch]) -> None:
    caught = hunt(mutant)
    assert caught is not None
    assert caught.problems
