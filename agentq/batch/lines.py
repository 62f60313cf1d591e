"""From a line of a file to a request, or to an error that names the line, the reason and the fix. Pure but for reading.

Two formats, told apart line by line:

    {"id": "mail-1", "input": "Where is my order?", "workflow": "support_desk", ...}      ours: a request plus an id
    {"custom_id": "mail-1", "method": "POST", "url": "/v1/chat/completions", "body": {...}}      OpenAI's batch format
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8 as BOM
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from agentq.batch.chat import BadBody, chat_request
from agentq.errors import InvalidRequest
from agentq.protocol import MAX_INPUT_BYTES, MAX_METADATA_BYTES, Priority, Request, parse_request
from agentq.run import Registered
from schemas.batch import LineFormat

MAX_LINE_BYTES = 6 * (MAX_INPUT_BYTES + MAX_METADATA_BYTES) + 64 * 1024  # JSON may need six bytes for one
MAX_ID_CHARS = 255
URL = "/v1/chat/completions"
NOT_IN_A_BATCH = {
    "idempotency_key": "its id is its identity in the batch",
    "key": "the runs of a batch wait in a line of the batch's own, where a key's caps would not count",
    "conversation": "the lines of a batch run in any order, the turns of a conversation do not",
    "conversation_policy": "the lines of a batch run in any order, the turns of a conversation do not",
    "debounce_key": "every line of a batch gets its own result",
    "debounce_s": "every line of a batch gets its own result",
    "singleton_key": "every line of a batch gets its own result",
}


@dataclass(frozen=True, slots=True)
class Good:
    """A line that can become a run."""

    line: int
    custom_id: str
    request: Request
    format: LineFormat


@dataclass(frozen=True, slots=True)
class Bad:
    """A line that cannot: why, and what to change. ``custom_id`` where it could be read."""

    line: int
    custom_id: str | None
    code: str
    message: str
    hint: str

    def as_error(self) -> dict[str, Any]:
        return {"code": self.code, "message": self.message, "hint": self.hint, "line": self.line}


@dataclass(frozen=True, slots=True)
class Defaults:
    """What holds for lines that do not say otherwise, and what holds for all: the tenant who pays, the workflows."""

    workflows: Mapping[str, Registered]
    tenant: str = "default"
    workflow: str = "default"
    priority: Priority = "batch"


def read_lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Number and bytes of every line that is not blank; None for one longer than MAX_LINE_BYTES, which is never held
    in memory whole."""
    number = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(MAX_LINE_BYTES)
            yield number, None
            continue
        if number == 1:
            raw = raw.removeprefix(BOM)
        if raw.strip():
            yield number, raw


def parse_line(line: int, raw: bytes | None, defaults: Defaults) -> Good | Bad:
    """The line as a request, or what is wrong with it. Never raises for anything a line may hold."""
    custom_id: str | None = None
    try:
        body = _json(raw)
        openai = "custom_id" in body or ("body" in body and "url" in body)
        custom_id = _id(body, "custom_id" if openai else "id")
        request = _openai(body, defaults) if openai else _ours(body, defaults)
        if request.workflow not in defaults.workflows:
            known = ", ".join(sorted(defaults.workflows))
            raise BadBody("unknown_workflow", f"There is no workflow {request.workflow!r}.", f"Known are {known}.")
    except (BadBody, InvalidRequest) as error:
        return Bad(line, custom_id, error.code, _storable(error.message), _storable(error.hint))
    return Good(line, custom_id, request, "openai" if openai else "agentq")


def _storable(text: str) -> str:
    """An error may quote a field's name, and that may hold what UTF-8 cannot."""
    return text.encode("utf-8", "backslashreplace").decode()


def _json(raw: bytes | None) -> dict[str, Any]:
    if raw is None:
        raise BadBody(
            "line_too_long", f"The line is longer than {MAX_LINE_BYTES} bytes.",
            "Shorten it; is every request on a line of its own?",
        )  # fmt: skip
    try:
        body = json.loads(raw.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise BadBody("invalid_utf8", f"Byte {error.start + 1} is no UTF-8.", "Save the file as UTF-8.") from None
    except RecursionError:
        raise BadBody("too_deep", "The line is nested too deep.", "Flatten it.") from None
    except json.JSONDecodeError as error:
        mark = raw.startswith(BOM)
        why = "a byte order mark, which only the file's start may have" if mark else error.msg.removesuffix(" at")
        raise BadBody(
            "invalid_json", f"Not JSON from column {error.colno} on: {why}.",
            "Write one JSON object a line, each whole on a line of its own.",
        ) from None  # fmt: skip
    except ValueError:  # a number of thousands of digits
        raise BadBody("invalid_json", "Not JSON: a number is too long.", "Send it as a string.") from None
    if not isinstance(body, dict):
        raise BadBody(
            "wrong_type", f"The line is a JSON {_name(body)}, not an object.",
            'Write one JSON object a line: {"id": ..., ...}.',
        )  # fmt: skip
    return body


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two values under one key JSON would keep the last: nobody knows which was meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise BadBody("duplicate_key", f"The key {twice[:80]!r} is in one object more than once.", "Keep one of them.")
    return found


def _name(value: Any) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _id(body: dict[str, Any], field: str) -> str:
    if field not in body:
        raise BadBody("missing_field", f"{field} is missing.", f"Give every line an {field!r} of its own.")
    value = body[field]
    if not isinstance(value, str):
        raise BadBody("wrong_type", f"{field} is a JSON {_name(value)}.", f"Send {field!r} as a string.")
    if not 1 <= len(value) <= MAX_ID_CHARS or not value.isprintable():
        raise BadBody(
            "invalid_value", f"{field} is not 1 to {MAX_ID_CHARS} printable characters.", "Use a short name or number."
        )
    return value


def _ours(body: dict[str, Any], defaults: Defaults) -> Request:
    for name, reason in NOT_IN_A_BATCH.items():
        if body.get(name) is not None:
            raise BadBody("not_in_a_batch", f"A line cannot have {name!r}: {reason}.", f"Remove {name!r}.")
    given = {name: value for name, value in body.items() if name != "id"}
    rest = {"workflow": defaults.workflow, "tenant": defaults.tenant, "priority": defaults.priority}
    request = parse_request(rest | given)
    if request.tenant != defaults.tenant:
        raise BadBody(
            "wrong_tenant", f"The line is of tenant {request.tenant!r}, the batch of {defaults.tenant!r}.",
            "One batch, one tenant: remove 'tenant', or submit a file for each tenant.",
        )  # fmt: skip
    return request


def _openai(body: dict[str, Any], defaults: Defaults) -> Request:
    if extra := sorted(body.keys() - {"custom_id", "method", "url", "body"}):
        raise BadBody("unknown_field", f"{extra[0]} is not known here.", "A line has custom_id, method, url and body.")
    for field, wanted in (("method", "POST"), ("url", URL)):
        if body.get(field, wanted) != wanted:
            raise BadBody(f"unsupported_{field}", f"{field} is not {wanted}.", f"Send {field!r}: {wanted!r}.")
    asked = chat_request(body.get("body"), defaults.workflow)
    return parse_request({**asked, "tenant": defaults.tenant, "priority": defaults.priority})
