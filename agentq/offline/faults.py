"""Latency and failures on demand: the scenario file, and which rule a call meets. Deterministic, no chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from agentq.errors import ConfigError
from agentq.offline.prompt import Prompt, Purpose, Reply
from schemas.chat import ToolCall


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Match(_Strict):
    """Which calls a rule is for; all that is given must hold."""

    model: str | None = None
    purpose: Purpose | None = None
    contains: str | None = Field(None, min_length=1, description="text in the last user message, case ignored")
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


class Scenario(_Strict):
    """The content of a scenario file."""

    version: Literal[1] = 1
    rules: list[Rule] = []


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
        raise ConfigError(
            f"{source}: {place}: {first['msg']}.",
            hint=f"A rule is {{name, match, action, times}}; actions are {', '.join(Action.model_fields)}.",
        ) from None


class Faults:
    """Which action each call meets. Counts matches and applications; one event loop uses it, so it needs no lock."""

    def __init__(self, scenario: Scenario) -> None:
        self.replace(scenario)

    def replace(self, scenario: Scenario) -> None:
        """Start over with other rules."""
        self.scenario = scenario
        self._matched = [0] * len(scenario.rules)
        self._applied = [0] * len(scenario.rules)

    def meet(self, prompt: Prompt) -> Action:
        """The action for this call, ``NO_FAULT`` if no rule is for it."""
        met = NO_FAULT
        for index, rule in enumerate(self.scenario.rules):
            if not _fits(rule.match, prompt):
                continue
            self._matched[index] += 1
            spent = rule.times is not None and self._applied[index] >= rule.times
            if met is NO_FAULT and not spent and (rule.match.nth is None or self._matched[index] in rule.match.nth):
                self._applied[index] += 1
                met = rule.action
        return met


def _fits(match: Match, prompt: Prompt) -> bool:
    return (
        match.model in (None, prompt.model)
        and match.purpose in (None, prompt.purpose)
        and (match.contains is None or match.contains.lower() in prompt.last_user_text.lower())
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
