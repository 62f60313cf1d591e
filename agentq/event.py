"""The events of a run, hash-chained from its birth: an edit, deletion, insertion or reordering shows. Pure."""

from __future__ import annotations

from typing import Any, cast

from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from agentq.canonical import canonical_json, sha256


class Event(TypedDict):
    """One audit record. ``hash`` covers every other field, ``prev`` is the hash of the record before it."""

    run: str
    seq: int
    type: str
    at_ms: int
    step: str | None
    data: dict[str, Any]
    prev: str
    hash: str


class NewEvent(TypedDict):
    """An event before it has its place in the chain. ``at_ms`` is the time of the thing, in epoch milliseconds."""

    type: str
    at_ms: int
    step: str | None
    data: dict[str, Any]


class AuditHead(TypedDict):
    """The end of a run's chain: the last event's ``seq`` and ``hash``."""

    seq: int
    hash: str


def genesis(run_id: str) -> AuditHead:
    """The head of an empty chain: bound to the run, so no chain can be moved to another."""
    return {"seq": 0, "hash": sha256(f"agentq-audit-v1:{run_id}")}


def event_hash(event: Event) -> str:
    """The hash an untouched event carries."""
    return sha256(canonical_json({key: value for key, value in event.items() if key != "hash"}))


def chain(run_id: str, head: AuditHead, news: list[NewEvent]) -> tuple[list[Event], AuditHead]:
    """Append ``news`` to the chain that ends in ``head``; gives the finished events and the new head."""
    events: list[Event] = []
    seq, prev = head["seq"], head["hash"]
    for new in news:
        seq += 1
        event = {"run": run_id, "seq": seq, **new, "prev": prev}
        prev = event["hash"] = sha256(canonical_json(event))
        events.append(cast("Event", event))
    return events, {"seq": seq, "hash": prev}
