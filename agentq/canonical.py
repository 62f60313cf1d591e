"""One text, and one hash, for equal values: what fingerprints, chains and pinned versions are made with. Pure."""

from __future__ import annotations

import hashlib
import json
from typing import Any

_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)  # made once: half the cost


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces, ASCII only; raises ValueError on NaN and infinities."""
    return _CANONICAL.encode(value)


def sha256(text: str) -> str:
    """Hex SHA-256 of UTF-8 text."""
    return hashlib.sha256(text.encode()).hexdigest()
