"""``python -m tests.simulation``: explore seeds, replay one, or try the deliberate bugs; see the package."""

from __future__ import annotations

import argparse
import os
import sys
import time

from tests.simulation.schedule import Result, explore, play, shrink, stage

SHOWN = 5  # failing seeds that are shrunk and told in full


def main() -> int:
    """0 where every invariant held (and every mutant was caught), 1 otherwise."""
    options = _options()
    if options.mutants:
        from tests.simulation.hunting import hunt_all

        return hunt_all(options.count)
    if options.seed is not None:
        return _replay(options.seed, trace=options.trace, whole=options.whole)
    return _explore(options.first, options.count, options.processes)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=20_000, help="schedules to play (default 20000)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: one a core")
    parser.add_argument("--seed", type=int, help="replay this one")
    parser.add_argument("--trace", action="store_true", help="with --seed: say what happens")
    parser.add_argument("--whole", action="store_true", help="with --seed: with all its faults, not the fewest")
    parser.add_argument("--mutants", action="store_true", help="which seed catches which deliberate bug")
    return parser.parse_args()


def _replay(seed: int, *, trace: bool, whole: bool) -> int:
    with stage():
        result = play(seed, trace=True)
    muted = ""
    if result.problems and not whole:
        mute, result = shrink(seed)
        muted = f"; with all faults but {sorted(mute.kinds)} and {sorted(mute.indices)}, the first {mute.first} of them"
    if trace:
        print("\n".join(result.trace))
    print(f"seed {seed}: {len(result.fired)} faults {', '.join(dict.fromkeys(result.fired))}{muted}")
    _tell(result)
    return 1 if result.problems else 0


def _tell(result: Result) -> None:
    for problem in result.problems:
        print(f"  VIOLATION {problem}")
    if result.problems:
        print(f"  replay: python -m tests.simulation --seed {result.seed} --trace")
    else:
        print("  every invariant holds")


def _explore(first: int, count: int, processes: int) -> int:
    began, played, failed = time.monotonic(), 0, 0
    for done, results in explore(first, count, processes):
        played += done
        for result in results:
            failed += 1
            if failed <= SHOWN:
                print(f"seed {result.seed} fails")
                _tell(shrink(result.seed)[1])
    spent = time.monotonic() - began
    print(f"{played} schedules, {failed} with violations, {spent:.1f} s, {played / spent:.0f}/s on {processes} cores")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
