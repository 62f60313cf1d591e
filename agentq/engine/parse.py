"""Reading what models write: JSON in or around prose, ROUTE_TO lines, ReAct text, verdicts. Total: never raises."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any, cast

# Leading marks (quotes, stars, list signs) stay on their line: patterns that run over line breaks are quadratic.
_FENCE = re.compile(r"```(?:json)?(.*?)```", re.DOTALL)
_ROUTE_TO = re.compile(r"^[^\w\n]*ROUTE_TO[^\w\n:]*:[ \t\"'`*]*([\w.-]+)", re.IGNORECASE | re.MULTILINE)
_REASON = re.compile(r"^[^\w\n]*REASON[^\w\n:]*:[ \t]*(\S.*)$", re.IGNORECASE | re.MULTILINE)
_FINAL = re.compile(r"^[^\w\n]*Final Answer[^\w\n:]*:[*_`]*", re.IGNORECASE | re.MULTILINE)
_ACTION_CALL = re.compile(r"[^\w\n]*Action[^\w\n:]*:[ \t]*([\w.-]+)[ \t]*\((.*)\)\s*\Z", re.IGNORECASE | re.DOTALL)
_ACTION = re.compile(r"^[^\w\n]*Action[^\w\n:]*:[ \t\"'`*]*([\w.-]+)", re.IGNORECASE | re.MULTILINE)
_ACTION_INPUT = re.compile(r"^[^\w\n]*Action Input[^\w\n:]*:", re.IGNORECASE | re.MULTILINE)
_OBSERVATION = re.compile(r"^[^\w\n]*Observation[^\w\n:]*:", re.IGNORECASE | re.MULTILINE)
_MAX_DEPTH = 32
_MAX_STARTS = 20  # braces that open no object before we give up
_MAX_INT = 2**63
_WORD = re.compile(r"[A-Za-z0-9][\w.:-]*")
_CITATION = re.compile(r"\[([A-Za-z0-9][\w.:-]{0,63})\]")


def json_object(text: str) -> dict[str, Any] | None:
    """The first JSON object in ``text`` (bare, fenced, or amid prose) that can be stored; None if there is none."""
    fenced = _FENCE.search(text)
    for candidate in ([fenced.group(1)] if fenced else []) + [text]:
        start = candidate.find("{")
        for _ in range(_MAX_STARTS):
            if start < 0:
                break
            try:
                value, _ = _DECODER.raw_decode(candidate, start)
                return cast("dict[str, Any]", _storable(value))
            except (ValueError, RecursionError):
                start = candidate.find("{", start + 1)
    return None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _storable(value: Any, depth: int = 0) -> Any:
    """``value`` as UTF-8 and BSON can hold it; ValueError where they cannot (too deep, integers past 64 bits)."""
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode().replace("\x00", "")
    if isinstance(value, dict):
        return {_storable(key): _storable(child, depth + 1) for key, child in value.items()}
    if isinstance(value, list):
        return [_storable(child, depth + 1) for child in value]
    if isinstance(value, int) and not -_MAX_INT <= value < _MAX_INT:
        raise ValueError("the integer does not fit into 64 bits")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("the number is not finite")
    return value


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
    if given is None and (call := _ACTION_CALL.match(span.strip())):
        return Action(call.group(1), _arguments(call.group(2)))
    return Action(action.group(1), _arguments(span[given.end() :] if given else ""))


def _arguments(text: str) -> dict[str, Any] | str:
    found = json_object(text)
    if found is not None:
        return found
    return text.strip() if text.strip() else {}


def citations(answer: str, seen: str) -> list[str]:
    """The ids in square brackets of ``answer`` that stand in ``seen`` (the tool results), each once, in order."""
    cited = dict.fromkeys(_CITATION.findall(answer))
    if not cited:
        return []
    known = {word.rstrip(".:-") for word in _WORD.findall(seen)}
    return [name for name in cited if name in known]
