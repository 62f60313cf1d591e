"""Latency and failures on demand: the scenario file, and which rule a call meets. Deterministic, no chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Protocol

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from agentq.errors import ConfigError
from agentq.offline.prompt import Purpose, Reply
from schemas.chat import ToolCall


class Asked(Protocol):
    """What a rule is matched with: the prompt of a call, or the texts to embed."""

    @property
    def model(self) -> str: ...
    @property
    def purpose(self) -> Purpose: ...
    @property
    def last_user_text(self) -> str: ...


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Match(_Strict):
    """Which calls a rule is for; all that is given must hold."""

    model: str | None = None
    purpose: Purpose | None = None
    contains: str | None = Field(
        None, min_length=1, description="text in the last user message (or in a text to embed), case ignored"
    )
    nth: list[int] | None = Field(None, description="of the calls that match otherwise, only these, counted from 1")

    @model_validator(mode="before")
    @classmethod
    def one_number_is_a_list(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("nth"), int):
            return {**value, "nth": [value["nth"]]}
        return value


class Action(_Strict):
    """What happens to a call. ``latency_ms`` goes with any other; of the rest, at most one.

    ``time_out`` holds the connection until the client or ``hold_s`` ends it; ``cut`` closes it in the middle of the
    body; ``malformed`` sends a body that is no JSON; ``wrong_arguments`` and ``unknown_tool`` spoil the first tool
    call (a reply without tool calls is not spoiled); ``invent`` adds a sentence to the answer, for a critic to find.

    A line of a batch has no connection of its own: it is not held up by ``latency_ms``, ``time_out`` makes it fail as
    ``request_timeout``, ``cut`` and ``malformed`` leave half of its line in the output file.
    """

    latency_ms: int = Field(0, ge=0, le=600_000)
    status: int | None = Field(None, ge=400, le=599)
    retry_after: float | None = Field(None, ge=0, description="seconds, sent as Retry-After with the status")
    time_out: bool = False
    hold_s: float = Field(600.0, gt=0, description="seconds after which a held connection is closed")
    cut: bool = False
    malformed: bool = False
    wrong_arguments: bool = False
    unknown_tool: bool = False
    no_usage: bool = False
    invent: str | None = Field(None, min_length=1)

    @property
    def sent(self) -> int:
        """The status that the client is sent, 0 if nothing."""
        return 0 if self.time_out else self.status or 200

    @property
    def fault(self) -> str | None:
        """The name of the failure, None for latency alone."""
        if self.status is not None:
            return f"status_{self.status}"
        names = ("time_out", "cut", "malformed", "wrong_arguments", "unknown_tool", "no_usage", "invent")
        return next((name for name in names if getattr(self, name)), None)

    @model_validator(mode="after")
    def one_failure(self) -> Action:
        flags = ("time_out", "cut", "malformed", "wrong_arguments", "unknown_tool", "no_usage", "invent", "status")
        given = [name for name in flags if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"one failure a rule, got {given}; write a rule for each")
        if self.retry_after is not None and self.status is None:
            raise ValueError("retry_after goes with a status")
        return self


class Rule(_Strict):
    """The first rule that matches a call and has ``times`` left is applied; then the call is answered normally."""

    name: str = ""
    match: Match = Match()
    action: Action
    times: int | None = Field(None, gt=0, description="how often it is applied; default: always")


class BatchPlan(_Strict):
    """How the batches go that are created from now on. By default a batch completes when its lines are answered.

    Of the lines of a batch with ``seconds`` or ``stuck``, the share ``partial`` (rounded down) is answered at once, the
    others when the ``seconds`` have passed; then it completes. A batch that is ``stuck``, or whose ``seconds`` are more
    than its window, never gets there: it expires when the window has passed. Lines that an expiry or a cancel finds
    unanswered are never answered (and never paid).

    Of POST /v1/batches, the first ``times`` (default: all) are answered with the status ``refuse``, or create the batch
    and ``lose_answer``: the connection is cut instead of an answer.
    """

    seconds: float = Field(0.0, ge=0, le=86_400, description="from its creation until a batch completes")
    stuck: bool = False
    partial: float = Field(0.0, ge=0, le=1)
    window_s: float = Field(86_400.0, gt=0, le=86_400, description="how many seconds the completion window 24h lasts")
    refuse: int | None = Field(None, ge=400, le=599)
    retry_after: float | None = Field(None, ge=0, description="seconds, sent as Retry-After with the refusal")
    lose_answer: bool = False
    times: int | None = Field(None, gt=0)

    @property
    def fails_creation(self) -> bool:
        return self.refuse is not None or self.lose_answer

    @property
    def expires(self) -> bool:
        """Does a batch that nobody cancels expire?"""
        return self.stuck or self.seconds > self.window_s

    @model_validator(mode="after")
    def fits_together(self) -> BatchPlan:
        if self.stuck and self.seconds:
            raise ValueError("a stuck batch never completes; leave out seconds or stuck")
        if self.partial and not (self.stuck or self.seconds):
            raise ValueError("partial goes with seconds or stuck; else all lines are answered at once")
        if self.refuse is not None and self.lose_answer:
            raise ValueError("one failure of the creation, got refuse and lose_answer")
        if self.retry_after is not None and self.refuse is None:
            raise ValueError("retry_after goes with refuse")
        if self.times is not None and not self.fails_creation:
            raise ValueError("times goes with refuse or lose_answer")
        return self


class Scenario(_Strict):
    """The content of a scenario file."""

    version: Literal[1] = 1
    rules: list[Rule] = []
    batches: BatchPlan = BatchPlan()


NO_FAULT = Action()


def load_scenario(path: Path) -> Scenario:
    """The scenario in a YAML file. Raises ``ConfigError`` naming the file, the place and what is wrong with it."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).", hint="Give a readable file.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is no YAML ({error}).", hint="Correct the place it names.") from None
    return parse_scenario({} if content is None else content, str(path))


