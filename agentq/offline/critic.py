"""Checks a draft against the request and the tool results; accepts it or names each problem."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from agentq.offline.observe import Observation, observe
from agentq.offline.parts import AMOUNT, EMAIL, IDENTIFIER, Part, meaning, split
from agentq.offline.prompt import Prompt, Reply
from agentq.offline.text import sentences, stem, stem_set, word_set, words

_SECTION = re.compile(r"^## (Request|Tool results|Draft answer)[ \t]*$", re.MULTILINE)
_RESULT = re.compile(r"^- (\w[\w.-]*)\((.*?)\) -> ", re.MULTILINE)
_NUMBER = re.compile(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?(?![\w-])")
_DATE = re.compile(r"\b\d{4}-\d{2}-\d{2}\b")
_CITATION = re.compile(r"\[([A-Z][A-Za-z]*-?\d[\w.-]*)\]")
_STEP_NUMBER = re.compile(r"^[ \t]{0,8}\d{1,3}[.)][ \t]+", re.MULTILINE)
_STATES = word_set(
    """delivered shipped processing cancelled canceled refunded lost returned pending approved declined rejected
    dispatched delayed paid unpaid resolved closed reopened escalated replaced expired"""
)
_UNCERTAIN = re.compile(
    r"\b(?:not|no|never|cannot|if|unless|until|once|when|after|before|would|could|can|may)\b|n't\b", re.I
)
_EXAMPLE = re.compile(r"\b(?:for example|e\.g\.|such as|looks? like),? [A-Z]{1,8}-?\d[\dA-Z-]*")
_ADMITS = re.compile(
    r"\b(?:no result|will check|sorry|"
    r"cannot|can't|could not|couldn't|unable|not possible|no (?:order|ticket|result|record|such)|nothing|"
    r"unfortunately|refused|not (?:be|found|allowed|refund|eligible)|failed|did not|does not|ended|already|only|must|"
    r"needs?|above|beyond)\b",
    re.IGNORECASE,
)
_ASKS_BACK = re.compile(r"\b(?:i need|please (?:send|give|tell)|could you (?:send|give|tell))\b", re.IGNORECASE)
_CANNOT = re.compile(
    r"\b(?:cannot (?:help|answer)|found nothing|don't know|do not know|unable to (?:help|answer))\b", re.I
)
SHARED_RUN = 6  # this many consecutive stems taken from a text count as a quotation


@dataclass(frozen=True, slots=True)
class Evidence:
    """One tool call as the critic sees it."""

    tool: str
    arguments: str
    raw: str
    seen: Observation

    @property
    def text(self) -> str:
        return f"{self.arguments} {self.raw}"


@dataclass(frozen=True, slots=True)
class Case:
    """What there is to check."""

    request: str
    results: tuple[Evidence, ...]
    draft: str

    @property
    def known(self) -> str:
        return " ".join([self.request, *(result.text for result in self.results)])


def answer(prompt: Prompt) -> Reply:
    """The verdict as JSON: accept, or revise with one sentence for each problem."""
    problems = review(read_case(prompt.last_user_text))
    return Reply(json.dumps({"verdict": "revise" if problems else "accept", "problems": problems}))


def read_case(text: str) -> Case:
    """The three sections of a critic's prompt. The draft is what follows its heading, headings of its own included."""
    marks: dict[str, re.Match[str]] = {}
    for match in _SECTION.finditer(text):
        marks.setdefault(match.group(1), match)

    def section(name: str, until: str | None) -> str:
        if name not in marks:
            return ""
        end = marks[until].start() if until in marks else len(text)
        return text[marks[name].end() : end].strip()

    return Case(
        section("Request", "Tool results"),
        _results(section("Tool results", "Draft answer")),
        section("Draft answer", None),
    )


def _results(text: str) -> tuple[Evidence, ...]:
    marks = list(_RESULT.finditer(text))
    ends = [*(mark.start() for mark in marks[1:]), len(text)][: len(marks)]
    return tuple(
        Evidence(mark.group(1), mark.group(2), raw := text[mark.end() : end].strip(), observe(raw))
        for mark, end in zip(marks, ends, strict=True)
    )


