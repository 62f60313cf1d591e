"""Decides which tools a request needs, with which arguments and in which order. Stateless: each turn plans anew."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agentq.canonical import canonical_json
from agentq.offline.observe import Observation, observe
from agentq.offline.parts import NAMED_THING, Part, meaning, mood, split
from agentq.offline.prompt import Called, Turn
from agentq.offline.text import coverage, sentences, stems
from agentq.offline.toolbox import Param, Tool, Toolbox, find, fit, pick, shorten, toolbox

MAX_ENTITIES = 5  # calls of one tool for one part
ENOUGH_COVERED = 0.6  # share of a question's words that a tool must speak of to make a search needless
# Questions for advice or a rule: what a look-up says about one thing is not all of the answer.
_ADVICE = re.compile(
    r"\bwhat (?:can|should|do|must|could) i do\b|\bhow (?:do|can|should|would) (?:i|we)\b|\boptions\b"
    r"|\bwhat (?:happens|if|are my)\b|\b(?:can|may|could) i\b|\bam i (?:allowed|entitled|able)\b|\bdo you\b"
    r"|\bhow (?:long|much)\b|\bis (?:it|that) possible\b",
    re.IGNORECASE,
)
FEW_WORDS = 3  # a question with fewer words of its own leans on the one before it
_MINE = re.compile(r"\b(?:my|mine|our|i)\b", re.IGNORECASE)
_NOT = re.compile(r"\b(?:do not|don't|never|not)\b", re.IGNORECASE)
_BRACKETS = re.compile(r"\(\s*\)")
_POLITE = re.compile(r"^(?:hi|hello|hey|dear)\b[^.,!?]{0,30}[,.!]\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Want:
    """A call that a part of the request needs; ``missing`` names what the customer did not say."""

    tool: str
    arguments: dict[str, Any]
    part: int
    missing: tuple[Param, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.tool}{canonical_json(self.arguments)}"


@dataclass(frozen=True, slots=True)
class Plan:
    """``wants`` in order; ``ready`` are those to call now; none of them left means: answer."""

    parts: tuple[Part, ...]
    wants: tuple[Want, ...]
    ready: tuple[Want, ...]
    tools: Mapping[str, Tool]


def key_of(call: Called) -> str:
    return f"{call.name}{canonical_json(call.arguments)}"


def make_plan(turn: Turn) -> Plan:
    """What the request needs and what of it is still to be called."""
    box = toolbox(turn.tools)
    tools = box.tools
    parts = (*split(turn.request), *_parts_reopened(turn))
    wants = _Planner(turn, box, parts).wants()
    wants += _follow_ups(turn, tools, wants)
    wants = list({want.key + str(want.part): want for want in wants}.values())
    return Plan(parts, tuple(wants), tuple(_ready(turn, tools, wants)), tools)


def _parts_reopened(turn: Turn) -> tuple[Part, ...]:
    """Parts a reviewer found unanswered, quoted in its problems: they are looked up once more, by themselves."""
    known = {part.text for part in split(turn.request)}
    quoted = [q for problem in turn.problems if "answer" in problem for q in re.findall(r"'([^']{8,})'", problem)]
    return tuple(Part(text, "question") for text in dict.fromkeys(quoted) if text not in known)


class _Planner:
    """Plans the parts one by one; what one part names, later parts may refer to."""

    def __init__(self, turn: Turn, box: Toolbox, parts: tuple[Part, ...]) -> None:
        self.turn, self.tools, self.weight, self.parts = turn, box.tools, box.weight, parts
        self.distinct = math.log(1 + len(self.tools) / max(1, len(self.tools) // 2)) if self.tools else 0.0

    def wants(self) -> list[Want]:
        """The calls of all parts, without look-ups for another part of what is changed: they would be stale."""
        wants = [want for index in range(len(self.parts)) for want in self._part(index)]
        acted = {value: want.part for want in wants if (value := self._acted_on(want)) is not None}
        return [want for want in wants if self._is_fresh(want, acted)]

    def _acted_on(self, want: Want) -> Any:
        """The thing that a call changes, None for a call that reads."""
        tool = self.tools[want.tool]
        return want.arguments.get(tool.entity.name) if tool.entity and not tool.reads else None

    def _is_fresh(self, want: Want, acted: Mapping[Any, int]) -> bool:
        tool = self.tools[want.tool]
        if not tool.reads or tool.entity is None or want.missing:
            return True
        value = want.arguments[tool.entity.name]
        return acted.get(value, want.part) == want.part or value in find(tool.entity, self.parts[want.part].whole)

    def _part(self, index: int) -> list[Want]:
        part = self.parts[index]
        action = self._action(part) if part.mood == "request" else None
        if action is not None:
            return self._act(action, index)
        looked_up = self._look_up(index)
        if looked_up and any(want.missing for want in looked_up):
            return looked_up
        return [*looked_up, *self._search(index, looked_up)]

    def _action(self, part: Part) -> Tool | None:
        """The tool that does what a part orders: the one its words speak for, if they speak for one at all."""
        asking = [clause for clause in part.text.split(",") if mood(clause) == "request"]
        tokens = meaning(" ".join(asking) or part.text)
        doers = [tool for tool in self.tools.values() if not tool.reads]
        if not doers:
            return None
        best = max(doers, key=lambda tool: (fit(tool, tokens, self.weight), self._named(tool, part)))
        enough = fit(best, tokens, self.weight) >= self.distinct - 1e-9
        return best if enough and fit(best, tokens, self.weight) > self._best_reading(tokens) / 2 else None

    def _best_reading(self, tokens: tuple[str, ...]) -> float:
        return max((fit(tool, tokens, self.weight) for tool in self.tools.values() if tool.reads), default=0.0)

    def _named(self, tool: Tool, part: Part) -> int:
        return len(find(tool.entity, part.whole)) if tool.entity else 0

    def _act(self, tool: Tool, index: int) -> list[Want]:
        values = self._entities(tool.entity, index, inherit=True) if tool.entity else [None]
        if not values:
            return [Want(tool.name, {}, index, (tool.entity,) if tool.entity else ())]
        wants: list[Want] = []
        for value in values:
            arguments = self._fill(tool, index, value)
            for name in tool.first:
                before = self.tools[name]
                if before.entity and tool.entity and before.entity.name == tool.entity.name:
                    wants.append(Want(name, {before.entity.name: value}, index))
            wants.append(Want(tool.name, arguments, index))
        return wants

    def _look_up(self, index: int) -> list[Want]:
        """Calls of tools that read about a named thing, for each thing the part names or refers to."""
        part, wants = self.parts[index], []
        for tool in self.tools.values():
            if not tool.reads or tool.searches or tool.entity is None:
                continue
            tokens = meaning(part.text)
            fits = fit(tool, tokens, self.weight) >= self.distinct - 1e-9
            values = self._entities(tool.entity, index, inherit=part.refers_back or (fits and self._about_mine(part)))
            wants += [Want(tool.name, self._fill(tool, index, value), index) for value in values]
            asked = fits and self._about_mine(part) and coverage(tokens, tool.about, self.weight) >= ENOUGH_COVERED
            if not values and asked and part.mood != "statement":
                wants.append(Want(tool.name, {}, index, (tool.entity,)))
        return wants

    @staticmethod
    def _about_mine(part: Part) -> bool:
        return bool(_MINE.search(part.text))

    def _search(self, index: int, looked_up: list[Want]) -> list[Want]:
        """A search by the part's words, unless what is looked up speaks of all of them."""
        part = self.parts[index]
        about = frozenset[str]().union(*(self.tools[want.tool].about for want in looked_up))
        tokens, advice = meaning(part.text), is_advice(part)
        if looked_up and not advice and (not tokens or coverage(tokens, about, self.weight) >= ENOUGH_COVERED):
            return []
        if not tokens and not meaning(part.whole) and not leaning(self.parts, index):
            return []
        searching = [tool for tool in self.tools.values() if tool.searches]
        return [Want(tool.name, self._fill(tool, index, None), index) for tool in searching[:1]]

    def _entities(self, param: Param | None, index: int, *, inherit: bool) -> list[Any]:
        """Values the part names; else, if it may refer to them, those of the request, else of the conversation."""
        if param is None:
            return []
        part = self.parts[index]
        nearby = [part.text, part.context]
        if inherit:
            nearby += [other.whole for other in reversed(self.parts[:index])] + [self.turn.request]
            nearby += [message["content"] for message in reversed(self.turn.history)]
        return next((found for text in nearby if (found := find(param, text))), [])[:MAX_ENTITIES]

    def _fill(self, tool: Tool, index: int, entity: Any) -> dict[str, Any]:
        """Arguments for a call: the entity, and for the other parameters what the part (then the request) holds."""
        part, arguments = self.parts[index], {}
        for param in tool.params:
            if entity is not None and param is tool.entity:
                value: Any = entity
            elif param.kind == "words":
                value = self._words(tool, param, index) if param.required else None
            elif param.kind == "choice":
                value = pick(param, part.whole if tool.reads else self.turn.request)
            else:
                named = find(param, part.whole) or ([] if param.kind == "amount" else find(param, self.turn.request))
                value = named[0] if named else None
            if value is not None:
                arguments[param.name] = value
        return arguments

    def _words(self, tool: Tool, param: Param, index: int) -> str:
        part = self.parts[index]
        if tool.searches:
            return self._query(index, param)
        short = param.max_length <= 120 or param.name in ("subject", "title", "reason")
        text = part.text if short else self.turn.request
        return shorten(_POLITE.sub("", text), min(param.max_length, 100 if short else 2000))

    def _query(self, index: int, param: Param) -> str:
        """The part's own words; with those it leans on, where it has few of its own."""
        part, text = self.parts[index], self.parts[index].whole
        if before := leaning(self.parts, index):
            text = f"{before} {text}"
        elif index == 0 and part.refers_back and len(set(meaning(text))) < FEW_WORDS:
            said = [message["content"] for message in self.turn.history if message["role"] == "user"]
            text = f"{said[-1]} {text}" if said else text
        return shorten(_BRACKETS.sub("", NAMED_THING.sub("", text)), min(param.max_length, 300))


