"""What runs do in a schedule: workflows, and the script that the model follows in each run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any

from agentq.protocol import Request
from agentq.run import Registered, new_run
from schemas.catalog import BatchEndpoint, Bundle, ModelSpec, ToolSpec
from schemas.chat import ToolCall
from schemas.llm import LlmReply
from schemas.run import RunDoc

TOOLS = {
    "look_up": ToolSpec(description="Look up an order.", parameters={"type": "object"}, effect="read"),
    "refund": ToolSpec(description="Refund an order.", parameters={"type": "object"}, effect="write", keyed=True),
    "post": ToolSpec(description="Post a letter.", parameters={"type": "object"}, effect="irreversible"),
}
ROUTE = {"type": "route", "model": "m", "agents": ["billing", "orders"], "default": "orders", "next": "agent"}
CRITIC = {"type": "critic", "model": "m", "max_revisions": 1, "revise": "agent", "next": "end"}
GRAPHS: dict[str, dict[str, Any]] = {
    "route": {"start": "route", "nodes": {
        "route": ROUTE, "agent": {"type": "agent", "agent": "$route", "next": "critic"}, "critic": CRITIC}},
    "act_first": {"start": "act", "nodes": {
        "act": {"type": "tool", "tool": "post", "args": {"order": {"from": "input"}}, "next": "agent"},
        "agent": {"type": "agent", "agent": "orders", "next": "end"}}},
    "refund_first": {"start": "route", "nodes": {
        "route": {**ROUTE, "next": "pay"},
        "pay": {"type": "tool", "tool": "refund", "args": {"order": "1"}, "next": "agent"},
        "agent": {"type": "agent", "agent": "$route", "next": "critic"}, "critic": CRITIC}},
}  # fmt: skip


WINDOWED = 0.3  # part of the schedules in which runs may wait for a provider's job
PRICE = 0.5  # of a call that is joined into a job
DEAR = 0.002  # a token costs 2 nano-dollars live, so 1 in a job: the cost of a call names it


@dataclass(frozen=True, slots=True)
class Offer:
    """A batch with a window, and the batch endpoint of its models."""

    window_s: float
    most: int
    gather_s: float
    turnaround_s: float

    def model(self) -> ModelSpec:
        endpoint = BatchEndpoint(
            price=PRICE, most=self.most, gather_s=self.gather_s, turnaround_s=self.turnaround_s
        )  # fmt: skip
        return ModelSpec(provider="openai", model="m-1", input_usd_per_mtok=DEAR, batch_endpoint=endpoint)


def offer(rng: random.Random) -> Offer | None:
    """In some schedules, some runs are lines of a batch whose calls may wait for a job."""
    if rng.random() >= WINDOWED:
        return None
    return Offer(
        rng.choice((100.0, 600.0, 1_200.0, 2_400.0)), rng.choice((1, 2, 1_000, 1_000)), rng.choice((0.0, 0.0, 3.0)),
        rng.choice((5.0, 30.0)),
    )  # fmt: skip


@cache
def bundle(graph: str, max_steps: int, offered: Offer | None = None) -> tuple[Bundle, Registered]:
    """A workflow of the given graph, and what a client must know of it."""
    model = ModelSpec(provider="openai", model="m-1") if offered is None else offered.model()
    agent = {"description": "d", "instructions": "Help.", "model": "m", "tools": list(TOOLS)}
    made = Bundle.model_validate({
        "workflow": {"name": graph.replace("_", "-"), **GRAPHS[graph], "limits": {"max_steps": max_steps}},
        "agents": {"billing": agent, "orders": {**agent, "limits": {"max_tool_calls": 4}}},
        "models": {"m": model.model_dump()},
        "tools": {name: spec.model_dump() for name, spec in TOOLS.items()},
    })  # fmt: skip
    return made, made.registered()


@dataclass(slots=True)
class Script:
    """One run: its birth, and what its models say. ``turns``: the tools asked for, turn by turn; then a draft."""

    run_id: str
    graph: str
    max_steps: int
    born_ms: int
    turn: int | None
    budget_usd: float | None
    deadline_s: float | None
    turns: list[tuple[str, ...]]
    unusable: bool  # the first answer of the router and of the critic
    revise: bool
    offer: Offer | None
    windowed: bool

    @property
    def bundle(self) -> tuple[Bundle, Registered]:
        return bundle(self.graph, self.max_steps, self.offer)

    def birth(self, now: datetime) -> dict[str, Any]:
        """The run as a client stores it; a line of a batch as ``agentq.batch.submit`` does."""
        request = Request(
            input=f"question of {self.run_id}", conversation=None if self.turn is None else "c",
            budget_usd=self.budget_usd, deadline_s=self.deadline_s,
        )  # fmt: skip
        registered = self.bundle[1]
        born: dict[str, Any] = dict(
            new_run(request, registered, run_id=self.run_id, now=now, turn=self.turn, waits=self.windowed)
        )
        if self.windowed and self.offer is not None:
            complete_by = min(now + timedelta(seconds=self.offer.window_s), born["deadline_at"])
            line = {"id": "batch_1", "line": 1, "custom_id": self.run_id, "complete_by": complete_by}
            born |= {"flow": "default|batch_1", "batch": line}
        return born

    def answer(self, purpose: str, messages: Sequence[Any], stored: RunDoc, cost: int) -> LlmReply:
        """What the model says to a call, by how far the run is; ``cost`` in nano-dollars."""
        state = stored["state"]
        text = ""
        wishes: tuple[str, ...] = ()
        if purpose == "route":
            asked = state is not None and state["unusable"] is not None
            text = "hm" if self.unusable and not asked else '{"route": "billing", "reason": "x"}'
        elif purpose == "critique":
            asked = state is not None and state["unusable"] is not None
            revised = state is not None and state["revisions"] > 0
            if self.unusable and not asked:
                text = "hm"
            elif self.revise and not revised:
                text = '{"verdict": "revise", "problems": ["say more"]}'
            else:
                text = '{"verdict": "accept", "problems": []}'
        else:
            said = sum(message["role"] == "assistant" for message in messages)
            said -= sum(message["role"] == "assistant" for message in state["history"]) if state else 0
            if said < len(self.turns):
                wishes = self.turns[said]
            if not wishes:
                text = f"draft {cost}"
        calls: list[ToolCall] = [
            {"id": f"c{index}", "name": name, "arguments": {"order": str(index)}} for index, name in enumerate(wishes)
        ]
        return LlmReply(
            text, calls, "tool_calls" if calls else "stop", {"input_tokens": 10, "output_tokens": 5}, cost, "m-1", 1
        )


def scripts(rng: random.Random, offered: Offer | None) -> list[Script]:
    """The runs of a schedule."""
    count = rng.choice((1, 1, 1, 2, 2, 3))
    if rng.random() < 0.002:
        count = 50
    conversation = count > 1 and rng.random() < 0.4
    spread = rng.choice((10, 2_000, 40_000))
    made = []
    for index in range(count):
        tools = ("look_up", "look_up", "refund", "post")
        turns = [
            tuple(rng.choice(tools) for _ in range(rng.choice((1, 1, 2, 3)))) for _ in range(rng.choice((0, 1, 1, 2)))
        ]
        special = rng.random()
        made.append(
            Script(
                run_id=f"r{index + 1}",
                graph="route" if rng.random() < 0.8 else rng.choice(list(GRAPHS)),
                max_steps=rng.choice((2, 4, 6)) if special < 0.05 else 60,
                born_ms=rng.randrange(spread),
                turn=index + 1 if conversation else None,
                budget_usd=4e-6 if 0.05 < special < 0.1 else None,
                deadline_s=rng.choice((20.0, 60.0)) if 0.1 < special < 0.2 else None,
                turns=turns,
                unusable=rng.random() < 0.1,
                revise=rng.random() < 0.25,
                offer=offered,
                windowed=offered is not None and not conversation and rng.random() < 0.8,
            )
        )
    return made
