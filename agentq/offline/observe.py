"""Reads a tool's result: a refusal, a record, a list of texts, or plain words."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from agentq.offline.text import sentences

_REFUSED = re.compile(r"^\s*(?:tool )?(?:error|refused|failed)\b[^:]{0,60}:\s*", re.IGNORECASE)
_SAYING = ("summary", "message", "text", "content", "answer", "description")
_RETRY = re.compile(r"\b(?:try again|gave no answer|timed out|time-out|unavailable)\b", re.IGNORECASE)
_SPEAKS_OF_REFUSAL = re.compile(
    r"\b(?:no|not|cannot|can't|never|refused?|failed|failure|error|ended|already|above|beyond|unknown|denied)\b", re.I
)
_UNUSABLE = re.compile(r"\b(?:unknown tool|no tool|invalid arguments?|arguments do not fit|not permitted)\b", re.I)
_TO_THE_MODEL = re.compile(
    r"\b[a-z]+(?:_[a-z]+)+\b|\b(?:the|this|permitted) tools?\b|\b(?:the|this|same) call\b|\bcall (?:it )?again\b|"
    r"\barguments\b|\bgo on without\b|\bsay (?:that|what)\b|\bit took effect\b|\banswer with what you know\b",
    re.IGNORECASE,
)
_SAY_THAT = re.compile(r"\bsay that ([^.;]+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Document:
    """A text with an id that can be cited."""

    id: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Observation:
    """A result as read. ``message``: what it says to a person, in sentences; empty for documents alone.

    ``retryable``: the same call may work later. ``unusable``: the call itself was wrong (its name, its arguments).
    """

    failed: bool
    message: str
    documents: tuple[Document, ...] = ()
    retryable: bool = False
    unusable: bool = False


@lru_cache(maxsize=1024)
def observe(result: str) -> Observation:
    """Total: any text is read as something. Words that are no JSON and speak of a refusal are a failure."""
    refused = _REFUSED.match(result)
    body = result[refused.end() :] if refused else result
    try:
        value: Any = json.loads(body)
    except ValueError:
        return _refusal(body) if refused or _SPEAKS_OF_REFUSAL.search(body) else _content(body)
    if isinstance(value, dict) and (error := value.get("error")):
        return _refusal(error)
    return _refusal(value) if refused else _content(value)


def _refusal(value: Any) -> Observation:
    if isinstance(value, dict):
        message = " ".join(str(value[key]) for key in ("message", "hint") if value.get(key)) or json.dumps(value)
        return Observation(True, _for_people(message), retryable=bool(value.get("retryable")))
    text = str(value)
    return Observation(
        True, _for_people(text), retryable=bool(_RETRY.search(text)), unusable=bool(_UNUSABLE.search(text))
    )


def _for_people(message: str) -> str:
    """What the message says to the customer: not the sentences that name tools or calls (those speak to the model),
    but what they want to be said."""
    told = [f"{wish[0].upper()}{wish[1:]}." for wish in _SAY_THAT.findall(message)]
    return " ".join([*(s for s in sentences(message) if not _TO_THE_MODEL.search(s)), *told])


def _content(value: Any) -> Observation:
    documents = _documents(value)
    if documents:
        return Observation(False, "", documents)
    if isinstance(value, dict):
        return Observation(False, _record(value))
    if isinstance(value, list):
        return Observation(False, "\n".join(_record(v) if isinstance(v, dict) else str(v) for v in value))
    return Observation(False, _for_people(str(value)))


def _documents(value: Any) -> tuple[Document, ...]:
    """Texts with ids, in a list or under the one key of an object that holds such a list."""
    lists = [value] if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else []
    for items in lists:
        if isinstance(items, list) and items and all(isinstance(item, dict) for item in items):
            found = [_document(item) for item in items]
            if all(found):
                return tuple(document for document in found if document)
    return ()


def _document(item: dict[str, Any]) -> Document | None:
    name, text = item.get("id"), next((item[key] for key in ("text", "content", "body") if item.get(key)), None)
    return Document(str(name), str(item.get("title", "")), str(text)) if name and text else None


def _record(record: dict[str, Any]) -> str:
    """What a record says of itself in words, else its plain values as sentences."""
    for key in _SAYING:
        if isinstance(record.get(key), str) and record[key].strip():
            return _for_people(str(record[key]))
    plain = {key: value for key, value in record.items() if isinstance(value, str | int | float) and value != ""}
    return " ".join(f"The {key.replace('_', ' ')} is {value}." for key, value in plain.items())
