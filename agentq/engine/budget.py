"""Has a run, or an agent's visit, used up what it may? Pure arithmetic on what was spent."""

from __future__ import annotations

from schemas.catalog import AgentLimits, Bundle
from schemas.run import AgentVisit, RunDoc, Usage


def run_exhausted(bundle: Bundle, run: RunDoc, usage: Usage, at_ms: int) -> str | None:
    """The name of the first limit of the run that is reached, None if there is room for another step."""
    limits = bundle.workflow.limits
    cost_limit = round(limits.max_cost_usd * 1e9)
    if run["budget_nano_usd"] is not None:
        cost_limit = min(cost_limit, run["budget_nano_usd"])
    if usage.get("steps", 0) >= limits.max_steps:
        return "max_steps"
    if usage.get("input_tokens", 0) + usage.get("output_tokens", 0) >= limits.max_tokens:
        return "max_tokens"
    if usage.get("cost_nano_usd", 0) + run["waste"].get("cost_nano_usd", 0) >= cost_limit:
        return "max_cost_usd"
    if "pause" in run:  # since then the deadline has not come nearer
        at_ms = min(at_ms, int(run["pause"]["at"].timestamp() * 1000))
    if at_ms >= run["deadline_at"].timestamp() * 1000:
        return "max_wall_s"
    return None


def visit_exhausted(limits: AgentLimits, visit: AgentVisit, at_ms: int) -> str | None:
    """The name of the first limit of an agent's visit that is reached, None if it may take another turn."""
    if visit["turns"] >= limits.max_turns:
        return "agent max_turns"
    if visit["tokens"] >= limits.max_tokens:
        return "agent max_tokens"
    if visit["cost_nano_usd"] >= round(limits.max_cost_usd * 1e9):
        return "agent max_cost_usd"
    if at_ms - visit["since_ms"] >= limits.max_wall_s * 1000:
        return "agent max_wall_s"
    return None
