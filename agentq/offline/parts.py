"""Reads a request: its parts (what is asked, in what mood), and the entities in it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from agentq.offline.text import sentences, stem, stems, word_set, words

Mood = Literal["question", "request", "problem", "statement"]

_QUESTION_START = re.compile(
    r"^(?:(?:and|so|but|also|then|hi|hello|hey|ok|okay|oh|second(?:ly)?|besides)[, ]+)*"
    r"(?:what|when|where|why|how|who|which|whose|(?:is|are|was|were|do|does|did|has|have|will|should|may|am)"
    r"(?! not\b)|"
    r"can i(?! (?:get|have|speak|talk|cancel))|could i(?! (?:get|have|speak|talk))|must i|can it|"
    r"any (?:news|update))\b",
    re.IGNORECASE,
)
_ASKS_TO_KNOW = re.compile(
    r"\b(?:tell me|let me know|explain|want to know|like to know|need to know|wonder(?:ing)?|show me|look up|"
    r"check (?:on|if|whether|when|where|the status)|"
    r"have a question)\b",
    re.IGNORECASE,
)
_REQUEST = re.compile(
    r"\b(?:please|i(?: just| only| really)? (?:want|need|demand|insist|expect|request)|"
    r"i(?:'d| would)(?: just)? (?:like|love|prefer)|"
    r"(?:want|wish) to|you (?:can|may)(?! see)|"
    r"give me|let me|get me|connect me|put me|transfer me|can you|could you|will you|would you|you should|"
    r"(?:can|could|may) i (?:get|have|speak|talk|cancel))\b",
    re.IGNORECASE,
)
_PROBLEM = re.compile(
    r"\b(?:not|never|broken?|error|problem|stuck|fail(?:s|ed|ing)?|issue|damaged?|wrong|missing|lost|crack(?:s|ed)?|"
    r"defect(?:ive)?|dead|freez(?:es|ing)|frozen|crash(?:es|ed)?|blink(?:s|ing)?|leak(?:s|ing)?|stop(?:s|ped)|"
    r"no longer|nothing|twice|strange|noise)\b|n't\b",
    re.IGNORECASE,
)
_ALSO = re.compile(r"^(?:also|and also|besides|in addition|another|second(?:ly)?|furthermore|one more|plus)\b", re.I)
_IMPERATIVE = word_set(
    "refund cancel open close create add update change escalate send give tell explain check help show connect "
    "transfer return replace note look find track stop make put append attach escalate"
)
# Where one sentence holds two asks: before a question word or a verb that gives an order.
_JOINT = re.compile(
    r"(?:[,;]\s{0,3}|\s{1,3})(?:and|but|then|plus)(?:,?\s+also|\s+then)?,?\s+(?=(?:(?:also|please)\s+)?"
    r"(?:what|when|where|why|how|who|which|can|could|is there|are there|do you|does(?! not)|will|would|please|tell|"
    r"refund|cancel|open|create|explain|i(?:'d| would) like|i (?:want|need))\b)|;\s+",
    re.IGNORECASE,
)
_BACK_REFERENCE = re.compile(
    r"\b(?:it|its|it's|that|this|they|them|those|these|one|same|"
    r"there|the (?:order|ticket|refund|parcel|package|money))\b",
    re.IGNORECASE,
)
_GREETING = re.compile(r"^(?:hi|hello|hey|dear|good (?:morning|afternoon|evening))\b[^.!?]{0,30}[,.!]?$", re.IGNORECASE)

# Bounded and anchored at the left, here as below: requests may be 256 KiB of anything.
EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}")
IDENTIFIER = re.compile(r"\b[A-Z]{1,8}-?\d[\dA-Z-]*\b")
# Numbers of orders, tickets and the like; not E4 or S7, which a text about a device may speak of.
NAMED_THING = re.compile(r"\b[A-Z]{1,8}(?:-\d|\d{3})[\dA-Z-]*\b|\b[a-z]{1,4}-\d[\w-]*", re.ASCII)
AMOUNT = re.compile(
    r"(?:[$€£]|\b(?:usd|eur|gbp)\s?)\s?(\d[\d,]{0,15}(?:\.\d{1,9})?)"
    r"|(?<![\d,])(\d[\d,]{0,15}(?:\.\d{1,9})?)\s?(?:usd|eur|gbp|dollars?|euros?|pounds?|bucks|[$€£])",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Part:
    """One thing a request asks. ``context`` holds the sentences that only explain it."""

    text: str
    mood: Mood
    context: str = ""

    @property
    def whole(self) -> str:
        return f"{self.context} {self.text}".strip()

    @property
    def goes_on(self) -> bool:
        """Whether it is a clause that goes on with the sentence of the part before it."""
        return self.text[:1].islower()

    @property
    def refers_back(self) -> bool:
        """Whether it speaks of something named elsewhere (``it``, ``the order``)."""
        return bool(_BACK_REFERENCE.search(self.text))


def mood(sentence: str) -> Mood:
    """What kind of sentence it is: to be answered, to be done, a complaint, or none of these."""
    if _ASKS_TO_KNOW.search(sentence) or _QUESTION_START.search(sentence):
        return "question"
    if _REQUEST.search(sentence) or _starts_with_order(sentence):
        return "request"
    if sentence.rstrip().endswith("?"):
        return "question"
    return "problem" if _PROBLEM.search(sentence) else "statement"


def _starts_with_order(sentence: str) -> bool:
    first = [word for word in words(sentence)[:4] if word not in {"and", "also", "then", "just", "so", "now"}]
    return bool(first) and first[0] in _IMPERATIVE


@lru_cache(maxsize=1024)
def split(request: str) -> tuple[Part, ...]:
    """The parts of a request, in order; never empty for a text with a word in it."""
    parts: list[Part] = []
    waiting: list[str] = []
    for sentence in _clauses(request):
        kind = mood(sentence)
        if kind in ("question", "request"):
            if waiting and _ALSO.match(sentence) and any(mood(earlier) == "problem" for earlier in waiting):
                parts.append(_story(waiting))
                waiting = []
            parts.append(Part(sentence, kind, " ".join(waiting)))
            waiting = []
        elif parts and not _ALSO.match(sentence) and kind == "problem" and not waiting:
            parts[-1] = Part(parts[-1].text, parts[-1].mood, f"{parts[-1].context} {sentence}".strip())
        else:
            if _ALSO.match(sentence) and waiting:
                parts.append(_story(waiting))
                waiting = []
            waiting.append(sentence)
    if waiting and (not parts or any(_ALSO.match(sentence) for sentence in waiting)):
        parts.append(_story(waiting))
    elif waiting:
        parts[-1] = Part(parts[-1].text, parts[-1].mood, f"{parts[-1].context} {' '.join(waiting)}".strip())
    return tuple(_merge_empty(parts))


def _clauses(request: str) -> list[str]:
    found = [clause.strip(" ,") for sentence in sentences(request) for clause in _JOINT.split(sentence)]
    return [clause for clause in found if clause and not _GREETING.match(clause) and words(clause)]


def _story(told: list[str]) -> Part:
    text = " ".join(told)
    return Part(text, "problem" if _PROBLEM.search(text) else "statement")


def _merge_empty(parts: list[Part]) -> list[Part]:
    """A part that says nothing of its own ('Can you help me?') joins its neighbour."""
    if len(parts) < 2:
        return parts
    merged: list[Part] = []
    for part in parts:
        if merged and not _says_something(part):
            merged[-1] = Part(merged[-1].text, merged[-1].mood, f"{merged[-1].context} {part.whole}".strip())
        elif merged and not _says_something(merged[-1]):
            merged[-1] = Part(part.text, part.mood, f"{merged[-1].whole} {part.context}".strip())
        else:
            merged.append(part)
    return merged


def _says_something(part: Part) -> bool:
    return bool(meaning(part.whole) or NAMED_THING.search(part.whole))


# Words that a request is wrapped in, not what it is about.
_WRAPPING = (
    "help question ask wonder issue problem sorry sir madam team support hope check look explain long take happen work "
    "option mean possible"
)
_EMPTY = frozenset(stem(word) for word in _WRAPPING.split())


def meaning(text: str) -> tuple[str, ...]:
    """The stems that say what a text is about: without entities, numbers and polite phrases."""
    bare = NAMED_THING.sub(" ", EMAIL.sub(" ", text))
    return tuple(token for token in stems(bare) if token not in _EMPTY and not token.isdigit())


def shapes(text: str) -> frozenset[str]:
    """The forms of the numbers a text names: ``AB-0000`` for AB-1234 and ab-9876."""
    return frozenset(re.sub(r"\d", "0", found.upper()) for found in NAMED_THING.findall(text))
