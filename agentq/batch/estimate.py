"""What a batch will cost and how long it will take, from what earlier runs of its workflow did. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from agentq.engine.tally import spent
from schemas.batch import BatchDoc, Estimate

MANY = 80
CHARS_A_TOKEN = 4  # of English prose; only used for what has no history


@dataclass(frozen=True, slots=True)
class History:
    """Earlier runs, summed up. Money in nano-dollars a run; ``rate``: the most runs a second that have ended over a
    quarter of them; of fewer than MANY runs all together, with the time of the first; None from a single run."""

    runs: int
    cost_p50: int
    cost_p90: int
    cost_mean: float
    input_tokens: float
    output_tokens: float
    seconds_p50: float
    rate: float | None

    def as_estimate(self) -> Estimate:
        return {"runs": self.runs, "p50_nano_usd": self.cost_p50, "p90_nano_usd": self.cost_p90}


def history(runs: Sequence[Mapping[str, Any]]) -> History | None:
    """``runs``: usage, waste, created_at and ended_at of runs that succeeded; None where there are none."""
    if not runs:
        return None
    costs = sorted(spent(run) for run in runs)
    seconds = sorted((run["ended_at"] - run["created_at"]).total_seconds() for run in runs)
    return History(
        runs=len(runs),
        cost_p50=quantile(costs, 0.5),
        cost_p90=quantile(costs, 0.9),
        cost_mean=sum(costs) / len(costs),
        input_tokens=sum(run["usage"].get("input_tokens", 0) for run in runs) / len(runs),
        output_tokens=sum(run["usage"].get("output_tokens", 0) for run in runs) / len(runs),
        seconds_p50=quantile(seconds, 0.5),
        rate=_rate(runs),
    )


def dearest(estimates: Collection[Estimate | None]) -> Estimate | None:
    """What to set aside for a line of any of these workflows; None where nothing is known of one of them."""
    known = [one for one in estimates if one is not None]
    return max(known, key=lambda one: one["p90_nano_usd"]) if known and len(known) == len(estimates) else None


def quantile(ordered: Sequence[Any], share: float) -> Any:
    """The smallest value that ``share`` of all do not exceed."""
    return ordered[max(0, -(-int(len(ordered) * share * 1000) // 1000) - 1)]


def _rate(runs: Sequence[Mapping[str, Any]]) -> float | None:
    ends: list[float] = sorted(run["ended_at"].timestamp() for run in runs)
    if len(ends) < MANY:
        began: float = min(run["created_at"].timestamp() for run in runs)
        return len(ends) / max(ends[-1] - began, 0.001) if len(ends) > 1 else None
    stretch = len(ends) // 4
    shortest = min(last - first for first, last in zip(ends, ends[stretch:], strict=False))
    return stretch / max(shortest, 0.001)


@dataclass(frozen=True, slots=True)
class Forecast:
    """How a live batch will end if it goes on as it has. Money in nano-dollars; None where nothing can be said yet."""

    rate: float | None
    cost: int | None
    seconds_left: float | None


def forecast(batch: BatchDoc, now: datetime, rate: float | None = None) -> Forecast:
    """``rate``: lines a second of late; by default since the batch began."""
    done, total, began = batch["entries"], batch["total"], batch["at"].get("in_progress")
    if rate is None and began is not None and now > began and done:
        rate = done / (now - began).total_seconds()
    ran = done - batch["counts"]["bad"]
    cost = None
    if ran > 0:
        waiting = batch["submitted"]["good"] - ran
        cost = batch["cost_nano_usd"] + round(batch["cost_nano_usd"] / ran * waiting)
    left = (total - done) / rate if rate and total is not None else None
    return Forecast(rate, cost, left)
