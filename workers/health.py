"""Is the process in this container alive? ``python -m workers.health``: 0 if it showed a sign of life lately, else 1.

A worker and the scheduler touch the file that AGENTQ_READY_FILE names every five seconds, from the loop that does
their work (``workers.liveness``): a process that hangs stops touching it. Imports nothing heavy, it runs often.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

MAX_AGE_S = 30.0


def complaint(ready_file: str | None, now: float) -> str | None:
    """What is wrong, in one sentence; None if all is well. ``now`` in epoch seconds."""
    if not ready_file:
        return "AGENTQ_READY_FILE is not set, so there is no sign of life to look at."
    try:
        age = now - Path(ready_file).stat().st_mtime
    except OSError as error:
        return f"{ready_file} cannot be read ({error.strerror}): the process has not become ready yet."
    if age > MAX_AGE_S:
        return f"The last sign of life is {age:.0f} s old, {MAX_AGE_S:.0f} s are allowed: the process hangs or is gone."
    return None


def main() -> int:
    """The exit code; the sentence goes to stderr."""
    wrong = complaint(os.environ.get("AGENTQ_READY_FILE"), time.time())
    if wrong is None:
        return 0
    sys.stderr.write(f"unhealthy: {wrong}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