def review(case: Case) -> list[str]:
    """All problems of a draft, each once, ten at the most."""
    if not words(case.draft):
        return ["The draft is empty: write an answer to the request."]
    checks: tuple[Callable[[Case], list[str]], ...] = (
        _unsupported_ids, _unsupported_dates, _unsupported_numbers, _unsupported_states, _wrong_citations,
        _missing_citation, _hidden_failures, _unanswered_parts, _leaked_tools,
    )  # fmt: skip
    return list(dict.fromkeys(problem for check in checks for problem in check(case)))[:10]


def _unsupported(kind: str, item: str) -> str:
    return f"The draft states the {kind} '{item}', which neither request nor tool results hold: remove or correct it."


def _unsupported_ids(case: Case) -> list[str]:
    known = case.known.upper()
    stated = _EXAMPLE.sub("", _CITATION.sub("", case.draft))
    named = dict.fromkeys([*IDENTIFIER.findall(stated), *EMAIL.findall(stated)])
    return [_unsupported("identifier", item) for item in named if item.upper() not in known]


def _unsupported_dates(case: Case) -> list[str]:
    return [_unsupported("date", day) for day in dict.fromkeys(_DATE.findall(case.draft)) if day not in case.known]


def _plain_numbers(text: str) -> dict[str, float]:
    """The numbers of a text as written, without those inside ids, dates, citations and step marks."""
    for pattern in (_STEP_NUMBER, _CITATION, _DATE, IDENTIFIER, EMAIL):
        text = pattern.sub(" ", text)
    return {found: float(found.replace(",", "") or 0) for found in _NUMBER.findall(text)}


def _all_numbers(text: str) -> set[float]:
    return {float(found.replace(",", "")) for found in re.findall(r"\d[\d,]*(?:\.\d+)?", text)}


def _unsupported_numbers(case: Case) -> list[str]:
    """A number must occur somewhere; an amount of money must occur in the results, or in the request, as an amount."""
    known = _all_numbers(case.known)
    wrong = [text for text, value in _plain_numbers(case.draft).items() if value not in known]
    money = {float((a or b).replace(",", "")) for a, b in AMOUNT.findall(case.known)}
    for left, right in AMOUNT.findall(case.draft):
        amount = left or right
        value = float(amount.replace(",", ""))
        if value not in money and not _in_record(case, value) and amount not in wrong:
            wrong.append(amount)
    return [_unsupported("number", number) for number in wrong]


def _in_record(case: Case, value: float) -> bool:
    """Whether a JSON result holds the value as a number of its own (an amount in a field)."""
    return any(re.search(rf": {value:g}(?:\.0+)?0?\b", result.raw) for result in case.results)


def _unsupported_states(case: Case) -> list[str]:
    """A sentence about a named thing may give it only a state that the results about this thing give it."""
    problems: list[str] = []
    for sentence in sentences(case.draft):
        named = IDENTIFIER.findall(_CITATION.sub("", sentence))
        states = [word for word in words(sentence) if word in _STATES]
        if not states or not named or _UNCERTAIN.search(sentence):
            continue
        about = [result for result in case.results if any(item in result.text for item in named)]
        told = frozenset[str]().union(*(stem_set(result.raw) for result in about))
        problems += [
            f"The draft says that {' and '.join(dict.fromkeys(named))} is '{state}', which no result says: correct it."
            for state in states
            if stem(state) not in told
        ]
    return problems


def _wrong_citations(case: Case) -> list[str]:
    retrieved = {document.id for result in case.results for document in result.seen.documents}
    cited = dict.fromkeys(_CITATION.findall(case.draft))
    return [
        f"The draft cites '{name}', which was not retrieved: remove the citation."
        for name in cited
        if name not in retrieved
    ]


