"""Checking a run's audit chain. Pure: events in, what is wrong with them out."""

from __future__ import annotations

from collections.abc import Iterable

from agentq.event import AuditHead, Event, event_hash, genesis


def check(run_id: str, head: AuditHead, events: Iterable[Event]) -> list[str]:
    """What is wrong with a chain, as sentences; empty if it is whole and untouched.

    ``events`` in the order of their seq. Finds any edit (an event's hash no longer fits it), deletion (a gap, or an
    end before ``head``), insertion (a seq twice or past ``head``) and reordering (a ``prev`` that fits no predecessor).
    """
    problems: list[str] = []
    seq, prev = 0, genesis(run_id)["hash"]
    for event in events:
        seq += 1
        found = event.get("seq")
        if isinstance(found, int) and found > seq:
            gone = f"event {seq} is" if found == seq + 1 else f"events {seq} to {found - 1} are"
            problems.append(f"{gone} missing")
            seq, prev = found, event.get("prev", "")
        elif found != seq:
            problems.append(f"event {seq} is not in its place")
        if event.get("run") != run_id:
            problems.append(f"event {seq} belongs to another run")
        if not _untouched(event):
            problems.append(f"event {seq} was changed after it was written")
        if event.get("prev") != prev:
            problems.append(f"event {seq} does not follow the event before it")
        prev = event.get("hash", "")
    if seq < head["seq"]:
        problems.append(f"the chain ends at event {seq}, the run has {head['seq']}")
    elif seq > head["seq"]:
        problems.append(f"the chain has {seq} events, the run has {head['seq']}")
    elif prev != head["hash"]:
        problems.append("the chain does not end in the run's audit head")
    return problems


def _untouched(event: Event) -> bool:
    try:
        return event_hash(event) == event.get("hash")
    except (TypeError, ValueError):  # a value that no event of ours can hold
        return False
