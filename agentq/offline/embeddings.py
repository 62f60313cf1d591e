"""Vectors of texts by hashed words and letters: close where the words are alike, whatever they mean. Pure.

Feature hashing after Weinberger et al. (2009), "Feature Hashing for Large Scale Multitask Learning": each feature adds
its weight, with a sign, to one dimension; sign and dimension come from a hash. So unrelated texts are near 0.
"""

from __future__ import annotations

import base64
import json
import math
import re
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from agentq.offline.brain import estimate_tokens
from agentq.offline.prompt import Purpose
from agentq.offline.text import STOP_WORDS, stem
from agentq.offline.wire import Refusal

DIMENSIONS = 256
MAX_DIMENSIONS = 4096
MAX_INPUTS = 2048
MAX_TOKENS = 8192  # of one text, as OpenAI documents; it also bounds how long a vector takes
_WORD = re.compile(r"\w{1,64}")
_LETTERS_WEIGHT = 0.5  # of a word's letters, beside 1.0 for the word


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which vectors are asked for."""

    model: str
    texts: tuple[str, ...]
    dimensions: int = DIMENSIONS
    as_base64: bool = False

    @property
    def purpose(self) -> Purpose:
        return "embed"

    @property
    def last_user_text(self) -> str:
        return "\n".join(self.texts)


def read(body: dict[str, Any]) -> Wanted:
    """The body of POST /v1/embeddings. Raises ``Refusal``."""
    model, given = body.get("model"), body.get("input")
    if not isinstance(model, str) or not model:
        raise Refusal(400, "'model' must be a str and not empty.", param="model")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise Refusal(400, "'input' must be a string or a list of strings: there are no tokens here.", param="input")
    if not 1 <= len(texts) <= MAX_INPUTS or not all(texts):
        raise Refusal(400, f"'input' must have 1 to {MAX_INPUTS} strings, none of them empty.", param="input")
    if any(estimate_tokens(text) > MAX_TOKENS for text in texts):
        raise Refusal(400, f"A text may have at most {MAX_TOKENS} tokens.", param="input")
    size, form = body.get("dimensions"), body.get("encoding_format") or "float"
    size = DIMENSIONS if size is None else size
    if not isinstance(size, int) or not 1 <= size <= MAX_DIMENSIONS:
        raise Refusal(400, f"'dimensions' must be a number from 1 to {MAX_DIMENSIONS}.", param="dimensions")
    if form not in ("float", "base64"):
        raise Refusal(400, "'encoding_format' must be float or base64.", param="encoding_format")
    return Wanted(model, tuple(texts), size, form == "base64")


def vector(text: str, dimensions: int = DIMENSIONS) -> list[float]:
    """Of length 1. The same text has the same vector, on any machine."""
    found = [0.0] * dimensions
    for word, count in Counter(_words(text)).items():
        times = 1 + math.log(count)
        for place, weight in _features(word, dimensions):
            found[place] += times * weight
    length = math.sqrt(math.fsum(value * value for value in found))
    if not length:  # two features that cancel each other out: rare, but only in few dimensions
        return [1.0, *found[1:]]
    return [value / length for value in found]


def _words(text: str) -> Sequence[str]:
    """The words that carry meaning; where there are none all words, where there are no words the text."""
    words = _WORD.findall(text.casefold())
    return [word for word in words if word not in STOP_WORDS] or words or [text[:64]]


@lru_cache(maxsize=8192)
def _features(word: str, dimensions: int) -> tuple[tuple[int, float], ...]:
    """Place and weight of a word's features: its stem, and its letters by threes, which forgive forms and slips."""
    framed = f"<{word}>"
    threes = dict.fromkeys(framed[start : start + 3] for start in range(max(1, len(framed) - 2)))
    share = _LETTERS_WEIGHT / math.sqrt(len(threes))
    place, sign = _slot(f"word {stem(word)}", dimensions)
    letters = [_slot(three, dimensions) for three in threes]
    return ((place, sign), *((place, sign * share) for place, sign in letters))


@lru_cache(maxsize=32_768)
def _slot(feature: str, dimensions: int) -> tuple[int, float]:
    """The dimension and the sign of a feature."""
    number = int.from_bytes(blake2b(feature.encode(), digest_size=8).digest())
    return (number >> 1) % dimensions, 1.0 if number & 1 else -1.0


def write_one(wanted: Wanted, index: int) -> bytes:
    """The vector of one text, as it stands in the list; numbers of 32 bits in either format."""
    packed = struct.pack(f"<{wanted.dimensions}f", *vector(wanted.texts[index], wanted.dimensions))
    value = base64.b64encode(packed).decode() if wanted.as_base64 else struct.unpack(f"<{wanted.dimensions}f", packed)
    return json.dumps({"object": "embedding", "index": index, "embedding": value}).encode()


def write(wanted: Wanted, vectors: Sequence[bytes], *, usage: bool = True) -> bytes:
    """The answer. It is put together from the JSON of its parts, so that no step takes long."""
    tokens = sum(estimate_tokens(text) for text in wanted.texts)
    rest: dict[str, Any] = {"model": wanted.model}
    if usage:
        rest["usage"] = {"prompt_tokens": tokens, "total_tokens": tokens}
    return b'{"object": "list", "data": [%b], %b' % (b", ".join(vectors), json.dumps(rest).encode()[1:])
