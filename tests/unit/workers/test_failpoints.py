"""Named crash points."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agentq.errors import ConfigError
from agentq.runtime.runtime import no_crash
from workers.failpoints import KNOWN, crash_point

PROGRAM = """
import sys
from workers.failpoints import crash_point
crash = crash_point(sys.argv[1])
for passage in range(1, 6):
    crash("before_claim")
    crash(sys.argv[2])
    print(passage, flush=True)
"""


def passages(checkout: Path, spec: str, point: str) -> tuple[int, list[str]]:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, spec, point], cwd=checkout, capture_output=True, text=True, check=False
    )
    return ended.returncode, ended.stdout.split()


def test_the_process_is_killed_at_the_named_passage_of_the_named_point(checkout: Path) -> None:
    """SIGKILL: no handler, no clean-up, as in a real crash."""
    assert passages(checkout, "after_effect:3", "after_effect") == (-signal.SIGKILL, ["1", "2"])
    assert passages(checkout, "after_effect", "after_effect") == (-signal.SIGKILL, [])


def test_other_points_pass(checkout: Path) -> None:
    assert passages(checkout, "after_effect:1", "after_commit") == (0, ["1", "2", "3", "4", "5"])


def test_production_has_none() -> None:
    assert crash_point(None) is no_crash
    assert crash_point("") is no_crash


@pytest.mark.parametrize("spec", ["after_lunch:1", "after_effect:x", "after_effect:-1", ":1"])
def test_a_mistyped_point_is_refused_and_the_known_ones_are_named(spec: str) -> None:
    with pytest.raises(ConfigError) as caught:
        crash_point(spec)
    assert all(name in caught.value.hint for name in KNOWN)