def is_advice(part: Part) -> bool:
    """Whether a part asks for advice or a rule."""
    return _ADVICE.search(part.whole) is not None


def leaning(parts: tuple[Part, ...], index: int) -> str:
    """What a part with few words of its own leans on: the nearest part before it that has some."""
    if len(set(meaning(parts[index].whole))) >= FEW_WORDS:
        return ""
    return next((part.whole for part in reversed(parts[:index]) if meaning(part.whole)), "")


def _follow_ups(turn: Turn, tools: Mapping[str, Tool], wants: list[Want]) -> list[Want]:
    """Calls that a result asks for by naming a tool which the request itself does not call for."""
    planned = {want.tool for want in wants}
    part_of = {want.key: want.part for want in wants}
    found: dict[str, Want] = {}
    for call in turn.calls:
        seen = observe(call.result or "")
        for name in () if seen.documents or seen.unusable else _named_tools(call.result or "", tools):
            if name not in planned and name not in found:
                found[name] = _follow_up(turn, tools[name], call, seen, part_of.get(key_of(call), 0))
    return list(found.values())


def _named_tools(result: str, tools: Mapping[str, Tool]) -> list[str]:
    return [
        name
        for name in tools
        if any(re.search(rf"\b{re.escape(name)}\b", s) and not _NOT.search(s) for s in sentences(result))
    ]


