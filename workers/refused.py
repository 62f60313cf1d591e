"""What is kept of a refused request, in MongoDB only: enough to correct it and hand it in again. Pure."""

from __future__ import annotations

import hashlib
import json
from typing import Any, NoReturn

MAX_KEPT_BYTES = 256 * 1024
_encode = json.JSONEncoder(separators=(",", ":")).encode  # ASCII only, so that any text can be stored


def refused(code: str, args: tuple[Any, ...] | list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of a task's arguments: the request in them, or all of them where they are no request's."""
    try:
        return _kept(code, _encode(_request(args, kwargs)).encode())
    except (TypeError, ValueError, RecursionError):
        return _kept(code, b"")


def refused_message(code: str, body: Any) -> dict[str, Any]:
    """Of a message that could not be read as a task: its request if it has one, else its body if that is JSON."""
    raw = body.encode("utf-8", "replace") if isinstance(body, str) else body if isinstance(body, bytes) else b""
    kept = _kept(code, raw)
    if "body" in kept:
        value = json.loads(kept["body"])
        match value:
            case [list(args), dict(kwargs), *_]:
                kept["body"] = _encode(_request(args, kwargs))
    return kept


def _request(args: tuple[Any, ...] | list[Any], kwargs: dict[str, Any]) -> Any:
    if set(kwargs) == {"request"} and not args:
        return kwargs["request"]
    if len(args) == 1 and not kwargs:
        return args[0]
    return {"args": list(args), "kwargs": kwargs}


def _kept(code: str, raw: bytes) -> dict[str, Any]:
    kept: dict[str, Any] = {"code": code, "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    if 0 < len(raw) <= MAX_KEPT_BYTES:
        try:
            text = _encode(json.loads(raw, parse_constant=_refuse))
        except (ValueError, RecursionError):  # no JSON: only its size and hash are kept
            return kept
        if len(text) <= 2 * MAX_KEPT_BYTES:
            kept["body"] = text
    return kept


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
