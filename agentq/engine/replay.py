"""A run's state made again from its journal: the same ``advance`` on the same outcomes gives the same state. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, cast

from agentq.engine.advance import advance, enter_run
from agentq.engine.commit import plan
from agentq.engine.decision import outcome_of, shifted
from agentq.errors import Conflict, NotFound
from agentq.event import genesis
from agentq.run import START_STEP
from schemas.catalog import NODE_POOL, Bundle, RunLimits, ToolNode
from schemas.run import Entry, RunDoc, Step

NEVER = datetime(9999, 1, 1, tzinfo=UTC)
BROKEN = "broken_journal"
_ENDLESS = RunLimits(max_steps=1 << 40, max_tokens=1 << 40, max_cost_usd=1e9, max_wall_s=1e9)


def hashes(run: RunDoc) -> set[str]:
    """The bundles that a replay of the run needs."""
    starts = [entry["start"] for entry in run.get("journal", []) if "start" in entry]
    named = {run["workflow"]["hash"], *(start["hash"] for start in starts), *(start["was"] for start in starts)}
    return {name for name in named if name is not None}


def replay(
    bundles: Mapping[str, Bundle], run: RunDoc, until: str | None = None, *, again: Bundle | None = None
) -> RunDoc:
    """The run (loaded with its journal) as it was before the first outcome of step ``until``; the whole of it if None.

    What it gives is a run under way: ``state``, ``steps`` (what was open, nobody working on it), ``usage`` and
    ``workflow`` are those of then; leases, audit chain and times of hints are not kept. A limit of the run, its
    deadline and a cancellation are no outcomes, so a replay goes on where they ended the run. ``again``: the last
    outcome is decided under this bundle instead of the run's.

    Raises ``NotFound`` for a step that the run never had, ``Conflict`` where the journal is missing or does not fit.
    """
    entries = run.get("journal", [])
    if not entries and (run["status"] == "succeeded" or (run["state"] or {"next_step": 2})["next_step"] > 2):
        raise Conflict(
            f"Run {run['_id']} has no journal.", code="no_journal", hint="It is older than journals. Submit it again."
        )
    now = _born(bundles, run, entries)
    for index, entry in enumerate(entries):
        now = _entered(bundles, run, now, entry)
        if until is not None and entry.get("step") == until:
            return now
        last = index == len(entries) - 1
        now = _apply(again if again is not None and last else bundles[now["workflow"]["hash"]], now, entry)
    now = _entered(bundles, run, now, None)
    if until is None or until in now["steps"]:
        return now
    raise NotFound(
        f"Run {run['_id']} has had no step {until!r}.", hint=f"'agentq show {run['_id']}' lists them.", step=until
    )


def agrees(bundles: Mapping[str, Bundle], run: RunDoc) -> bool:
    """Does the journal give the stored state? If not, ``advance`` is not pure or the document was changed by hand."""
    try:
        state = replay(bundles, run)["state"]
    except Conflict as error:
        if error.code == BROKEN:
            return False
        raise
    if state is not None and run["result"] is not None and "reason" in run["result"]:
        state = {**state, "acceptance": "budget"}  # a limit of the run is no outcome
    return state == run["state"]


def _born(bundles: Mapping[str, Bundle], run: RunDoc, entries: Sequence[Entry]) -> RunDoc:
    """The run before anything had happened to it."""
    start = next((entry["start"] for entry in entries if "start" in entry), None)
    first = run["workflow"]["hash"] if start is None else start["was"] or start["hash"]
    workflow = bundles[first].workflow
    node = workflow.nodes[workflow.start]
    step: Step = {
        "kind": "enter",
        "pool": NODE_POOL[node.type],
        "attempt": 1,
        "recovery": bundles[first].tools[node.tool].recovery if isinstance(node, ToolNode) else "retry",
        "payload": {},
        "hints": 1,
        "hinted_at": run["created_at"],
    }
    gone = ("journal", "pause", "quarantine", "joins")
    born: dict[str, Any] = {name: value for name, value in run.items() if name not in gone}
    born |= {
        "workflow": {**run["workflow"], "hash": first}, "status": "running", "state": None, "steps": {START_STEP: step},
        "leases": {}, "receipts": {}, "usage": {}, "waste": {}, "events": [], "audit": genesis(run["_id"]),
        "cancel": None, "result": None, "error": None, "ended_at": None, "budget_nano_usd": None, "deadline_at": NEVER,
    }  # fmt: skip
    return cast("RunDoc", born)


def _entered(bundles: Mapping[str, Bundle], run: RunDoc, now: RunDoc, entry: Entry | None) -> RunDoc:
    """The run entered, if it is its first outcome that comes next, or if it was entered and had no outcome (None)."""
    stored = run["state"]
    if now["state"] is not None or stored is None or not stored["node"]:
        return now
    bundle = bundles[now["workflow"]["hash"]]
    if entry is None:
        visit = stored["visits"].get(bundle.workflow.start)
        return enter_run(bundle, now, START_STEP, stored["history"], visit["since_ms"] if visit else 0)
    if "entered_ms" not in entry:
        return now
    return enter_run(bundle, now, START_STEP, stored["history"], entry["entered_ms"])


def _apply(bundle: Bundle, run: RunDoc, entry: Entry) -> RunDoc:
    if "start" in entry:
        start = entry["start"]
        workflow = {**run["workflow"], "hash": start["hash"]}
        return {
            **run, "workflow": workflow, "state": start["state"], "steps": start["steps"], "status": "running",
            "ended_at": None, "result": None, "error": None,
        }  # fmt: skip
    if "stood_still_ms" in entry and run["state"] is not None:
        run = {**run, "state": shifted(run["state"], entry["stood_still_ms"])}
    if "step" not in entry:
        return run
    step_id = entry["step"]
    if step_id not in run["steps"]:
        raise Conflict(f"The journal of run {run['_id']} tells of step {step_id}, which was not open.", code=BROKEN)
    step: Step = {**run["steps"][step_id], "attempt": entry["attempt"], "forgiven": entry.get("forgiven", 0)}
    run = {**run, "steps": {**run["steps"], step_id: step}}
    endless = bundle.model_copy(update={"workflow": bundle.workflow.model_copy(update={"limits": _ENDLESS})})
    decision = advance(endless, run, step_id, outcome_of(entry), max_attempts=1)
    at = datetime.fromtimestamp(entry["at_ms"] / 1000, UTC)
    return plan(run, replace(decision, events=[]), now=at, step_id=step_id).after
