"""The invariants, checked over every run of a campaign when all faults are over.

A ``Verdict`` counts what the table in docs/reliability.md shows; ``wrong`` holds a sentence for every violation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from agentq.engine.audit import check
from agentq.protocol import TERMINAL
from schemas.run import RUN
from tests.fault.model import ScriptedServer

Doc = dict[str, Any]
FINISHING = ("route.chosen", "agent.turn", "tool.called", "critic.verdict")
PAID = ("route.chosen", "agent.turn", "critic.verdict")  # of them, those that are one model call each
COST_OF_A_CALL = 20_000  # nano-dollars: 10 tokens in, 5 out, at the prices of the tests' app
STEPS_OF_A_RUN, CALLS_OF_A_RUN = 8, 5
MAX_ATTEMPTS = 5


@dataclass
class Verdict:
    """``extra_calls``: model calls beyond the first of a step. ``unexplained``: those of them for which the audit shows
    no attempt that was lost or failed. ``held``: runs whose irreversible step waits for a person."""

    accepted: int = 0
    lost: int = 0
    doubled: int = 0
    unexplained: int = 0
    extra_calls: int = 0
    lost_steps: int = 0
    failed_attempts: int = 0
    held: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Judge:
    """Judges run by run. ``excused(worker, at)``: may this worker (``host:pid``) have lost a lease at that time?"""

    def __init__(self, model: ScriptedServer, cancelled: set[str], excused: Callable[[str, float], bool]) -> None:
        self._model = model
        self._cancelled = cancelled
        self._excused = excused
        self._calls: dict[str, Counter[str]] = {}
        for key, count in model.calls.items():
            run_id, step_id = key.split(":")
            self._calls.setdefault(run_id, Counter())[step_id] = count
        self._effects: dict[str, Counter[str]] = {}
        for (tool, key), count in model.bank.calls.items():
            effects = self._effects.setdefault(key.split(":")[0], Counter())
            effects[tool] += 1 if tool == "pay" and key in model.bank.payments else count
        self.verdict = Verdict()

    def judge_all(self, database: Any, accepted: Iterable[str]) -> Verdict:
        """Everything ``database`` holds, against the ids that the client was given."""
        events: dict[str, list[Doc]] = {}
        for event in database["audit"].find({}, {"_id": 0}).sort("_id", 1):
            events.setdefault(event["run"], []).append(event)
        runs = database["runs"].find({"status": {"$ne": "rejected"}})  # those are refusals that were recorded
        return self.judge(accepted, {run["_id"]: run for run in runs}, events)

    def judge(self, accepted: Iterable[str], runs: dict[str, Doc], events: dict[str, list[Doc]]) -> Verdict:
        """``accepted``: every id the client was given; ``events`` by run."""
        ids = set(accepted)
        self.verdict.accepted = len(ids)
        for run_id in ids - runs.keys():
            self._lost(run_id, "was accepted and is gone")
        for run_id in runs.keys() - ids:
            self._doubled(run_id, "was stored and nobody was told its id")
        for run_id in ids & runs.keys():
            self._run(runs[run_id], events.get(run_id, []))
        return self.verdict

    def _wrong(self, run_id: str, sentence: str) -> None:
        self.verdict.wrong.append(f"{run_id} {sentence}")

    def _lost(self, run_id: str, sentence: str) -> None:
        self.verdict.lost += 1
        self._wrong(run_id, sentence)

    def _doubled(self, run_id: str, sentence: str) -> None:
        self.verdict.doubled += 1
        self._wrong(run_id, sentence)

    def _run(self, run: Doc, events: list[Doc]) -> None:
        RUN.validate_python(run)
        run_id = run["_id"]
        self._end(run, events)
        copied = {event["seq"] for event in events}
        chain = [*events, *(event for event in run["events"] if event["seq"] not in copied)]
        for problem in check(run_id, run["audit"], chain):
            self._wrong(run_id, f"audit: {problem}")
        finished = Counter(event["step"] for event in chain if event["type"] in FINISHING)
        for step_id, times in finished.items():
            if times > 1:
                self._doubled(run_id, f"finished step {step_id} {times} times")
        if run["status"] == "succeeded" and len(finished) != STEPS_OF_A_RUN:
            self._wrong(run_id, f"succeeded in {len(finished)} steps")
        self._paid(run, chain)
        self._effects_once(run)
        self._leases(run_id, chain)

    def _end(self, run: Doc, events: list[Doc]) -> None:
        run_id, status = run["_id"], run["status"]
        self.verdict.statuses[status] += 1
        held = [step_id for step_id, step in run["steps"].items() if "held" in step]
        if held:
            self.verdict.held += 1
            if not run["input"].startswith("wire") or len(held) != len(run["steps"]):
                self._wrong(run_id, f"waits for a person with the steps {run['steps']}")
        elif status not in TERMINAL:
            self._lost(run_id, f"never ended: {status}, steps {run['steps']}, leases {run['leases']}")
        elif run["next_due"] is not None or run["events"]:
            self._wrong(run_id, f"is {status} and its audit was never copied out")
        if status == "cancelled" and run_id not in self._cancelled:
            self._wrong(run_id, "was cancelled and nobody asked for it")
        if status == "failed":
            self._failed_for_good_reason(run, events)
        if status == "succeeded" and run["result"]["answer"] != "I paid A; the balance was 12.":
            self._wrong(run_id, f"answered {run['result']['answer']!r}")

    def _failed_for_good_reason(self, run: Doc, events: list[Doc]) -> None:
        """Only a step whose every attempt was lost or failed ends a run."""
        step_id = run.get("quarantine", {}).get("step_id")
        tries = _attempts(events)[step_id]
        if tries < MAX_ATTEMPTS:
            self._wrong(run["_id"], f"failed after {tries} attempts at {step_id}: {run['error']}")

    def _paid(self, run: Doc, chain: list[Doc]) -> None:
        run_id, calls = run["_id"], self._calls.get(run["_id"], Counter())
        attempts = _attempts(chain)
        self.verdict.failed_attempts += sum(event["type"] == "step.failed" for event in chain)
        for step_id, count in calls.items():
            self.verdict.extra_calls += count - 1
            allowed = max(1, attempts[step_id])
            if count > allowed:
                self.verdict.unexplained += count - allowed
                self._wrong(run_id, f"called the model {count} times for {step_id}, {allowed} attempts are on record")
        charged = sum(event["type"] in PAID for event in chain)
        usage, waste = run["usage"], run["waste"]
        counted = (usage.get("llm_calls", 0), usage.get("cost_nano_usd", 0))
        if counted != (charged, charged * COST_OF_A_CALL):
            self._wrong(run_id, f"is charged {counted} and its audit shows {charged} calls")
        if run["status"] == "succeeded" and charged != CALLS_OF_A_RUN:
            self._wrong(run_id, f"succeeded with {charged} charged calls")
        if charged + waste.get("llm_calls", 0) > calls.total():
            self._wrong(run_id, f"books {charged} calls and {waste} as waste, the model saw {calls.total()}")

    def _effects_once(self, run: Doc) -> None:
        run_id, effects = run["_id"], self._effects.get(run["_id"], Counter())
        wired = run["input"].startswith("wire")
        paid = effects["wire" if wired else "pay"]
        if paid > 1:
            self._doubled(run_id, f"paid {paid} times")
        if run["status"] == "succeeded" and paid < 1:
            self._lost(run_id, "succeeded and never paid")

    def _leases(self, run_id: str, chain: list[Doc]) -> None:
        for event in chain:
            if event["type"] == "step.lost":
                self.verdict.lost_steps += 1
                if not self._excused(event["data"]["worker"], event["at_ms"] / 1000):
                    worker = event["data"]["worker"]
                    self._wrong(run_id, f"lost step {event['step']} of {worker}, to which nothing had happened")


def _attempts(chain: list[Doc]) -> Counter[str]:
    """How many attempts at each step the audit shows, where there was more than one."""
    found: Counter[str] = Counter()
    for event in chain:
        if event["type"] in ("step.lost", "step.failed"):
            found[event["step"]] = max(found[event["step"]], event["data"]["attempt"] + 1)
    for event in chain:
        if event["type"] == "step.quarantined":  # the last one
            found[event["step"]] = event["data"]["attempt"]
    return found
