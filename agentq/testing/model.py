"""A model that says what the test tells it to, and remembers what it was asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from agentq.errors import ProviderError
from agentq.llm.types import LlmCall, LlmReply
from schemas.chat import ToolCall


@dataclass(frozen=True, slots=True)
class Script:
    """What the model answers. Use ``says`` and ``calls_tool``; token counts default to 4 characters a token."""

    text: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """An answer that waits: the call is under way (``started``) until ``release()``.

    Cancelling the call while it waits sets ``cancelled``, as a closed connection would.
    """

    answer: Answer = ""
    started: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    def release(self) -> None:
        self.released.set()


Answer: TypeAlias = "str | Script | LlmReply | ProviderError | Held | Callable[[LlmCall], Answer]"
"""One answer: text, a script, a finished reply, an error to raise, one that is held, or a function of the call."""


def says(
    text: str, *, finish: str | None = None, input_tokens: int | None = None, output_tokens: int | None = None
) -> Script:
    """An answer in words; ``finish`` is ``stop`` unless told otherwise."""
    return Script(text=text, finish=finish, input_tokens=input_tokens, output_tokens=output_tokens)


def calls_tool(
    name: str, arguments: dict[str, Any] | str | None = None, *, call_id: str = "call_1", text: str = ""
) -> Script:
    """A wish to call one tool. ``arguments`` as text stand for ones that are no valid JSON object."""
    return Script(text=text, tool_calls=({"id": call_id, "name": name, "arguments": arguments or {}},))


@dataclass(slots=True)
class _Rule:
    matches: Callable[[LlmCall], bool]
    answers: list[Answer]
    name: str
    always: Answer | None = None

    def next(self) -> Answer | None:
        return self.answers.pop(0) if self.answers else self.always


class ScriptedLlm:
    """An ``Llm`` that needs no network.

    Answers are taken in order from ``replies``; ``on`` adds answers for the calls that match, and those go first.
    A call with no answer left is an ``AssertionError``, in the call and again in ``assert_complete``.

        llm = ScriptedLlm(["first", ProviderError("busy", code="rate_limited", retryable=True), "second"])
        llm.on("route", '{"route": "billing", "reason": "money"}', always=True)   # every call with that purpose
        llm.on(lambda call: "refund" in call.messages[-1]["content"], says("No."), says("Still no."))

    ``calls`` are the calls in the order they came. Belongs to one event loop.
    """

    def __init__(self, replies: Iterable[Answer] = ()) -> None:
        self.calls: list[LlmCall] = []
        self._unexpected: list[str] = []
        self._rules: list[_Rule] = []
        self._default = _Rule(lambda _: True, list(replies), "any call")

    def on(self, match: str | Callable[[LlmCall], bool], *answers: Answer, always: bool = False) -> ScriptedLlm:
        """Answer calls that match: a purpose (``route``, ``turn``, ``critique``) or a predicate.

        The answers are used up in order; with ``always`` the last of them is repeated for ever and never missed by
        ``assert_complete``. The first rule that matches and has an answer left wins. Gives the double back.
        """
        if not answers:
            raise ValueError("on() needs an answer")
        purpose = match if isinstance(match, str) else None
        self._rules.append(
            _Rule(
                matches=match if callable(match) else (lambda call: call.purpose == purpose),
                answers=list(answers[:-1] if always else answers),
                name=f"purpose {purpose!r}" if purpose is not None else f"rule {len(self._rules) + 1}",
                always=answers[-1] if always else None,
            )
        )
        return self

    async def complete(self, call: LlmCall) -> LlmReply:
        """Give the next answer that fits, or raise it if it is an error."""
        self.calls.append(call)
        answer = self._choose(call)
        while isinstance(answer, Held) or callable(answer):
            answer = await _waited(answer) if isinstance(answer, Held) else answer(call)
        if isinstance(answer, ProviderError):
            raise answer
        return answer if isinstance(answer, LlmReply) else _reply(call, answer)

    def assert_complete(self) -> None:
        """Every answer was asked for, and every call had one."""
        left = {rule.name: len(rule.answers) for rule in [*self._rules, self._default] if rule.answers}
        assert not self._unexpected, f"calls without an answer: {'; '.join(self._unexpected)}"
        assert not left, f"answers nobody asked for: {left}; there were {len(self.calls)} calls"

    def _choose(self, call: LlmCall) -> Answer:
        for rule in [*self._rules, self._default]:
            if rule.matches(call):
                answer = rule.next()
                if answer is not None:
                    return answer
        last = call.messages[-1] if call.messages else None
        said = f"{last['role']}: {last['content'][:120]!r}" if last else "no message"
        described = f"call {len(self.calls)}, purpose {call.purpose!r}, last message {said}"
        self._unexpected.append(described)
        raise AssertionError(f"The scripted model has no answer for {described}")


async def _waited(held: Held) -> Answer:
    held.started.set()
    try:
        await held.released.wait()
    except asyncio.CancelledError:
        held.cancelled.set()
        raise
    return held.answer


def _reply(call: LlmCall, answer: str | Script) -> LlmReply:
    script = Script(text=answer) if isinstance(answer, str) else answer
    asked = sum(len(message["content"]) for message in call.messages)
    answered = len(script.text) + sum(len(json.dumps(wish["arguments"])) for wish in script.tool_calls)
    given = -(-asked // 4) if script.input_tokens is None else script.input_tokens
    made = -(-answered // 4) if script.output_tokens is None else script.output_tokens
    return LlmReply(
        text=script.text,
        tool_calls=list(script.tool_calls),
        finish=script.finish or ("tool_calls" if script.tool_calls else "stop"),
        usage={"input_tokens": given, "output_tokens": made},
        cost_nano_usd=call.model.cost_nano_usd(given, made),
        model=call.model.model,
        latency_ms=0,
        provider_id="scripted",
    )
