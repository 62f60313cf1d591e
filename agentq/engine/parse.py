"""Reading what models write: JSON in or around prose, ROUTE_TO lines, ReAct text, verdicts. Total: never raises."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_FENCE = re.compile(r"```(?:json)?\s*(.*?)```", re.DOTALL)
_ROUTE_TO = re.compile(r"^\W*ROUTE_TO\W*:\s*[\"'`*]*([\w.-]+)", re.IGNORECASE | re.MULTILINE)
_REASON = re.compile(r"^\W*REASON\W*:\s*(.+)$", re.IGNORECASE | re.MULTILINE)
_FINAL = re.compile(r"^\W*Final Answer\W*:\s*", re.IGNORECASE | re.MULTILINE)
_ACTION_CALL = re.compile(r"^\W*Action\W*:\s*([\w.-]+)\s*\((.*)\)\s*$", re.IGNORECASE | re.MULTILINE | re.DOTALL)
_ACTION = re.compile(r"^\W*Action\W*:\s*[\"'`*]*([\w.-]+)", re.IGNORECASE | re.MULTILINE)
_ACTION_INPUT = re.compile(r"^\W*Action Input\W*:\s*", re.IGNORECASE | re.MULTILINE)
_OBSERVATION = re.compile(r"^\W*Observation\W*:", re.IGNORECASE | re.MULTILINE)
_CITATION = re.compile(r"\[([A-Za-z0-9][\w.:-]{0,63})\]")


def json_object(text: str) -> dict[str, Any] | None:
    """The first JSON object in ``text`` (bare, fenced, or amid prose); None if there is none."""
    fenced = _FENCE.search(text)
    for candidate in ([fenced.group(1)] if fenced else []) + [text]:
        start = candidate.find("{")
        if start >= 0:
            try:
                value, _ = json.JSONDecoder().raw_decode(candidate[start:])
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                return value
    return None


@dataclass(frozen=True, slots=True)
class Route:
    choice: str
    reason: str


def route(text: str, choices: list[str]) -> Route | None:
    """A router's choice as JSON or as ROUTE_TO/REASON lines; None unless it is one of ``choices``."""
    found = json_object(text)
    if found is not None and isinstance(found.get("route"), str):
        name, reason = found["route"], found.get("reason", "")
    elif match := _ROUTE_TO.search(text):
        because = _REASON.search(text)
        name, reason = match.group(1), because.group(1) if because else ""
    else:
        return None
    by_name = {choice.lower(): choice for choice in choices}
    choice = by_name.get(name.strip().lower())
    return Route(choice, str(reason).strip()[:500]) if choice else None


@dataclass(frozen=True, slots=True)
class Verdict:
    accept: bool
    problems: list[str]


def verdict(text: str) -> Verdict | None:
    """A critic's verdict; None if it says neither accept nor revise, or asks for a revision and names no problem."""
    found = json_object(text)
    if found is None or found.get("verdict") not in ("accept", "revise"):
        return None
    named = found.get("problems")
    problems = [str(item)[:500] for item in named if str(item).strip()][:10] if isinstance(named, list) else []
    if found["verdict"] == "accept":
        return Verdict(accept=True, problems=[])
    return Verdict(accept=False, problems=problems) if problems else None


@dataclass(frozen=True, slots=True)
class Action:
    tool: str
    arguments: dict[str, Any] | str


def react(text: str) -> Action | str:
    """ReAct text: the tool call it asks for, or the final answer (the whole text where it has no form at all).

    What a model writes after its action (an invented Observation, a premature Final Answer) is ignored.
    """
    final, action = _FINAL.search(text), _ACTION.search(text)
    if final and not (action and action.start() < final.start()):
        return text[final.end() :].strip()
    if action is None:
        return text.strip()
    end = _OBSERVATION.search(text, action.end())
    span = text[action.start() : end.start() if end else len(text)]
    given = _ACTION_INPUT.search(span)
    if given is None and (call := _ACTION_CALL.search(span)):
        return Action(call.group(1), _arguments(call.group(2)))
    return Action(action.group(1), _arguments(span[given.end() :] if given else ""))


def _arguments(text: str) -> dict[str, Any] | str:
    found = json_object(text)
    if found is not None:
        return found
    return text.strip() if text.strip() else {}


def citations(answer: str, seen: str) -> list[str]:
    """The ids in square brackets of ``answer`` that occur in ``seen`` (the tool results), each once, in order."""
    return [cited for cited in dict.fromkeys(_CITATION.findall(answer)) if cited in seen]
