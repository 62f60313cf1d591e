"""Checking a run's audit chain. Pure: events in, what is wrong with them out."""

from __future__ import annotations

from collections.abc import Iterable

from agentq.protocol import AuditHead, Event, event_hash, genesis


def check(run_id: str, head: AuditHead, events: Iterable[Event]) -> list[str]:
    """What is wrong with a chain, as sentences; empty if it is whole and untouched.

    ``events`` in the order of their seq. Finds any edit (an event's hash no longer fits it), deletion (a gap, or an
    end before ``head``), insertion (a seq twice or past ``head``) and reordering (a ``prev`` that fits no predecessor).
    """
    problems: list[str] = []
    seq, prev = 0, genesis(run_id)["hash"]
    for event in events:
        seq += 1
        if event["seq"] != seq:
            missing = event["seq"] - seq
            problems.append(
                f"event {seq} is missing" if missing == 1 else f"events {seq} to {event['seq'] - 1} are missing"
            )
            seq, prev = event["seq"], event["prev"]
        if event["run"] != run_id:
            problems.append(f"event {seq} belongs to another run")
        if event_hash(event) != event["hash"]:
            problems.append(f"event {seq} was changed after it was written")
        if event["prev"] != prev:
            problems.append(f"event {seq} does not follow the event before it")
        prev = event["hash"]
    if seq < head["seq"]:
        problems.append(f"the chain ends at event {seq}, the run has {head['seq']}")
    elif seq > head["seq"]:
        problems.append(f"the chain has {seq} events, the run has {head['seq']}")
    elif prev != head["hash"]:
        problems.append("the chain does not end in the run's audit head")
    return problems