def parse_scenario(content: Any, source: str) -> Scenario:
    """A scenario from plain data; ``source`` is named in the error. Raises ``ConfigError``."""
    try:
        return Scenario.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the top level"
        hint = f"A rule is {{name, match, action, times}}; actions are {', '.join(Action.model_fields)}."
        if place.startswith("batches"):
            hint = f"In batches there may be {', '.join(BatchPlan.model_fields)}."
        raise ConfigError(f"{source}: {place}: {first['msg']}.", hint=hint) from None


class Faults:
    """Which action each call meets. Counts matches and applications; one event loop uses it, so it needs no lock."""

    def __init__(self, scenario: Scenario) -> None:
        self.replace(scenario)

    def replace(self, scenario: Scenario) -> None:
        """Start over with other rules."""
        self.scenario = scenario
        self._matched = [0] * len(scenario.rules)
        self._applied = [0] * len(scenario.rules)
        self._creations = 0

    def meet(self, asked: Asked) -> Action:
        """The action for this call, ``NO_FAULT`` if no rule is for it."""
        met = NO_FAULT
        for index, rule in enumerate(self.scenario.rules):
            if not _fits(rule.match, asked):
                continue
            self._matched[index] += 1
            spent = rule.times is not None and self._applied[index] >= rule.times
            if met is NO_FAULT and not spent and (rule.match.nth is None or self._matched[index] in rule.match.nth):
                self._applied[index] += 1
                met = rule.action
        return met

    def meet_creation(self) -> BatchPlan:
        """The plan for a batch that is being created, without a failure of the creation that is used up."""
        plan = self.scenario.batches
        self._creations += 1
        if plan.times is None or self._creations <= plan.times:
            return plan
        return plan.model_copy(update={"refuse": None, "lose_answer": False})


def _fits(match: Match, asked: Asked) -> bool:
    return (
        match.model in (None, asked.model)
        and match.purpose in (None, asked.purpose)
        and (match.contains is None or match.contains.lower() in asked.last_user_text.lower())
    )


def spoil(reply: Reply, action: Action) -> Reply:
    """The reply with the action's wrong content: broken arguments, a tool that does not exist, an invented sentence."""
    if action.invent and reply.text:
        return Reply(f"{reply.text} {action.invent}", reply.tool_calls)
    if not reply.tool_calls or not (action.wrong_arguments or action.unknown_tool):
        return reply
    first, *others = reply.tool_calls
    wrong: ToolCall = (
        {**first, "name": f"{first['name']}_v2"}
        if action.unknown_tool
        else {**first, "arguments": {"wrong_argument": 1}}
    )
    return Reply(reply.text, (wrong, *others))