def _missing_citation(case: Case) -> list[str]:
    """What is taken from a retrieved text must name it."""
    cited = set(_CITATION.findall(case.draft))
    taken = _runs(case.draft)
    documents = {d.id: d for result in case.results for d in result.seen.documents}
    sourced = frozenset[tuple[str, ...]]().union(*(_runs(documents[name].text) for name in cited if name in documents))
    return [
        f"The draft takes sentences from {document.id} without citing it: add [{document.id}]."
        for document in documents.values()
        if document.id not in cited and len((taken & _runs(document.text)) - sourced) >= 3
    ]


@lru_cache(maxsize=1024)
def _runs(text: str) -> frozenset[tuple[str, ...]]:
    """All runs of SHARED_RUN consecutive stems."""
    found = [stem(word) for word in words(_CITATION.sub("", text))]
    return frozenset(tuple(found[i : i + SHARED_RUN]) for i in range(len(found) - SHARED_RUN + 1))


def _hidden_failures(case: Case) -> list[str]:
    """A refused call must be told, unless the same tool was called again for it and did it."""
    problems: list[str] = []
    for place, result in enumerate(case.results):
        if not result.seen.failed or any(_mends(later, result) for later in case.results[place + 1 :]):
            continue
        told = (set(meaning(result.seen.message)) or set(meaning(result.tool.replace("_", " ")))) & set(
            meaning(case.draft)
        )
        if not (_ADMITS.search(case.draft) and told):
            problems.append(
                f"The draft hides that {result.tool} failed ({result.seen.message[:160]}): tell the customer."
            )
    return problems


def _mends(later: Evidence, failed: Evidence) -> bool:
    return not later.seen.failed and (later.tool == failed.tool or failed.seen.unusable)


def _unanswered_parts(case: Case) -> list[str]:
    parts = split(case.request)
    if _ASKS_BACK.search(case.draft) or (
        _CANNOT.search(case.draft) and not _found(case) and (len(parts) == 1 or not case.results)
    ):
        return []
    return [
        f"The draft does not answer '{part.text}': answer it." for part in parts if not _answers(case, part, len(parts))
    ]


def _found(case: Case) -> bool:
    """Whether any result holds a record, and not texts alone."""
    return any(not result.seen.failed and result.seen.message for result in case.results)


def _answers(case: Case, part: Part, of: int) -> bool:
    """Whether the draft speaks of the part, or of what a result that belongs to the part says."""
    asked = frozenset(meaning(part.whole))
    named = list(dict.fromkeys(IDENTIFIER.findall(part.whole)))
    if not asked and not named:
        return True
    draft, written = frozenset(meaning(case.draft)), case.draft.upper()
    if named and all(item in written for item in named):
        return True
    if len(asked & draft) >= max(1, len(asked) // (3 if of == 1 else 2)):
        return True
    return any(_uses(case.draft, result) for result in case.results if of == 1 or _belongs(result, asked, named))


def _belongs(result: Evidence, asked: frozenset[str], named: list[str]) -> bool:
    about = frozenset(meaning(result.arguments)) | (
        frozenset() if result.seen.documents else frozenset(meaning(result.raw))
    )
    text = result.text.upper()
    return any(item in text for item in named) or len(asked & about) * 2 >= len(asked) > 0


def _uses(draft: str, result: Evidence) -> bool:
    """Whether the draft tells what a result says: an id of it, or at least three of its words in one sentence."""
    ids = set(IDENTIFIER.findall(result.text)) | {document.id for document in result.seen.documents}
    if any(item in draft for item in ids):
        return True
    said = frozenset(meaning(result.seen.message))
    return any(len(said & set(meaning(sentence))) >= 3 for sentence in sentences(draft))


def _leaked_tools(case: Case) -> list[str]:
    leaked = [r.tool for r in case.results if "_" in r.tool and r.tool in case.draft]
    return [
        f"The draft names the internal tool '{name}': say it in the customer's words." for name in dict.fromkeys(leaked)
    ]
