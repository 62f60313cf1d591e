"""A call from what is asked to what is answered: faults, brain, journal. Live calls and batch lines go this one way."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from agentq.offline import brain
from agentq.offline.faults import Action, Asked, Faults, Scenario, spoil
from agentq.offline.journal import Entry, Journal
from agentq.offline.prompt import Prompt, Reply
from agentq.offline.wire import Api


@dataclass(frozen=True, slots=True)
class Answered:
    """A prompt, the reply to it (empty where ``action`` leaves none), and what else happens to the call."""

    prompt: Prompt
    reply: Reply
    action: Action


class Calls:
    """The calls of a server. One event loop uses it."""

    def __init__(self, scenario: Scenario) -> None:
        self.faults = Faults(scenario)
        self.journal = Journal()

    async def answer(self, prompt: Prompt, api: Api, *, key: str, batch: str = "") -> Answered:
        """Meet a fault or not, and answer; the call is in the journal then. A line of a ``batch`` has no latency: its
        batch takes as long as the scenario says."""
        action = self.faults.meet(prompt)
        if batch:
            action = action.model_copy(update={"latency_ms": 0})
        await self.wait(action)
        reply = Reply() if action.status or action.time_out else spoil(brain.answer(prompt), action)
        tools = [call["name"] for call in reply.tool_calls]
        self.note(prompt, action, api, key=key, tools=tools, batch=batch)
        return Answered(prompt, reply, action)

    async def wait(self, action: Action) -> None:
        if action.latency_ms:
            await asyncio.sleep(action.latency_ms / 1000)

    def note(
        self,
        asked: Asked,
        action: Action,
        api: Api,
        *,
        key: str,
        tools: list[str] | None = None,
        batch: str = "",
        inputs: int = 1,
    ) -> None:
        """Put a call in the journal."""
        self.journal.record(
            Entry(
                0, api, asked.purpose, asked.model, key, action.sent, action.fault, action.latency_ms, tools or [],
                batch, inputs,
            )
        )  # fmt: skip
