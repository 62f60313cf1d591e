"""The lines of a batch: those of its input file, checked, and those of its output and error files. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from agentq.canonical import sha256
from agentq.offline import wire
from agentq.offline.calls import Answered
from agentq.offline.wire import MAX_BODY, Refusal

MAX_LINES = 50_000
MAX_PROBLEMS = 100  # that are told; more of them say nothing new
MAX_ID_CHARS = 512

Unanswered = Literal["batch_cancelled", "batch_expired", "request_timeout"]
_WHY: dict[Unanswered, str] = {
    "batch_cancelled": "The batch was cancelled before this request was executed.",
    "batch_expired": "This request could not be executed before the completion window expired.",
    "request_timeout": "The call to the model timed out.",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a file is no input of a batch; ``line`` counts from 1, None where it is the file as a whole."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None

    def as_openai(self) -> dict[str, Any]:
        return {"code": self.code, "message": self.message, "line": self.line, "param": self.param}


@dataclass(frozen=True, slots=True)
class Line:
    """A request as it stands in the file. Its body is read when it is answered, so that it takes no more memory."""

    custom_id: str
    raw: bytes

    @property
    def body(self) -> Any:
        return wire.read_object(self.raw)["body"]


@dataclass(slots=True)
class Input:
    """The lines of a file that have been checked, and what is wrong with it. All lines name one ``model``."""

    endpoint: str
    lines: list[Line] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    model: str | None = None
    _ids: set[str] = field(default_factory=set)

    def take(self, number: int, raw: bytes) -> None:
        """Check the next line; blank ones are passed over."""
        if not raw.strip() or len(self.problems) >= MAX_PROBLEMS:
            return
        try:
            custom_id, body = _read(raw, self.endpoint)
            self._fit(custom_id, body)
        except _Wrong as wrong:
            self.problems.append(Problem(wrong.code, str(wrong), number, wrong.param))
        else:
            self.lines.append(Line(custom_id, raw))

    def close(self) -> None:
        """There are no more lines."""
        if not self.lines and not self.problems:
            self.problems.append(Problem("empty_file", "The input file is empty: it has no request."))

    def _fit(self, custom_id: str, body: dict[str, Any]) -> None:
        if len(self.lines) >= MAX_LINES:
            raise _Wrong("too_many_tasks", f"A batch may have at most {MAX_LINES} requests.")
        if custom_id in self._ids:
            raise _Wrong(
                "duplicate_custom_id",
                f"The custom_id '{custom_id}' for this request is a duplicate of another request. "
                "The custom_id parameter must be unique for each request in a batch.",
                "custom_id",
            )
        self._ids.add(custom_id)
        model = body.get("model")
        if not isinstance(model, str):
            return  # its answer will say so
        self.model = self.model or model
        if model != self.model:
            raise _Wrong(
                "mismatched_model",
                f"The model '{model}' for this request does not match the rest of the batch. "
                "Each batch must contain requests for a single model.",
                "body.model",
            )


class _Wrong(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


def _read(raw: bytes, endpoint: str) -> tuple[str, dict[str, Any]]:
    """The custom_id and the body of a line. Raises ``_Wrong``."""
    if len(raw) > MAX_BODY:
        raise _Wrong("line_too_long", f"A line may have at most {MAX_BODY} bytes.")
    try:
        line = wire.read_object(raw)
    except ValueError:
        raise _Wrong("invalid_json_line", "This line is not parseable as valid JSON.") from None
    for name in ("custom_id", "method", "url", "body"):
        if line.get(name) is None:
            raise _Wrong("missing_required_parameter", f"Missing required parameter: '{name}'.", name)
    custom_id, body = line["custom_id"], line["body"]
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_ID_CHARS:
        raise _Wrong("invalid_custom_id", f"The custom_id is no text of 1 to {MAX_ID_CHARS} characters.", "custom_id")
    if line["method"] != "POST":
        raise _Wrong("invalid_method", "The method must be POST.", "method")
    if line["url"] != endpoint:
        raise _Wrong("url_mismatch", f"The URL does not match the endpoint of the batch, {endpoint}.", "url")
    if not isinstance(body, dict):
        raise _Wrong("invalid_type", "The body is no object.", "body")
    return custom_id, body


@dataclass(frozen=True, slots=True)
class Result:
    """A line of the output file, or of the error file where it ``failed``; with what it used.

    ``place`` is what the lines of a file are sorted by: it depends on the custom_id alone, and its order is not that of
    the input, so whoever reads the file must join by custom_id.
    """

    place: str
    failed: bool
    text: bytes
    input_tokens: int = 0
    output_tokens: int = 0


def result(batch_id: str, custom_id: str, made: Answered) -> Result:
    """The line of a call that was made."""
    action = made.action
    if action.time_out:
        return unanswered(batch_id, custom_id, "request_timeout")
    if action.status:
        return refused(batch_id, custom_id, Refusal(action.status, f"Injected failure {action.status}."))
    body = wire.write_openai(made.prompt, made.reply, usage=not action.no_usage)
    text = _text(batch_id, custom_id, _response(batch_id, custom_id, 200, body), None)
    if action.cut or action.malformed:
        text = text[: len(text) // 2] + b"\n"
    usage = body.get("usage", {})
    return Result(sha256(custom_id), False, text, usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0))


def refused(batch_id: str, custom_id: str, refusal: Refusal) -> Result:
    """The line of a call that was answered with an error."""
    body = wire.write_error("openai", refusal.status, refusal.message, param=refusal.param, code=refusal.code)
    answer = _response(batch_id, custom_id, refusal.status, body)
    return Result(sha256(custom_id), True, _text(batch_id, custom_id, answer, None))


def unanswered(batch_id: str, custom_id: str, code: Unanswered) -> Result:
    """The line of a call that has no answer."""
    return Result(sha256(custom_id), True, _text(batch_id, custom_id, None, {"code": code, "message": _WHY[code]}))


def _response(batch_id: str, custom_id: str, status: int, body: dict[str, Any]) -> dict[str, Any]:
    return {"status_code": status, "request_id": sha256(f"{batch_id}{custom_id}")[32:], "body": body}


def _text(batch_id: str, custom_id: str, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    line = {
        "id": f"batch_req_{sha256(f'{batch_id}{custom_id}')[:32]}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return json.dumps(line).encode() + b"\n"
