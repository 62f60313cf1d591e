"""Before a batch: how many lines are good, and what it will take. Nothing is stored."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import BinaryIO

from agentq.batch.estimate import CHARS_A_TOKEN, History
from agentq.batch.lines import Bad, Defaults
from agentq.batch.submit import Ids, lines_of

BAD_LINES_SHOWN = 10


@dataclass(slots=True)
class Checked:
    """A file, line by line. ``first_bad``: the first BAD_LINES_SHOWN of ``bad``; ``input_chars`` by workflow."""

    good: int = 0
    bad: int = 0
    first_bad: list[Bad] = field(default_factory=list)
    workflows: Counter[str] = field(default_factory=Counter)
    input_chars: Counter[str] = field(default_factory=Counter)


def check(file: BinaryIO, defaults: Defaults) -> Checked:
    """Read the file from its start. Streams: memory does not grow with it."""
    found, ids = Checked(), Ids()
    file.seek(0)
    try:
        for line in lines_of(file, defaults, ids):
            if isinstance(line, Bad):
                found.bad += 1
                if found.bad <= BAD_LINES_SHOWN:
                    found.first_bad.append(line)
                continue
            found.good += 1
            found.workflows[line.request.workflow] += 1
            found.input_chars[line.request.workflow] += len(line.request.input)
    finally:
        ids.close()
    return found


@dataclass(frozen=True, slots=True)
class Forecast:
    """What the good lines of one workflow will take. Money in nano-dollars for all of them: ``low`` if each costs the
    median of the earlier runs, ``high`` if each costs what nine of ten stayed below. Without ``history`` only the
    tokens of the input are known."""

    workflow: str
    lines: int
    history: History | None
    input_tokens: int
    output_tokens: int | None
    low: int | None
    expected: int | None
    high: int | None
    seconds: float | None


def forecast(workflow: str, checked: Checked, history: History | None) -> Forecast:
    """``seconds`` at the best rate that these runs ended at; one after the other where too few are known."""
    count = checked.workflows[workflow]
    if history is None:
        tokens = checked.input_chars[workflow] // CHARS_A_TOKEN
        return Forecast(workflow, count, None, tokens, None, None, None, None, None)
    return Forecast(
        workflow,
        count,
        history,
        round(count * history.input_tokens),
        round(count * history.output_tokens),
        count * history.cost_p50,
        round(count * history.cost_mean),
        count * history.cost_p90,
        count / history.rate if history.rate else count * history.seconds_p50,
    )
