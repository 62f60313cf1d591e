"""Chooses one of several described options for a text, by the words they share."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from agentq.offline.parts import Part, meaning, mood, shapes, split
from agentq.offline.prompt import Prompt, Reply, choice_property
from agentq.offline.text import stem, stem_set, synonyms, weights, words

_OPTION = re.compile(r"^[ \t]{0,8}[-*][ \t]+[\"'`*]*([\w.-]+)[\"'`*]*:\s*(.+)$", re.MULTILINE)
_TAKES_THE_REST = re.compile(
    r"\b(?:everything|anything|all|requests?) (?:else|other)\b|\bother requests?\b|\botherwise\b"
    r"|\bno (?:other|one else)\b|\bnone of the\b|\bdoes not fit\b|\bdefault\b",
    re.IGNORECASE,
)
# What a word counts for: in a clause that asks, in the story around it, in the message before; the first of a clause
# that asks (it names the deed or the thing), and one that is in an option's name.
ASKED, TOLD, EARLIER = 2.0, 0.7, 0.3
FIRST, NAMED = 2.0, 1.5
SHAPE = 0.5  # the form of a number that is named, like AB-0000, if a description gives an example of it


@dataclass(frozen=True, slots=True)
class Choice:
    """An option, the words that speak for it, and their weight (0 if it only takes what fits nothing else)."""

    name: str
    score: float
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Heard:
    """A word of the text and what it counts for."""

    word: str
    factor: float


def choose(options: Mapping[str, str], text: str, earlier: str = "") -> Choice:
    """The option whose name and description share the weightiest words with the text.

    A word that speaks for one option alone weighs most, one in an option's name more than one in its description,
    and what is asked counts more than the story around it. Without any word that at most half of the options share,
    the option that says it takes everything else is chosen, else the first.
    """
    described, weight = _described(tuple(options.items()))
    heard = _hear(text, earlier)
    telling = math.log(1 + len(options) / max(1, len(options) // 2)) - 1e-9
    ranked = [_score(name, described[name], synonyms(options[name]), heard, weight, telling) for name in options]
    best = max(ranked, key=lambda choice: choice.score)
    if best.score > 0:
        return best
    rest = next((name for name, description in options.items() if _TAKES_THE_REST.search(description)), None)
    return Choice(rest or next(iter(options)), 0.0, ())


@lru_cache(maxsize=256)
def _described(options: tuple[tuple[str, str], ...]) -> tuple[dict[str, frozenset[str]], dict[str, float]]:
    """What each option's name and description speak of, and what each stem of them weighs."""
    described = {
        name: stem_set(f"{name.replace('_', ' ')} {description}") | shapes(description) for name, description in options
    }
    return described, weights(list(described.values()))


def _hear(text: str, earlier: str) -> dict[str, _Heard]:
    """The stems of a text with what each counts for: most where something is asked, and there the first word most."""
    heard = {shape: _Heard(shape, SHAPE) for shape in shapes(text)}
    for piece, factor in [(earlier, EARLIER), *(piece for part in split(text) for piece in _pieces(part))]:
        written = {stem(word): word for word in reversed(words(piece))}
        for place, token in enumerate(meaning(piece)):
            counts = factor * (FIRST if place == 0 and factor == ASKED else 1.0)
            if token not in heard or heard[token].factor < counts:
                heard[token] = _Heard(written.get(token, token), counts)
    return heard


def _pieces(part: Part) -> list[tuple[str, float]]:
    """The clauses of a part and its context, each with its factor."""
    clauses = part.text.split(",") if part.mood == "request" else [part.text]
    asking = [mood(clause) in ("request", "question") for clause in clauses]
    found = [(clause, ASKED if asks or not any(asking) else TOLD) for clause, asks in zip(clauses, asking, strict=True)]
    return [*found, (part.context, TOLD)]


def _score(
    name: str, described: frozenset[str], learned: Mapping[str, str], heard: Mapping[str, _Heard],
    weight: Mapping[str, float], telling: float,
) -> Choice:  # fmt: skip
    """The option's score; 0 unless at least one of the words it shares is telling."""
    named = stem_set(name.replace("_", " "))
    shares = {
        token: weight.get(token, 0.0) if token in described else weight.get(learned.get(token, ""), 0.0) / 2
        for token in heard
    }
    points = {t: heard[t].factor * value * (NAMED if t in named else 1.0) for t, value in shares.items() if value}
    spoken = [heard[token].word for token in sorted(points, key=lambda t: -points[t])]
    tells = any(value >= telling for value in shares.values())
    return Choice(name, sum(points.values()) if tells else 0.0, tuple(spoken))


def options_of(prompt: Prompt) -> dict[str, str]:
    """The options the system prompt lists; those of the answer's schema where it names them."""
    listed = dict(_OPTION.findall(prompt.system))
    name = choice_property(prompt.schema)
    if name is None:
        return listed
    allowed = [str(value) for value in (prompt.schema or {})["properties"][name]["enum"]]
    return {value: listed.get(value, "") for value in allowed}


def answer(prompt: Prompt) -> Reply:
    """A router's answer: JSON of the schema's shape, or ROUTE_TO / REASON lines where the prompt asks for them."""
    options = options_of(prompt)
    if not options:
        return Reply("There is nothing to choose from in this prompt.")
    text, earlier = _texts(prompt, list(options))
    choice = choose(options, text, earlier)
    reason = (
        f"The request speaks of {', '.join(choice.words[:5])}, which is what {choice.name} serves."
        if choice.words
        else f"No specialist's description fits, and {choice.name} takes what the others do not."
    )
    if prompt.schema is None and "ROUTE_TO:" in prompt.system:
        return Reply(f"ROUTE_TO: {choice.name}\nREASON: {reason}")
    key = choice_property(prompt.schema) or "route"
    return Reply(json.dumps(_filled(prompt, key, choice.name, reason)))


def _filled(prompt: Prompt, key: str, chosen: str, reason: str) -> dict[str, object]:
    """The choice in ``key``, the reason in every other string property."""
    properties = (prompt.schema or {"properties": {key: {}, "reason": {"type": "string"}}}).get("properties", {})
    strings = {name: reason for name, value in properties.items() if name != key and value.get("type") == "string"}
    return {key: chosen, **strings}


def _texts(prompt: Prompt, names: list[str]) -> tuple[str, str]:
    """The message to be routed and the customer's message before it; a re-ask (it lists the options) is skipped."""
    said = [message["content"] for message in prompt.messages if message["role"] == "user"]
    while len(said) > 1 and sum(re.search(rf"\b{re.escape(n)}\b", said[-1]) is not None for n in names) == len(names):
        said.pop()
    return (said[-1] if said else "", said[-2] if len(said) > 1 else "")
