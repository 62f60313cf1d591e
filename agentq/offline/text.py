"""Words, stems, sentences and weights: all that the stand-in knows about language. Pure and deterministic."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")
_SENTENCE_END = re.compile(r"(?<!e\.g\.)(?<!i\.e\.)(?<![ap]\.m\.)(?<!\bMr\.)(?<!\bNo\.)(?<=[.!?])\s+")
STEP = re.compile(r"^[ \t]{0,8}(?:\d{1,3}[.)]|[-*\u2022])\s+")
_VOWEL = re.compile(r"[aeiouy]")


def word_set(text: str) -> frozenset[str]:
    """The words of a list written as text."""
    return frozenset(text.split())


STOP_WORDS = word_set(
    """a about after again all also am an and any are aren't as at be been before being but by can can't cannot could
    did didn't do does doesn't doing don't for from get getting give go going got had has hasn't have haven't he hello
    her here hey hi him his how i i'd i'll i'm i've if in into is isn't it it's its just know let like may me might mine
    more most much must my need no nor not now of off ok on one only or other our out over please put really regards
    say see she should shouldn't so some soon still such tell than thank thanks that that's the their them then there
    these they this those to too up us use very want wanted was wasn't we we're well were what what's when where which
    while who whom why will with won't would wouldn't yet you you're your yours dear exactly actually currently
    anything something someone thing things else way much many make made two three four five until since back"""
)

# Irregular forms of everyday English; a stemmer by suffixes cannot see them.
_IRREGULAR = {
    "paid": "pay", "sent": "send", "bought": "buy", "broken": "break", "broke": "break", "lost": "lose",
    "taken": "take", "took": "take", "came": "come", "arrival": "arriv", "forgot": "forget", "forgotten": "forget",
    "chose": "choose", "chosen": "choose", "held": "hold", "kept": "keep", "wrote": "write", "people": "person",
    "spoke": "speak", "charger": "charg", "costs": "cost", "gone": "go", "humans": "human", "bill": "bill",
}  # fmt: skip


def words(text: str) -> list[str]:
    """Lower-case words and numbers, in order."""
    return _WORD.findall(text.lower().replace("\u2019", "'"))


@lru_cache(maxsize=50_000)
def stem(word: str) -> str:
    """A crude common form: ``refunded, refunds, refunding -> refund``; numbers and short words stay as they are."""
    word = _IRREGULAR.get(word, word)
    if word.endswith("'s"):
        word = word[:-2]
    if len(word) <= 3 or word[0].isdigit():
        return word
    for step in (_plural, _verb, _noun, _tail):
        word = step(word)
    return word


def _plural(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("sses", "shes", "ches", "xes", "zes")):
        return word[:-2]
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def _verb(word: str) -> str:
    for suffix in ("ing", "ed"):
        root = word.removesuffix(suffix)
        if root != word and len(root) >= 3 and _VOWEL.search(root):
            return root
    return word


def _noun(word: str) -> str:
    for suffix, least in (("ment", 3), ("ation", 4), ("ly", 4)):
        root = word.removesuffix(suffix)
        if root != word and len(root) >= least:
            return root
    return word


def _tail(word: str) -> str:
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "aeiou":
        word = word[:-1]
    if len(word) > 5 and word.endswith("y"):
        return word[:-1]
    return word[:-1] if len(word) > 4 and word.endswith("e") else word


@lru_cache(maxsize=8192)
def stems(text: str) -> tuple[str, ...]:
    """The stems of the words that carry meaning, in order, with repetitions."""
    return tuple(stem(word) for word in words(text) if word not in STOP_WORDS and (len(word) > 1 or word.isdigit()))


@lru_cache(maxsize=8192)
def stem_set(text: str) -> frozenset[str]:
    return frozenset(stems(text))


@lru_cache(maxsize=4096)
def sentences(text: str) -> tuple[str, ...]:
    """Sentences, trimmed, empty ones left out; a line that is a step of a list is one sentence, mark and all."""
    found: list[str] = []
    for line in text.splitlines():
        found += [line] if STEP.match(line) else _SENTENCE_END.split(line)
    return tuple(piece.strip() for piece in found if piece and piece.strip())


def weights(documents: Sequence[Iterable[str]]) -> dict[str, float]:
    """Inverse document frequency: ``ln(1 + n / df)``; a stem that every document has weighs ``ln 2``."""
    counts = Counter(token for document in documents for token in set(document))
    return {token: math.log(1 + len(documents) / count) for token, count in counts.items()}


def overlap(query: Iterable[str], document: frozenset[str], weight: Mapping[str, float]) -> float:
    """The summed weight of the query's distinct stems that the document has."""
    return sum(weight.get(token, 0.0) for token in set(query) if token in document)


def coverage(query: Iterable[str], document: frozenset[str], weight: Mapping[str, float]) -> float:
    """The share, 0 to 1, of the query's weight that the document has; unknown stems weigh as the rarest known."""
    tokens = set(query)
    rarest = max(weight.values(), default=1.0)
    total = sum(weight.get(token, rarest) for token in tokens)
    return sum(weight.get(token, rarest) for token in tokens if token in document) / total if total else 0.0


_ALTERNATIVES = re.compile(r"([A-Za-z]+)s? \(([a-z][a-z ,'-]{2,80})\)")


@lru_cache(maxsize=256)
def synonyms(text: str) -> Mapping[str, str]:
    """What a description teaches in brackets: ``refunds (money back)`` makes ``money`` and ``back`` mean ``refund``."""
    learned: dict[str, str] = {}
    for word, alternatives in _ALTERNATIVES.findall(text):
        if word.lower() not in STOP_WORDS:
            learned |= {alternative: stem(word.lower()) for alternative in stems(alternatives)}
    return learned
