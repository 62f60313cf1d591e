"""Tools of the operators' tests. ``post_letter`` dies with its first call of each text, after it has posted."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from agentq.tools import tool

POSTED = "AGENTQ_TEST_POSTED"  # the file that holds a line for each letter that was posted


@tool(effect="irreversible")
def post_letter(text: str) -> str:
    """Post a letter."""
    book = Path(os.environ[POSTED])
    letters = book.read_text(encoding="utf-8").splitlines() if book.exists() else []
    with book.open("a", encoding="utf-8") as lines:
        lines.write(f"{text}\n")
    if text not in letters:
        os.kill(os.getpid(), signal.SIGKILL)
    return "posted"


@tool(effect="read")
def look_up(text: str) -> str:
    """Look something up."""
    return f"found: {text}"
