"""What an operator may change about one run before it goes on: arguments, instructions, model, limits. Pure.

A changed bundle is a new version under its own hash; only the run that it was made for is pinned to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from agentq.canonical import canonical_json, sha256
from agentq.errors import InvalidRequest
from schemas.catalog import AgentLimits, AgentNode, Bundle, ModelSpec, RunLimits, ToolNode
from schemas.run import RunDoc, Step

BUDGET = "budget_usd"  # the request's own limit; the other names are the workflow's and the agent's
_RUN = set(RunLimits.model_fields) - {"history_tokens"}
_AGENT = set(AgentLimits.model_fields)


@dataclass(frozen=True, slots=True)
class Edits:
    """``payload``: a tool step's arguments; ``prompt``: the instructions of the step's agent or node; ``model``: the
    name of another model for it; ``agent``: another agent takes the step; ``limits``: by name (``max_steps``,
    ``agent.max_tokens``, ``budget_usd``; ``agent.`` may be left out where only agents have it), value as written.

    ``models``: what ``model`` may name besides the bundle's own.
    """

    payload: dict[str, Any] | None = None
    prompt: str | None = None
    model: str | None = None
    agent: str | None = None
    limits: Mapping[str, str | float] = field(default_factory=dict)
    models: Mapping[str, ModelSpec] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """What was edited, for the audit trail: names, numbers and hashes, never text."""
        told: dict[str, Any] = {}
        if self.payload is not None:
            told["payload_sha256"] = sha256(canonical_json(self.payload))
        if self.prompt is not None:
            told["prompt_sha256"] = sha256(self.prompt)
        if self.model is not None:
            told["model"] = self.model
        if self.agent is not None:
            told["agent"] = self.agent
        if self.limits:
            told["limits"] = {name: str(value) for name, value in sorted(self.limits.items())}
        return told


@dataclass(frozen=True, slots=True)
class Target:
    """Whose instructions, model and limits an edit of a step changes: an agent's, or else its node's."""

    node: str
    agent: str | None


def target(bundle: Bundle, run: RunDoc, step: Step | None) -> Target:
    """Of a step, or (None) of the node at which the run is."""
    state = run["state"]
    at = bundle.workflow.start if state is None or not state["node"] else state["node"]
    name = at if step is None else step.get("node") or at
    node = bundle.workflow.nodes[name]
    if not isinstance(node, AgentNode):
        return Target(name, None)
    if state is not None and name in state["visits"]:
        return Target(name, state["visits"][name]["agent"])
    return Target(name, node.agent if node.agent in bundle.agents else None)


def editable(bundle: Bundle, run: RunDoc, step: Step | None) -> dict[str, Any]:
    """What ``Edits`` can change here, by their names, with the present values; ``limits`` with the names to use."""
    of = target(bundle, run, step)
    found: dict[str, Any] = {}
    if step is not None and step["kind"] == "tool":
        found["payload"] = step["payload"]["arguments"]
    spec: Any = bundle.workflow.nodes[of.node] if of.agent is None else bundle.agents[of.agent]
    if not isinstance(spec, ToolNode) and "payload" not in found:
        found |= {"prompt": spec.instructions, "model": spec.model}
    limits = bundle.workflow.limits
    found["limits"] = {f"run.{name}": getattr(limits, name) for name in RunLimits.model_fields if name in _RUN}
    if of.agent is not None:
        own = bundle.agents[of.agent].limits
        found["limits"] |= {f"agent.{name}": getattr(own, name) for name in AgentLimits.model_fields}
    if run["budget_nano_usd"] is not None:
        found["limits"][BUDGET] = run["budget_nano_usd"] / 1e9
    return found


def edited(bundle: Bundle, of: Target, edits: Edits) -> Bundle:
    """The bundle with the edits in it, itself if they change nothing of it. Raises ``InvalidRequest``."""
    if edits.prompt is None and edits.model is None and not set(edits.limits) - {BUDGET}:
        return bundle
    data = bundle.model_dump(mode="json")
    node = data["workflow"]["nodes"][of.node]
    spec = data["agents"][of.agent] if of.agent is not None else node
    if edits.model is not None:
        _refuse_tool(bundle, of, "model")
        models = {**{name: one.model_dump(mode="json") for name, one in edits.models.items()}, **data["models"]}
        if edits.model not in models:
            raise _wrong(f"There is no model {edits.model!r}.", f"Known are {', '.join(sorted(models))}.")
        spec["model"] = edits.model
        data["models"][edits.model] = models[edits.model]
    if edits.prompt is not None:
        _refuse_tool(bundle, of, "prompt")
        spec["instructions"] = edits.prompt
    for name, value in edits.limits.items():
        if name != BUDGET:
            _set_limit(data, of, name, value)
    try:
        return Bundle.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _wrong(f"{where}: {first['msg']}.", "Correct the value.") from None


def _refuse_tool(bundle: Bundle, of: Target, what: str) -> None:
    if isinstance(bundle.workflow.nodes[of.node], ToolNode):
        raise _wrong(
            f"Node {of.node!r} calls a tool; it has no {what}.", "Edit the arguments: --set payload.NAME=VALUE."
        )


def _set_limit(data: dict[str, Any], of: Target, name: str, value: str | float) -> None:
    scope, _, key = name.rpartition(".")
    if scope in ("", "run") and key in _RUN:
        data["workflow"]["limits"][key] = value
    elif scope in ("", "agent") and key in _AGENT:
        if of.agent is None:
            raise _wrong(f"Node {of.node!r} is no agent's; it has no {key}.", f"Known are {', '.join(sorted(_RUN))}.")
        data["agents"][of.agent]["limits"][key] = value
    else:
        known = [*sorted(_RUN), *(f"agent.{one}" for one in sorted(_AGENT)), BUDGET]
        raise _wrong(f"There is no limit {name!r}.", f"Known are {', '.join(known)}.")


def budget(edits: Edits) -> dict[str, Any]:
    """The request's own budget as fields of the run, where it is edited."""
    if BUDGET not in edits.limits:
        return {}
    try:
        dollars = float(edits.limits[BUDGET])
    except ValueError:
        dollars = -1.0
    if not 0 < dollars <= 1_000_000:
        raise _wrong(f"{BUDGET} is no amount of dollars.", f"Write {BUDGET}=0.50, for example.")
    return {"budget_nano_usd": round(dollars * 1e9)}


def _wrong(message: str, hint: str) -> InvalidRequest:
    return InvalidRequest(message, code="invalid_edit", hint=hint)
