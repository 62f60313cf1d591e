"""What the server was called for and what it sent, without any text: so that tests can count what was paid."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass, replace
from typing import Any

LENGTH = 100_000


@dataclass(frozen=True, slots=True)
class Entry:
    """One call. Holds no text. ``status`` is what the client was sent, 0 if nothing.

    ``batch`` is the batch whose line it was, "" for a live call; ``key`` is the Idempotency-Key, or the line's
    custom_id. ``inputs`` is the number of texts to embed, 1 for any other call.
    """

    n: int
    api: str
    purpose: str
    model: str
    key: str
    status: int
    fault: str | None
    latency_ms: int
    tools: list[str]
    batch: str = ""
    inputs: int = 1


class Journal:
    """The last LENGTH calls, and how many there were."""

    def __init__(self) -> None:
        self._entries: deque[Entry] = deque(maxlen=LENGTH)
        self.total = 0

    def record(self, entry: Entry) -> None:
        """``entry.n`` is given here, from 1 on."""
        self.total += 1
        self._entries.append(replace(entry, n=self.total))

    def forget(self) -> None:
        """Start over."""
        self._entries.clear()
        self.total = 0

    def as_dict(self) -> dict[str, Any]:
        """Oldest first."""
        return {"total": self.total, "calls": [asdict(entry) for entry in self._entries]}