def _follow_up(turn: Turn, tool: Tool, call: Called, seen: Observation, part: int) -> Want:
    """The call filled from the request, the call whose result asked for it, and that result's own words."""
    source = f"{turn.request} {' '.join(str(value) for value in call.arguments.values())}"
    arguments: dict[str, Any] = {}
    for param in tool.params:
        if param.kind == "words":
            short = param.max_length <= 120 or param.name in ("subject", "title", "reason")
            text = seen.message if short else f"{turn.request} ({seen.message})"
            value: Any = shorten(text, min(param.max_length, 100 if short else 2000)) if param.required else None
        elif param.kind == "choice":
            value = pick(param, turn.request)
        else:
            value = next(iter(find(param, source)), None)
        if value is not None:
            arguments[param.name] = value
    missing = tuple(param for param in tool.required if param.name not in arguments)
    return Want(tool.name, arguments, part, missing)


def _ready(turn: Turn, tools: Mapping[str, Tool], wants: list[Want]) -> list[Want]:
    """Wanted calls without a result whose forerunners came back well; one that may be tried again is, once."""
    results: dict[str, list[Observation]] = {}
    for call in turn.calls:
        if call.result is not None:
            results.setdefault(key_of(call), []).append(observe(call.result))
    ready: list[Want] = []
    for want in wants:
        seen = results.get(want.key, [])
        again = len(seen) == 1 and seen[0].failed and seen[0].retryable and tools[want.tool].reads
        if want.missing or (seen and not again):
            continue
        if _may_follow(want, tools, wants, results):
            ready.append(want)
    unique = {want.key: want for want in ready}
    return list(unique.values())


def _may_follow(
    want: Want, tools: Mapping[str, Tool], wants: list[Want], results: Mapping[str, list[Observation]]
) -> bool:
    """Whether all calls that must come before it are done and did not fail."""
    entity = tools[want.tool].entity
    for other in wants:
        if other.tool not in tools[want.tool].first or entity is None:
            continue
        if entity.name in want.arguments and other.arguments.get(entity.name) != want.arguments[entity.name]:
            continue
        seen = results.get(other.key, [])
        if not seen or seen[-1].failed:
            return False
    return True


def asked_again(plan: Plan) -> list[Param]:
    """What the customer must say before the plan can go on, each once."""
    named: dict[str, Param] = {}
    for want in plan.wants:
        for param in want.missing:
            named.setdefault(param.name, param)
    return list(named.values())


def about(part: Part) -> tuple[str, ...]:
    """The stems of a part with its context, for comparing it with texts."""
    return meaning(part.whole) or stems(part.whole)
