"""What ended runs and bad lines add to their batch: counted once, and in nano-dollars exactly. Pure.

A run keeps what has been counted of it (``run["booked"]``: how it ended, usage and waste), so what comes later (the
cost of a call that a lost worker paid, another end after a redrive) adds the difference, and nothing twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from schemas.batch import CANCELLED, EXPIRED, BadLine, BatchDoc, LineEnd

AT_FIRST = 16  # lines that start on the word of earlier runs alone
USAGE = ("steps", "llm_calls", "tool_calls", "input_tokens", "output_tokens")


@dataclass(slots=True)
class Tally:
    """What one transaction adds to one batch. ``lines``: those that have ended and were never counted before."""

    lines: list[int] = field(default_factory=list)
    added: dict[str, int] = field(default_factory=dict)  # paths of the batch document and what they grow by
    max_line_nano_usd: int = 0

    def add(self, path: str, amount: int) -> None:
        if amount:
            self.added[path] = self.added.get(path, 0) + amount


def line_end(run: Mapping[str, Any]) -> LineEnd | None:
    """How a line's run ended, None while it has not."""
    match run["status"]:
        case "succeeded":
            return "succeeded"
        case "cancelled":
            return "expired" if EXPIRED in (cancel_reason(run), _error_code(run)) else "cancelled"
        case "failed" | "rejected":
            return "failed"
    return None


def cancel_reason(run: Mapping[str, Any]) -> str:
    """What a cancelled run was cancelled for."""
    return str((run["cancel"] or {}).get("reason", ""))


def _error_code(run: Mapping[str, Any]) -> str | None:
    return (run.get("error") or {}).get("code")


def line_error(run: Mapping[str, Any]) -> dict[str, Any]:
    """The error of a line that has not succeeded: the run's own, or that its batch ended before it did."""
    reason = cancel_reason(run)
    if run["status"] == "cancelled" and reason in (EXPIRED, CANCELLED):
        return batch_error(reason)
    return dict(run["error"] or {"code": run["status"], "message": f"The run {run['status']}.", "hint": ""})


def batch_error(code: str) -> dict[str, Any]:
    """The error of a line whose batch ended before it did."""
    said = {EXPIRED: "The batch's window closed before this line was done.", CANCELLED: "The batch was cancelled."}
    return {"code": code, "message": said[code], "hint": "'agentq batch retry' hands it in again."}


def spent(run: Mapping[str, Any]) -> int:
    """All that a run cost, in nano-dollars: its own calls, and those whose answers were lost."""
    return int(run["usage"].get("cost_nano_usd", 0) + run["waste"].get("cost_nano_usd", 0))


def tally(runs: Iterable[Mapping[str, Any]], bad: Iterable[BadLine]) -> dict[str, Tally]:
    """What runs and bad lines add to their batches, by batch id."""
    batches: dict[str, Tally] = {}
    for run in runs:
        _add_run(batches.setdefault(run["batch"]["id"], Tally()), run, run.get("booked") or _NOTHING)
    for line in bad:
        one = batches.setdefault(line["batch"], Tally())
        one.add("counts.bad", 1)
        one.lines.append(line["line"])
    for one in batches.values():
        one.lines.sort()
    return batches


_NOTHING: Mapping[str, Any] = {"end": None, "usage": {}, "waste": {}}


def _add_run(one: Tally, run: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    was, end = before["end"], line_end(run) or before["end"]
    if end is not None and end != was:
        one.add(f"counts.{end}", 1)
        if was is None:
            one.lines.append(run["batch"]["line"])
        else:
            one.add(f"counts.{was}", -1)
    one.add("cost_nano_usd", spent(run) - spent(before))
    one.add("waste_nano_usd", run["waste"].get("cost_nano_usd", 0) - before["waste"].get("cost_nano_usd", 0))
    one.add("usage.lost_llm_calls", run["waste"].get("lost_llm_calls", 0) - before["waste"].get("lost_llm_calls", 0))
    for name in USAGE:
        one.add(f"usage.{name}", run["usage"].get(name, 0) - before["usage"].get(name, 0))
    one.max_line_nano_usd = max(one.max_line_nano_usd, spent(run))


def lost_estimate(batch: BatchDoc) -> int:
    """What the model calls that died with their workers may have cost, in nano-dollars, on the average of the calls of
    the batch. Nobody can know whether they were paid, so this is in no cost. Some may have been heard of after all, and
    some never reached the provider: it is rather too much than too little."""
    usage = batch["usage"]
    calls, lost = usage.get("llm_calls", 0), usage.get("lost_llm_calls", 0)
    return -(-lost * (batch["cost_nano_usd"] - batch["waste_nano_usd"]) // calls) if calls else 0


def line_estimate(batch: BatchDoc) -> int | None:
    """What to set aside for one line, in nano-dollars: the most a line of this batch has cost, and what nine of ten
    earlier runs stayed below. None: nobody knows yet."""
    known = [batch["max_line_nano_usd"]] if batch["entries"] > batch["counts"]["bad"] else []
    known += [batch["estimate"]["p90_nano_usd"]] if batch["estimate"] else []
    return max(known, default=None)


def slots(batch: BatchDoc, under_way: int) -> int | None:
    """How many more lines of a batch may be admitted now; None: as many as the pools have room for.

    ``under_way``: lines admitted whose cost is not booked yet. Within a budget, what is booked, what is set aside for
    those under way and for every further line stays below it. Where nobody knows what a line costs, one goes first. An
    estimate may be wrong, so no more are under way than have ended, and a few; but for lines that may wait for a
    provider's job: a small one takes as long as a large one.
    """
    if batch["status"] != "in_progress" or batch["paused"] is not None:
        return 0
    if batch["budget_nano_usd"] is None:
        return None
    left, each = batch["budget_nano_usd"] - batch["cost_nano_usd"], line_estimate(batch)
    if left <= 0:
        return 0
    if each is None:
        return max(0, 1 - under_way)
    learned = batch["entries"] - batch["counts"]["bad"] + (AT_FIRST if batch["estimate"] else 1)
    affordable = left // each if each else left
    return max(0, (affordable if _may_wait(batch) else min(affordable, learned)) - under_way)


def _may_wait(batch: BatchDoc) -> bool:
    return batch["complete_by"] is not None and not batch.get("live_only")
