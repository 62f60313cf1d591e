"""What an operator decides about one run: redrive, retry, resolve, drop, pause, resume, and what a restore means. Pure.

Each gives a ``Decision`` that is committed on the condition that the run has not moved since it was read (``plan`` and
``Store.commit``), and tells of itself in the run's audit chain. Steps are opened with no hint published, so the
scheduler dispatches them at its next look. Raises ``Conflict`` where the run is not in a state that allows the act.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, cast

from agentq.engine import advance
from agentq.engine.budget import run_exhausted
from agentq.engine.commit import open_step
from agentq.engine.decision import Decision, Observed, Opening, event, paused, shifted
from agentq.engine.edits import Edits, budget, edited, target
from agentq.engine.replay import replay
from agentq.errors import Conflict, InvalidRequest, NotFound
from agentq.protocol import TERMINAL
from schemas.catalog import AgentNode, Bundle, RouteNode, ToolNode
from schemas.run import Entry, Quarantine, RunDoc, State, Step

UNKNOWN = "outcome_unknown"  # why a step is held whose effect may have happened
MAX_RESULT_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Redriven:
    """``bundle``: the version the run goes on with; to be kept in the store before the decision is committed."""

    decision: Decision
    bundle: Bundle


def redrive(bundles: Mapping[str, Bundle], run: RunDoc, edits: Edits, by: str, now: datetime) -> Redriven:
    """A failed run goes on where it failed. Finished steps stay finished; the others are open again, with attempts
    counted anew, but one that may have acted and must not act twice waits for a person. The deadline starts anew.

    A run that a limit stopped is decided again, from its last outcome, under the limits as they are now; ``run`` must
    have been loaded with its journal then.
    """
    kept = _redrivable(run)
    bundle = bundles[run["workflow"]["hash"]]
    new = edited(bundle, target(bundle, run, kept["step"]), edits)
    fields = budget(edits)
    deadline_at = now + timedelta(seconds=new.workflow.limits.max_wall_s)
    state, steps, usage = run["state"], kept["others"], run["usage"]
    if kept["step_id"] is not None and kept["step"] is not None:
        steps = {kept["step_id"]: _with_payload(kept["step"], edits), **steps}
    elif edits.payload is not None:
        raise InvalidRequest(
            "No tool call failed here.", code="invalid_edit", hint="Edit --limit, --model or --prompt."
        )
    if kept.get("after") is not None:
        before = replay(bundles, run, again=new)
        if not before["steps"]:
            raise _stops_again(run, kept)
        state, steps = before["state"], {key: kept["others"].get(key, step) for key, step in before["steps"].items()}
    if run_exhausted(new, cast("RunDoc", {**run, **fields, "deadline_at": deadline_at}), usage, _ms(now)):
        raise _stops_again(run, kept)
    if state is not None and run["ended_at"] is not None:
        state = shifted(state, _ms(now) - _ms(run["ended_at"]))
    opened = {key: _reopened(step, doubtful=key in kept["leased"]) for key, step in steps.items()}
    workflow = {**run["workflow"], "hash": new.hash}
    start: Entry = {
        "at_ms": _ms(now),
        "start": {
            "hash": new.hash, "was": bundle.hash, "state": state,
            "steps": {key: open_step(opening, now) for key, opening in opened.items()},
        },
    }  # fmt: skip
    told = event("run.redriven", _ms(now), kept["step_id"], by=by, code=kept["code"], edited=edits.told(),
                 steps=sorted(opened), workflow_hash=new.hash)  # fmt: skip
    ended: dict[str, Any] = {"ended_at": None, "result": None, "error": None, "cancel": None}
    return Redriven(
        Decision(
            [told], state=state, opened=opened, status="running", entry=start,
            drops=("quarantine", "pause"),
            fields={**ended, **fields, "deadline_at": deadline_at, "workflow": workflow},
        ),
        new,
    )  # fmt: skip


def _redrivable(run: RunDoc) -> Quarantine:
    kept = run.get("quarantine")
    if run["status"] != "failed" or kept is None:
        raise Conflict(
            f"Run {run['_id']} has {run['status']}; there is nothing to redrive.",
            hint="'agentq dlq list' shows what is.",
        )
    if not kept["others"] and kept["step_id"] is None and kept.get("after") is None:
        raise Conflict(f"Run {run['_id']} kept no open step.", hint="Submit its request again.")
    return kept


def _stops_again(run: RunDoc, kept: Quarantine) -> Conflict:
    return Conflict(
        f"Run {run['_id']} would stop again at once: {kept['message']}",
        code="still_exhausted",
        hint=f"Raise that limit: agentq dlq edit {run['_id']} --limit NAME=VALUE.",
    )


def _with_payload(step: Step, edits: Edits) -> Step:
    if edits.payload is None:
        return step
    if step["kind"] != "tool":
        raise InvalidRequest(
            f"The step is a {step['kind']}, it has no arguments.",
            code="invalid_edit",
            hint="Use --prompt-file or --model.",
        )
    return {**step, "payload": {**step["payload"], "arguments": edits.payload}}


def _reopened(step: Step, *, doubtful: bool) -> Opening:
    """An open step of a failed run, open again. ``doubtful``: it was being worked on when the run failed."""
    if "held" in step:
        return _opening(step, step["attempt"], held=step["held"])
    if doubtful and step["recovery"] == "unsafe":
        return _opening(step, step["attempt"], held=UNKNOWN)
    return _opening(step, step["attempt"] + 1, forgiven=step["attempt"])


def _opening(step: Step, attempt: int, *, held: str | None = None, forgiven: int | None = None) -> Opening:
    return Opening(
        step["kind"], step["pool"], step.get("node", ""), step["recovery"], step["payload"], attempt, held=held,
        hints=0, forgiven=step.get("forgiven", 0) if forgiven is None else forgiven,
    )  # fmt: skip


# -- steps that wait for a person -----------------------------------------------------------------------------------


def held_steps(run: RunDoc) -> list[str]:
    """The steps of a live run of which nobody knows whether they took effect."""
    return sorted(key for key, step in run["steps"].items() if step.get("held") == UNKNOWN)


def retry_held(run: RunDoc, by: str, now: datetime, step_id: str | None = None) -> Decision:
    """It did not happen: do it again. All such steps of the run, or one."""
    steps = _held(run, step_id)
    opened = {
        key: _opening(run["steps"][key], run["steps"][key]["attempt"] + 1, forgiven=run["steps"][key]["attempt"])
        for key in steps
    }
    events = [event("step.released", _ms(now), key, by=by, decision="retry") for key in steps]
    return Decision(events, state=run["state"], opened=opened, status="running")


def resolve_held(bundle: Bundle, run: RunDoc, step_id: str | None, text: str, by: str, now: datetime) -> Decision:
    """It happened; ``text`` is what the model shall see of it, as if the tool had said it."""
    steps = _held(run, step_id)
    if len(steps) > 1:
        raise Conflict(f"Run {run['_id']} has several held steps.", hint=f"Name one with --step: {', '.join(steps)}.")
    if len(text.encode()) > MAX_RESULT_BYTES:
        raise InvalidRequest(
            "The result is too long.", code="result_too_long", hint=f"{MAX_RESULT_BYTES} bytes are allowed."
        )
    told = event("step.released", _ms(now), steps[0], by=by, decision="resolve")
    seen = Observed(True, "resolved", text, False, 0, _ms(now))
    decision = advance.advance(bundle, run, steps[0], seen, max_attempts=1)
    opened = {key: replace(opening, hints=0) for key, opening in decision.opened.items()}
    return replace(decision, events=[told, *decision.events], opened=opened)


def _held(run: RunDoc, step_id: str | None) -> list[str]:
    steps = held_steps(run)
    if not steps:
        raise Conflict(
            f"Run {run['_id']} has no held step; it is {run['status']}.", hint="'agentq dlq list' shows some."
        )
    if step_id is None:
        return steps
    if step_id not in steps:
        raise NotFound(f"Step {step_id!r} of run {run['_id']} is not held.", hint=f"Held are {', '.join(steps)}.")
    return [step_id]


def drop(run: RunDoc, by: str, reason: str, now: datetime) -> Decision:
    """Nothing more is to be done: a live run is cancelled, a failed or rejected one is not listed any more."""
    at_ms = _ms(now)
    if run["status"] not in TERMINAL:
        wish = {"reason": reason or f"dropped by {by}", "at": now}
        told = event("run.dropped", at_ms, by=by, reason=reason)
        ended = advance.cancel(cast("RunDoc", {**run, "cancel": wish}), at_ms)
        return replace(ended, events=[told, *ended.events], fields={"cancel": wish})
    for name in ("quarantine", "refused"):
        kept = cast("dict[str, Any]", run).get(name)
        if kept is not None and "dropped" not in kept and "run" not in kept:
            told = event("run.dropped", at_ms, by=by, reason=reason)
            return Decision([told], fields={name: {**kept, "dropped": now}})
    raise Conflict(f"Run {run['_id']} has {run['status']}; there is nothing to drop.")


def handed_in_again(run: RunDoc, new_run_id: str, by: str, now: datetime, *, edited: bool) -> Decision:
    """A refused request has become a run."""
    if "refused" not in run:
        raise Conflict(f"Run {run['_id']} is no refused request.")
    told = event("run.handed_in_again", _ms(now), by=by, run=new_run_id, edited=edited)
    return Decision([told], fields={"refused": {**run["refused"], "run": new_run_id}})


# -- pause and resume -----------------------------------------------------------------------------------------------


def pause(run: RunDoc, reason: str, by: str, now: datetime) -> Decision:
    """No step of the run starts any more. What is being worked on is finished and kept; the deadline waits."""
    if run["status"] in TERMINAL:
        raise Conflict(f"Run {run['_id']} has {run['status']}.", hint="There is nothing to pause.")
    if paused(run):
        raise Conflict(f"Run {run['_id']} is paused already.", hint=f"Go on with: agentq resume {run['_id']}")
    told = event("run.paused", _ms(now), by=by, reason=reason)
    return Decision([told], state=run["state"], status="paused", fields={"pause": {"reason": reason, "at": now}})


def resume(run: RunDoc, by: str, now: datetime) -> Decision:
    """The run goes on: its open steps are dispatched at once, its deadline is as far away as it was."""
    if not paused(run):
        raise Conflict(f"Run {run['_id']} is not paused; it is {run['status']}.", hint="There is nothing to resume.")
    stood_still = max(now - run["pause"]["at"], timedelta(0))
    ms = stood_still // timedelta(milliseconds=1)
    opened = {
        key: _opening(step, step["attempt"])
        for key, step in run["steps"].items()
        if key not in run["leases"] and "held" not in step and "not_before" not in step and not _queued(run)
    }
    entry: Entry = {"at_ms": _ms(now), "stood_still_ms": ms}
    told = event("run.resumed", _ms(now), by=by, paused_ms=ms)
    state = None if run["state"] is None else shifted(run["state"], ms)
    return Decision(
        [told], state=state, opened=opened, status="queued" if _queued(run) else "running", entry=entry,
        drops=("pause",), fields={"deadline_at": run["deadline_at"] + stood_still},
    )  # fmt: skip


# -- after a restore from a backup ----------------------------------------------------------------------------------


def after_restore(bundle: Bundle, run: RunDoc, by: str, now: datetime, *, release: bool) -> Decision | None:
    """What a live run may do after the database has gone back in time: None if there is nothing to settle.

    Every step that is open in the backup may have been done since it was taken. Unsafe ones wait for a person, others
    are tried again with their key; leases are gone. A run that can still come to an unsafe tool may have used it since,
    in steps that are not there any more: it is paused, unless ``release``.
    """
    if run["cancel"] is not None:  # the scheduler ends it
        return None
    open_now = {key: step for key, step in run["steps"].items() if "held" not in step and not _queued(run)}
    unsafe = [key for key, step in open_now.items() if step["recovery"] == "unsafe"]
    stop = not release and not paused(run) and may_act(bundle, run)
    if not open_now and not stop:
        return None
    opened = {
        key: _opening(step, step["attempt"], held=UNKNOWN)
        if key in unsafe
        else _opening(step, step["attempt"] + 1, forgiven=step["attempt"])
        for key, step in open_now.items()
    }
    events = [event("run.restored", _ms(now), by=by, steps=sorted(opened), held=sorted(unsafe), paused=stop)]
    events += [event("step.held", _ms(now), key, reason=UNKNOWN) for key in sorted(unsafe)]
    fields = {"pause": {"reason": "restored", "at": now}} if stop else {}
    status = "paused" if stop else None if _queued(run) else "running"
    waited = ("joins",) if "joins" in run else ()  # nobody knows any more what a provider has of it
    return Decision(events, state=run["state"], opened=opened, status=status, fields=fields, drops=waited)


def may_act(bundle: Bundle, run: RunDoc) -> bool:
    """Can the run, from where it is, still come to a tool that must not be called twice?"""
    state, workflow = run["state"], bundle.workflow
    ahead = [workflow.start if state is None or not state["node"] else state["node"]]
    reached: set[str] = set()
    while ahead:
        name = ahead.pop()
        if name in workflow.nodes and name not in reached:
            reached.add(name)
            node = workflow.nodes[name]
            ahead += [edge for edge in (node.next, getattr(node, "revise", None)) if edge is not None]
    tools = {tool for name in reached for tool in _tools_at(bundle, state, reached, name)}
    return any(bundle.tools[tool].recovery == "unsafe" for tool in tools if tool in bundle.tools)


def _tools_at(bundle: Bundle, state: State | None, reached: set[str], name: str) -> list[str]:
    nodes = bundle.workflow.nodes
    node = nodes[name]
    if isinstance(node, ToolNode):
        return [node.tool]
    if not isinstance(node, AgentNode):
        return []
    agents = [node.agent]
    if node.agent == "$route":
        routes = [nodes[one] for one in reached if isinstance(nodes[one], RouteNode)]
        agents = [agent for route in routes if isinstance(route, RouteNode) for agent in route.agents]
        agents += [state["route"]] if state is not None and state["route"] is not None else []
    return [tool for agent in agents if agent in bundle.agents for tool in bundle.agents[agent].tools]


def _queued(run: RunDoc) -> bool:
    """Does the run still wait for its admission? Then nobody is to be told of its first step."""
    return "backlog" in run


def _ms(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)
