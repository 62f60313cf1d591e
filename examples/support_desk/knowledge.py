"""The knowledge articles and a small BM25 search over them. Loaded once; pure afterwards."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml

FOLDER = Path(__file__).with_name("knowledge")
K1, B = 1.4, 0.6  # Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework", section 3.2
TITLE_WEIGHT = 3  # a word of the title counts as often
_WORD = re.compile(r"[a-z0-9]+")
_COMMON_WORDS = (
    "the an and or of to in on for is are was be it my me we you your do does did can how what when where why with at "
    "by from have has had this that not if as but so there their they will would could should please until since any "
    "one am been get got much many long more than also"
)
_COMMON = frozenset(_COMMON_WORDS.split())


@dataclass(frozen=True, slots=True)
class Article:
    id: str
    title: str
    tags: tuple[str, ...]
    text: str


def read_article(path: Path) -> Article:
    """One article with its front matter. Raises ValueError where it has none."""
    content = path.read_text(encoding="utf-8")
    parts = content.split("---\n", 2)
    if len(parts) != 3 or parts[0]:
        raise ValueError(f"{path.name} has no front matter")
    head = yaml.safe_load(parts[1])
    return Article(head["id"], head["title"], tuple(str(tag) for tag in head["tags"]), parts[2].strip())


@lru_cache(maxsize=1)
def articles() -> tuple[Article, ...]:
    """All articles, by number."""
    return tuple(read_article(path) for path in sorted(FOLDER.glob("*.md")))


def terms(text: str) -> list[str]:
    """Lower-case words without the most common ones and without the endings s, es, ed, ing."""
    return [_root(word) for word in _WORD.findall(text.lower()) if len(word) > 1 and word not in _COMMON]


def _root(word: str) -> str:
    for ending in ("ing", "es", "ed", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 4 and not word.endswith("ss"):
            word = word.removesuffix(ending)
            break
    return word.rstrip("e") if len(word) > 4 else word


class Index:
    """BM25 over title, tags and text."""

    def __init__(self, documents: tuple[Article, ...]) -> None:
        self._documents = documents
        self._counts = [
            Counter(terms(f"{' '.join([document.title] * TITLE_WEIGHT)} {' '.join(document.tags)} {document.text}"))
            for document in documents
        ]
        lengths = [sum(count.values()) for count in self._counts]
        average = sum(lengths) / max(1, len(lengths))
        self._norms = [K1 * (1 - B + B * length / average) for length in lengths]
        spread = Counter(term for count in self._counts for term in count)
        total = len(documents)
        self._idf = {term: math.log(1 + (total - df + 0.5) / (df + 0.5)) for term, df in spread.items()}

    def search(self, query: str, limit: int = 3) -> list[Article]:
        """The best articles, best first; none that shares no word with the query."""
        asked = set(terms(query))
        scored = [
            (sum(self._idf[t] * count[t] * (K1 + 1) / (count[t] + norm) for t in asked if t in count), index)
            for index, (count, norm) in enumerate(zip(self._counts, self._norms, strict=True))
        ]
        best = sorted((pair for pair in scored if pair[0] > 0), key=lambda pair: (-pair[0], pair[1]))
        return [self._documents[index] for _, index in best[:limit]]


@lru_cache(maxsize=1)
def index() -> Index:
    return Index(articles())
