"""Compares finished runs with what was expected of them: ``python -m examples.support_desk.scorecard``.

Without arguments it scores the runs of the last demo. Exit code 0 if every expectation is met, 1 if not.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field
from pymongo.database import Database
from rich.console import Console
from rich.table import Table

from agentq.client import Client, Outcome
from config.settings import load_settings
from examples.support_desk.desk import Doc, database

REQUESTS = Path(__file__).with_name("requests.yaml")
TOOLS = frozenset({"search_knowledge_base", "get_order_status", "process_refund", "create_ticket", "update_ticket"})
DEMO_RUNS = "demo_runs"  # the collection in which the demo notes which run belongs to which request


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DatabaseExpectation(_Strict):
    """What the desk's database must hold: how many documents match, and fields of the newest of them."""

    collection: str
    filter: dict[str, Any]
    count: int = Field(ge=0)
    fields: dict[str, Any] = {}


class Expectation(_Strict):
    """What is right for a request; see the head of requests.yaml."""

    specialist: str | list[str]
    tools: list[str] | None = None
    tools_include: list[str] = []
    facts: list[str] = []
    forbidden: list[str] = []
    citations: list[str] = []
    database: list[DatabaseExpectation] = []
    status: str = "succeeded"
    acceptance: str | None = "critic"

    @property
    def specialists(self) -> list[str]:
        return [self.specialist] if isinstance(self.specialist, str) else self.specialist


class DeskRequest(_Strict):
    """A customer's message, who wrote it, and what must come of it."""

    id: str
    text: str
    user: str | None = None
    conversation: str | None = None
    expect: Expectation


def load_requests(path: Path = REQUESTS) -> list[DeskRequest]:
    """The requests of the file. Raises pydantic's ValidationError on unknown keys, ValueError on a repeated id."""
    found = [
        DeskRequest.model_validate(entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))["requests"]
    ]
    repeated = {request.id for request in found if sum(other.id == request.id for other in found) > 1}
    if repeated:
        raise ValueError(f"{path.name}: repeated ids {sorted(repeated)}")
    return found


def faults(request: DeskRequest, outcome: Outcome, db: Database[Doc]) -> list[str]:
    """Every expectation that a finished run does not meet, in words; empty if all are met."""
    return [*outcome_faults(request.expect, outcome), *_database_faults(request.expect, outcome, db)]


def outcome_faults(expect: Expectation, outcome: Outcome) -> list[str]:
    """What is wrong with the run's outcome itself. Pure."""
    answer, called = outcome.answer or "", set(outcome.tools) & TOOLS  # a model may name tools that do not exist
    found: list[str] = []
    if outcome.status != expect.status:
        found.append(f"status is {outcome.status}, not {expect.status}")
    if outcome.agent not in expect.specialists:
        found.append(f"answered by {outcome.agent}, not by {' or '.join(expect.specialists)}")
    if expect.acceptance and outcome.acceptance != expect.acceptance:
        found.append(f"accepted by {outcome.acceptance}, not by {expect.acceptance}")
    if expect.tools is not None and called != set(expect.tools):
        found.append(f"called {sorted(called) or 'no tool'}, not {sorted(expect.tools) or 'no tool'}")
    found += [f"did not call {name}" for name in expect.tools_include if name not in called]
    found += [f"does not say /{fact}/" for fact in expect.facts if not re.search(fact, answer)]
    found += [f"says /{wrong}/" for wrong in expect.forbidden if re.search(wrong, answer)]
    found += [f"does not cite {name}" for name in expect.citations if name not in outcome.citations]
    return found


