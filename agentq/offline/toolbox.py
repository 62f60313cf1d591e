"""What the tools of a prompt can do, read from their names, descriptions and JSON Schemas; and filling arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from agentq.offline.parts import AMOUNT, EMAIL, IDENTIFIER
from agentq.offline.route import choose
from agentq.offline.text import sentences, stem, stem_set, synonyms, weights, word_set
from schemas.chat import ToolSchema

Kind = Literal["entity", "amount", "number", "email", "choice", "words", "other"]

_READING_VERBS = word_set("get search find list lookup look check read fetch query show retrieve describe count")
_NEGATIVE = re.compile(r"\b(?:do not|don't|never|not for|must not|without)\b", re.IGNORECASE)
_FIRST = re.compile(r"\b(?:first|before|beforehand|after)\b", re.IGNORECASE)
_META = frozenset(map(stem, word_set("use call tool customer result run when whenever case back key take name")))
_MONEY = re.compile(r"amount|price|total|sum|usd|eur|dollar|euro", re.IGNORECASE)
_ID_NAME = re.compile(r"(?:_id|_number|_no|_code)$")
_NUMBER = re.compile(r"(?<![\w.-])\d+(?:\.\d+)?(?![\w-])")
_CHOICE_LINE = re.compile(r"[\"'`]?\b([\w-]+)[\"'`]?\s*(?::|=|\bif\b|\bfor\b|\bwhen\b)\s*([^;,.]+(?:,[^;.:]+)?)")


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter: how a value for it is found in a text."""

    name: str
    kind: Kind
    required: bool
    description: str
    pattern: re.Pattern[str] | None = None
    choices: tuple[str, ...] = ()
    max_length: int = 500
    integer: bool = False


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool. ``about``: the stems that call for it; ``first``: tools its description wants called before it."""

    name: str
    reads: bool
    about: frozenset[str]
    synonyms: Mapping[str, str]
    params: tuple[Param, ...]
    first: tuple[str, ...]

    @property
    def required(self) -> tuple[Param, ...]:
        return tuple(param for param in self.params if param.required)

    @property
    def searches(self) -> bool:
        """Whether it takes nothing but words: a search over texts."""
        return self.reads and [param.kind for param in self.required] == ["words"]

    @property
    def entity(self) -> Param | None:
        """The required parameter that names a thing (an order, a ticket, an address)."""
        return next((param for param in self.required if param.kind in ("entity", "email")), None)


@dataclass(frozen=True, slots=True)
class Toolbox:
    """The tools of a prompt by name, and what each stem of their descriptions weighs."""

    tools: Mapping[str, Tool]
    weight: Mapping[str, float]


def toolbox(schemas: tuple[ToolSchema, ...]) -> Toolbox:
    """The tools as read; reading them once serves every prompt that has them."""
    return _toolbox(json.dumps(schemas))


@lru_cache(maxsize=256)
def _toolbox(text: str) -> Toolbox:
    schemas: list[ToolSchema] = json.loads(text)
    names = [schema["name"] for schema in schemas]
    tools = {schema["name"]: _tool(schema, names) for schema in schemas}
    return Toolbox(tools, weights([tool.about for tool in tools.values()]))


def _tool(schema: ToolSchema, names: list[str]) -> Tool:
    name, description = schema["name"], schema.get("description", "")
    verb, *nouns = re.split(r"[_\W]+", name)
    wanted = [s for s in sentences(description) if not _NEGATIVE.search(s) and not _FIRST.search(s)]
    parameters = schema.get("parameters") or {}
    required = set(parameters.get("required", []))
    properties = parameters.get("properties", {})
    others = [other for other in names if other != name]
    about = stem_set(" ".join([*wanted, *nouns])) - _META
    return Tool(
        name=name,
        reads=verb.lower() in _READING_VERBS,
        about=frozenset(about),
        synonyms=synonyms(description),
        params=tuple(_param(key, value, key in required) for key, value in properties.items()),
        first=tuple(
            other
            for other in others
            if any(other in s and _FIRST.search(s) and not _NEGATIVE.search(s) for s in sentences(description))
        ),
    )


def _param(name: str, schema: dict[str, Any], required: bool) -> Param:
    alternatives = [option for option in schema.get("anyOf", []) if option.get("type") != "null"]
    merged = {**schema, **(alternatives[0] if alternatives else {})}
    description = str(merged.get("description") or merged.get("title") or name.replace("_", " "))
    pattern = merged.get("pattern")
    kind = _kind(name, description, merged)
    if kind == "entity" and not pattern:
        compiled: re.Pattern[str] | None = IDENTIFIER
    else:
        compiled = re.compile(_unanchored(str(pattern)), re.IGNORECASE) if pattern else None
    return Param(
        name, kind, required, description, compiled, tuple(str(value) for value in merged.get("enum", ())),
        int(merged.get("maxLength", 500)), merged.get("type") == "integer",
    )  # fmt: skip


def _kind(name: str, description: str, schema: dict[str, Any]) -> Kind:
    of_type = schema.get("type", "string")
    if schema.get("enum"):
        return "choice"
    if of_type in ("number", "integer"):
        return "amount" if _MONEY.search(f"{name} {description}") else "number"
    if of_type != "string":
        return "other"
    if schema.get("format") == "email" or "email" in name:
        return "email"
    return "entity" if schema.get("pattern") or _ID_NAME.search(name) else "words"


def _unanchored(pattern: str) -> str:
    return rf"(?<![\w-])(?:{pattern.removeprefix('^').removesuffix('$')})(?![\w-])"


def find(param: Param, text: str) -> list[Any]:
    """All values for an entity, amount or number parameter that the text holds, each once, in order."""
    found: list[Any] = []
    if param.kind == "email":
        found = [match.group() for match in EMAIL.finditer(text)]
    elif param.kind == "entity" and param.pattern:
        found = [_as_written(param.pattern, match.group()) for match in param.pattern.finditer(text)]
    elif param.kind == "amount":
        found = [_numeric((a or b).replace(",", ""), param) for a, b in AMOUNT.findall(text)]
    elif param.kind == "number":
        found = [_numeric(match.group(), param) for match in _NUMBER.finditer(text)]
    return list(dict.fromkeys(found))


def _numeric(text: str, param: Param) -> int | float:
    value = float(text)
    return int(value) if param.integer else value


def _as_written(pattern: re.Pattern[str], text: str) -> str:
    """The spelling the pattern wants: as written, else in capitals (people write ``ab-12`` for ``AB-12``)."""
    strict = re.compile(pattern.pattern)
    return text if strict.fullmatch(text) or not strict.fullmatch(text.upper()) else text.upper()


def pick(param: Param, text: str) -> str | None:
    """A value for a choice: the one whose name or explanation fits the text; None leaves an optional one out."""
    explained = {name: why for name, why in _CHOICE_LINE.findall(param.description) if name in param.choices}
    options = {value: f"{value.replace('_', ' ')} {explained.get(value, '')}" for value in param.choices}
    best = choose(options, text)
    return best.name if best.score or param.required else None


def shorten(text: str, limit: int) -> str:
    """At most ``limit`` characters, cut at a word, in one line."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1].rsplit(" ", 1)[0].rstrip(",;:") + "…"


def fit(tool: Tool, tokens: tuple[str, ...], weight: Mapping[str, float]) -> float:
    """The weight of the tokens that speak for a tool; what its description gives as another word counts the same."""
    return sum(
        weight.get(token, 0.0) if token in tool.about else weight.get(tool.synonyms.get(token, ""), 0.0)
        for token in dict.fromkeys(tokens)
    )
