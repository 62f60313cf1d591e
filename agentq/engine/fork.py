"""A new run from the middle of another: the state before one of its steps, with other instructions, models or limits.
Pure. The original is only read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, cast

from agentq.engine.decision import event, shifted, state_of
from agentq.engine.edits import Edits, budget, edited, target
from agentq.engine.replay import replay
from agentq.errors import Conflict, InvalidRequest
from agentq.event import chain, genesis
from agentq.run import RUN_FORMAT, UNKNOWN_COST
from schemas.catalog import Bundle
from schemas.run import RunDoc, State, Step

_SHARED = ("tenant", "user", "priority", "input", "metadata", "fingerprint", "budget_nano_usd")


@dataclass(frozen=True, slots=True)
class Forked:
    """``bundle`` is to be kept in the store before ``run`` is recorded. ``tools``: what is called again at once."""

    run: RunDoc
    bundle: Bundle
    tools: list[str]


def fork(
    bundles: Mapping[str, Bundle], run: RunDoc, step_id: str, edits: Edits, *, run_id: str, by: str, now: datetime
) -> Forked:
    """The run ``run_id``: as ``run`` (loaded with its journal) was before the first outcome of ``step_id``.

    It has its own usage, from zero, and its own keys, so tools from that step on act again. It sees the conversation
    as its original did, and is no turn of it. Raises ``NotFound``, ``Conflict``, ``InvalidRequest``.
    """
    before = replay(bundles, run, step_id)
    if before["state"] is None:
        raise Conflict(f"Run {run['_id']} has not begun yet.", hint="Submit its request again instead.")
    bundle = bundles[before["workflow"]["hash"]]
    if edits.agent is not None:
        bundle, before = _with_agent(bundle, before, step_id, edits.agent)
    new = edited(bundle, target(bundle, before, before["steps"][step_id]), edits)
    state = shifted(state_of(before), _ms(now) - _then_ms(run, step_id))
    steps: dict[str, Step] = {key: _fresh(step, now) for key, step in before["steps"].items()}
    told = event(
        "run.forked", _ms(now), None, by=by, run=run["_id"], from_step=step_id, edited=edits.told(),
        workflow=run["workflow"]["name"], workflow_hash=new.hash, tenant=run["tenant"], user=run["user"],
        fingerprint=run["fingerprint"],
    )  # fmt: skip
    events, head = chain(run_id, genesis(run_id), [told])
    start = {"at_ms": _ms(now), "start": {"hash": new.hash, "was": None, "state": state, "steps": steps}}
    doc: dict[str, Any] = {
        "_id": run_id, "v": RUN_FORMAT, **{name: run[name] for name in _SHARED},  # type: ignore[literal-required]
        "conversation": None, "turn": None, "workflow": {"name": run["workflow"]["name"], "hash": new.hash},
        "deadline_at": now + timedelta(seconds=new.workflow.limits.max_wall_s), "status": "running", "rev": 0,
        "state": state, "steps": steps, "leases": {}, "receipts": {}, "events": events, "audit": head, "usage": {},
        "waste": {}, "next_due": now, "created_at": now, "ended_at": None, "result": None, "error": None,
        "cancel": None, "reply": None, "journal": [start], "forked_from": {"run": run["_id"], "step": step_id},
        "flow": run.get("flow", run["tenant"]), "pool": steps[step_id]["pool"], "cost": run.get("cost", UNKNOWN_COST),
        "in_flight": True,
    }  # fmt: skip
    doc |= budget(edits)
    tools = [step["payload"]["name"] for step in steps.values() if step["kind"] == "tool"]
    return Forked(cast("RunDoc", doc), new, tools)


def _with_agent(bundle: Bundle, run: RunDoc, step_id: str, agent: str) -> tuple[Bundle, RunDoc]:
    """Another agent goes on with the visit: what was said and done in it so far stays."""
    state, node = state_of(run), run["steps"][step_id].get("node", "")
    if run["steps"][step_id]["kind"] != "turn":
        raise InvalidRequest(
            f"Step {step_id} is no agent's turn.", code="invalid_edit", hint="--agent goes with a step of kind turn."
        )
    if agent not in bundle.agents:
        known = ", ".join(sorted(bundle.agents))
        raise InvalidRequest(f"There is no agent {agent!r}.", code="invalid_edit", hint=f"Known are {known}.")
    visit = {**state["visits"][node], "agent": agent}
    changed = cast("State", {**state, "visits": {**state["visits"], node: visit}})
    return bundle, {**run, "state": changed}


def _fresh(step: Step, now: datetime) -> Step:
    fresh: Step = {
        "kind": step["kind"], "pool": step["pool"], "attempt": 1, "recovery": step["recovery"],
        "payload": step["payload"], "hints": 0, "hinted_at": now,
    }  # fmt: skip
    if "node" in step:
        fresh["node"] = step["node"]
    return fresh


def _then_ms(run: RunDoc, step_id: str) -> int:
    """When the state was as it is before the first outcome of the step."""
    then = int(run["created_at"].timestamp() * 1000)
    for entry in run.get("journal", []):
        if entry.get("step") == step_id:
            break
        then = entry["at_ms"]
    return then


def _ms(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)
