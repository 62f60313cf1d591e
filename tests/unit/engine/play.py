"""A run driven by outcomes alone: the engine's pure functions, no store, no clock, no worker."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from agentq.engine import advance
from agentq.engine.commit import Commit, plan
from agentq.engine.decision import Decision, Failed, Observed, Outcome, Replied
from agentq.engine.effects import ToolCallEffect, effect
from agentq.engine.joining import deferral
from agentq.protocol import Request
from agentq.run import new_run
from schemas.catalog import BatchEndpoint, Bundle
from schemas.llm import LlmCall, LlmReply
from schemas.run import RUN, Entry, RunDoc

START = datetime(2026, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
WALL_S = 300.0  # how long a run of ``with_endpoint`` may take

READ = {"description": "reads", "parameters": {"type": "object"}}
TOOLS: dict[str, dict[str, Any]] = {
    "look_up": {**READ},
    "refund": {**READ, "effect": "write", "keyed": True},
    "post": {**READ, "effect": "irreversible"},
}
MODEL = {"provider": "openai", "model": "m-1", "input_usd_per_mtok": 1, "output_usd_per_mtok": 2}
AGENT = {"description": "money", "instructions": "Help.", "model": "m", "tools": list(TOOLS)}
ROUTE = {"type": "route", "model": "m", "agents": ["billing", "orders"], "default": "orders", "next": "agent"}
WORK = {"type": "agent", "agent": "$route", "next": "critic"}
CRITIC = {"type": "critic", "model": "m", "max_revisions": 2, "revise": "agent", "next": "end"}

TO_BILLING = '{"route": "billing", "reason": "money"}'
ACCEPT = '{"verdict": "accept", "problems": []}'
REVISE = '{"verdict": "revise", "problems": ["name the order"]}'


def bundle(
    nodes: dict[str, Any] | None = None, start: str = "route", *, native: bool = True, run: Any = None, **limits: Any
) -> Bundle:
    """route -> agent -> critic unless ``nodes`` are given; ``limits`` are the agents', ``run`` the workflow's."""
    agent = {**AGENT, "limits": limits}
    return Bundle.model_validate(
        {
            "workflow": {
                "name": "default",
                "start": start,
                "nodes": nodes or {"route": ROUTE, "agent": WORK, "critic": CRITIC},
                "limits": run or {},
            },
            "agents": {"billing": agent, "orders": {**agent, "description": "parcels"}},
            "models": {"m": {**MODEL, "native_tools": native}},
            "tools": TOOLS,
        }
    )


def wish(name: str, arguments: dict[str, Any] | str | None = None) -> dict[str, Any]:
    return {"id": "whatever the model says", "name": name, "arguments": arguments if arguments is not None else {}}


class Play:
    """``run`` is the run after the last outcome, ``last`` the commit that made it so."""

    def __init__(self, of: Bundle | None = None, text: str = "Where is order 17?", **fields: Any) -> None:
        self.bundle = of or bundle()
        self.now = START
        born = new_run(Request(input=text, **fields), self.bundle.registered(), run_id="r1", now=START)
        claimed = cast("RunDoc", {**born, "status": "running"})
        self.run = advance.enter_run(self.bundle, claimed, "s1", [], self.at_ms)
        self.last: Commit | None = None
        self.journal: list[Entry] = []

    @property
    def at_ms(self) -> int:
        return int(self.now.timestamp() * 1000)

    @property
    def whole(self) -> RunDoc:
        """The run as it is loaded with its journal."""
        return {**self.run, "journal": [*self.journal]}

    def decide(self, decision: Decision) -> Play:
        """Commit a decision that no step made."""
        return self._keep(plan(self.run, decision, now=self.now))

    def _keep(self, planned: Commit) -> Play:
        self.last, self.run = planned, planned.after
        self.journal += [] if planned.entry is None else [planned.entry]
        RUN.validate_python(self.whole)
        return self

    @property
    def step(self) -> str:
        """The only open step."""
        (only,) = self.run["steps"]
        return only

    @property
    def kind(self) -> str:
        return self.run["steps"][self.step]["kind"]

    def pass_time(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def call(self, step: str | None = None) -> LlmCall:
        wanted = effect(self.bundle, self.run, step or self.step)
        assert isinstance(wanted, LlmCall)
        return wanted

    def tool(self, step: str | None = None) -> ToolCallEffect:
        wanted = effect(self.bundle, self.run, step or self.step)
        assert isinstance(wanted, ToolCallEffect)
        return wanted

    def end(self, outcome: Outcome, step: str | None = None, max_attempts: int = 5) -> Play:
        """Commit an outcome of a step."""
        step = step or self.step
        decision = advance.advance(self.bundle, self.run, step, outcome, max_attempts)
        return self._keep(plan(self.run, decision, now=self.now, step_id=step, token="t"))

    def says(
        self, text: str = "", calls: Sequence[Any] = (), *, tokens: tuple[int, int] = (3, 2), cost: int = 7
    ) -> Play:
        usage: Any = {"input_tokens": tokens[0], "output_tokens": tokens[1]}
        return self.end(Replied(LlmReply(text, list(calls), "stop", usage, cost, "m-1", 1), self.at_ms))

    def sees(self, content: str = "found", step: str | None = None, *, ok: bool = True, unknown: bool = False) -> Play:
        code = "ok" if ok and not unknown else "timeout"
        return self.end(Observed(ok, code, content, unknown, 1, self.at_ms), step)

    def fails(self, code: str = "busy", *, retryable: bool = True, after_s: float | None = None) -> Play:
        return self.end(Failed(code, "The provider said no.", retryable, after_s, self.at_ms))

    def happened(self) -> list[str]:
        return [event["type"] for event in self.run["events"]]

    @property
    def result(self) -> dict[str, Any]:
        assert self.run["result"] is not None
        return cast("dict[str, Any]", self.run["result"])


def with_endpoint(**endpoint: Any) -> Bundle:
    plain = bundle(run={"max_wall_s": WALL_S})
    model = plain.models["m"].model_copy(update={"batch_endpoint": BatchEndpoint(**endpoint)})
    return plain.model_copy(update={"models": {"m": model}})


class Line(Play):
    """A line of a batch with a window."""

    def __init__(self, of: Bundle | None = None, complete_by: datetime = START + DAY) -> None:
        super().__init__(of or with_endpoint())
        line: Any = {"id": "batch_1", "line": 1, "custom_id": "m-1", "complete_by": complete_by}
        self.run = cast("RunDoc", {**self.run, "batch": line})

    def deferred(self) -> Line:
        """The open call is put off."""
        found = deferral(self.call(), self.run, self.step, self.now)
        assert found is not None
        self.end(found)
        return self

    def joined(self, text: str = "", calls: Any = (), outcome: Failed | None = None) -> Line:
        """The answer of a job comes."""
        usage: Any = {"input_tokens": 3, "output_tokens": 2}
        reply = Replied(LlmReply(text, list(calls), "stop", usage, 7, "m-1", 1), self.at_ms)
        self.decide(advance.joined(self.bundle, self.run, outcome or reply, "job_1", 5))
        return self