def _database_faults(expect: Expectation, outcome: Outcome, db: Database[Doc]) -> list[str]:
    found: list[str] = []
    for wanted in expect.database:
        condition = {key: outcome.run_id if value == "$run" else value for key, value in wanted.filter.items()}
        documents = list(db[wanted.collection].find(condition).sort("_id", -1))
        if len(documents) != wanted.count:
            found.append(f"{len(documents)} {wanted.collection} match {condition}, not {wanted.count}")
        elif documents:
            found += [
                f"{wanted.collection} {documents[0]['_id']}: {name} is {documents[0].get(name)!r}, not {value!r}"
                for name, value in wanted.fields.items()
                if not _matches(documents[0].get(name), value)
            ]
    return found


def _matches(found: Any, wanted: Any) -> bool:
    """Equal; or a text that occurs in a text, or in one of the entries of a list."""
    if isinstance(wanted, str) and isinstance(found, str):
        return found == wanted or (" " in wanted and wanted in found)
    if isinstance(wanted, str) and isinstance(found, list):
        return any(wanted in str(entry) for entry in found)
    return bool(found == wanted)


@dataclass(frozen=True, slots=True)
class Score:
    """One request with its outcome and what is wrong with it."""

    request: DeskRequest
    outcome: Outcome
    faults: tuple[str, ...]

    @property
    def met(self) -> bool:
        return not self.faults


def score(requests: Iterable[DeskRequest], outcomes: Mapping[str, Outcome], db: Database[Doc]) -> list[Score]:
    """The scores of the requests; ``outcomes`` by request id. A request without an outcome has not been run."""
    return [
        Score(request, outcomes[request.id], tuple(faults(request, outcomes[request.id], db)))
        if request.id in outcomes
        else Score(request, Outcome(run_id="", status="not run"), ("was not run",))
        for request in requests
    ]


def show(scores: list[Score], console: Console) -> None:
    """A table for a terminal, one line a request otherwise; then the sum."""
    if console.is_terminal:
        table = Table("request", "specialist", "tools", "cites", "USD", "seconds", "verdict", title="Scorecard")
        for one in scores:
            table.add_row(*_cells(one), "[green]right[/]" if one.met else f"[red]{'; '.join(one.faults)}[/]")
        console.print(table)
    else:
        for one in scores:
            verdict = "right" if one.met else "WRONG: " + "; ".join(one.faults)
            console.out("  ".join([*(cell or "-" for cell in _cells(one)), verdict]), highlight=False)
    met = sum(one.met for one in scores)
    cost = sum(one.outcome.cost_usd for one in scores)
    share = 100 * met / max(1, len(scores))
    console.out(
        f"{met} of {len(scores)} requests answered as expected ({share:.0f} %), {cost:.4f} USD", highlight=False
    )


def _cells(one: Score) -> list[str]:
    outcome = one.outcome
    return [
        one.request.id, outcome.agent or "", ", ".join(dict.fromkeys(outcome.tools)), ", ".join(outcome.citations),
        f"{outcome.cost_usd:.4f}", f"{outcome.latency_s:.2f}",
    ]  # fmt: skip


def exit_code(scores: list[Score]) -> int:
    """0 if there is something and all of it is right."""
    return 0 if scores and all(one.met for one in scores) else 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.support_desk.scorecard", description=__doc__)
    parser.add_argument(
        "--desk-database", help="the desk's own database; default AGENTQ_SUPPORT_DESK_DB or support_desk"
    )
    arguments = parser.parse_args(argv)
    settings = load_settings()
    if settings.mongo_url is None:
        print("No agentq is running here: start it with 'agentq up --app examples/support_desk'.", file=sys.stderr)
        return 2
    url = settings.mongo_url.get_secret_value()
    desk = database(url, arguments.desk_database)
    noted = {note["_id"]: note["run_id"] for note in desk[DEMO_RUNS].find()}
    with Client(url, database=settings.mongo_database) as client:
        outcomes = {name: client.run(run_id).outcome() for name, run_id in noted.items()}
    scores = score(load_requests(), outcomes, desk)
    show(scores, Console())
    return exit_code(scores)


if __name__ == "__main__":
    sys.exit(main())
