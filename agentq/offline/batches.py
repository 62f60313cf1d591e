"""A batch as OpenAI describes one: what is asked for, its statuses with their times, and the list of them. Pure.

validating -> in_progress -> finalizing -> completed | expired
validating -> failed                                                    the file is no input
validating | in_progress -> cancelling -> cancelled
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from agentq.offline.batch_lines import Problem, Result
from agentq.offline.wire import Refusal

Status = Literal[
    "validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"
]  # fmt: skip
ENDPOINTS = ("/v1/chat/completions",)
WINDOW = "24h"
_NEXT: Mapping[Status, tuple[Status, ...]] = {
    "validating": ("in_progress", "failed", "cancelling"),
    "in_progress": ("finalizing", "cancelling"),
    "finalizing": ("completed", "expired"),
    "cancelling": ("cancelled",),
}
_LIMIT = re.compile(r"[1-9][0-9]?|100")


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked for when a batch is created."""

    input_file_id: str
    endpoint: str
    metadata: dict[str, str] | None = None


def read_order(body: dict[str, Any]) -> Order:
    """The body of POST /v1/batches. Raises ``Refusal``."""
    for name in ("input_file_id", "endpoint", "completion_window"):
        if body.get(name) is None:
            message = f"Missing required parameter: '{name}'."
            raise Refusal(400, message, param=name, code="missing_required_parameter")
    file_id = body["input_file_id"]
    if not isinstance(file_id, str):
        raise Refusal(400, "input_file_id is no string.", param="input_file_id", code="invalid_type")
    if body["endpoint"] not in ENDPOINTS:
        supported = f"This stand-in supports {', '.join(ENDPOINTS)}."
        raise Refusal(400, f"Unknown endpoint. {supported}", param="endpoint", code="invalid_value")
    if body["completion_window"] != WINDOW:
        message = f"The completion_window must be '{WINDOW}'."
        raise Refusal(400, message, param="completion_window", code="invalid_value")
    return Order(file_id, body["endpoint"], _metadata(body.get("metadata")))


def _metadata(value: Any) -> dict[str, str] | None:
    """At most 16 texts of at most 512 characters, under names of at most 64."""
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise Refusal(400, "metadata is no object of strings.", param="metadata", code="invalid_type")
    if len(value) > 16 or any(len(name) > 64 or len(text) > 512 for name, text in value.items()):
        message = "metadata may have 16 entries, names of 64 and values of 512 characters."
        raise Refusal(400, message, param="metadata", code="invalid_value")
    return value


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch at one moment. Times in unix seconds; ``at`` holds when a status was reached."""

    id: str
    order: Order
    created_at: int
    expires_at: int
    status: Status = "validating"
    at: Mapping[Status, int] = field(default_factory=dict)
    model: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    problems: tuple[Problem, ...] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None

    def moved(self, status: Status, now: float) -> Batch:
        """In the next status."""
        assert status in _NEXT.get(self.status, ()), f"{self.status} is not followed by {status}"
        return replace(self, status=status, at={**self.at, status: int(now)})

    def cancelled(self, now: float) -> Batch:
        """On its way to be cancelled; asked again, nothing changes. Raises ``Refusal`` (409) where it is too late."""
        if self.status == "cancelling":
            return self
        if "cancelling" not in _NEXT.get(self.status, ()):
            raise Refusal(409, f"Cannot cancel a batch with status '{self.status}'.")
        return self.moved("cancelling", now)

    def counted(self, result: Result) -> Batch:
        """With one more line answered. Lines that are never answered count as neither completed nor failed."""
        return replace(
            self,
            completed=self.completed + (not result.failed),
            failed=self.failed + result.failed,
            input_tokens=self.input_tokens + result.input_tokens,
            output_tokens=self.output_tokens + result.output_tokens,
        )

    def as_openai(self) -> dict[str, Any]:
        problems = [problem.as_openai() for problem in self.problems]
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.order.endpoint,
            "model": self.model,
            "errors": {"object": "list", "data": problems} if problems else None,
            "input_file_id": self.order.input_file_id,
            "completion_window": WINDOW,
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            "in_progress_at": self.at.get("in_progress"),
            "expires_at": self.expires_at,
            "finalizing_at": self.at.get("finalizing"),
            "completed_at": self.at.get("completed"),
            "failed_at": self.at.get("failed"),
            "expired_at": self.at.get("expired"),
            "cancelling_at": self.at.get("cancelling"),
            "cancelled_at": self.at.get("cancelled"),
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "usage": {
                "input_tokens": self.input_tokens,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": self.output_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": self.input_tokens + self.output_tokens,
            },
            "metadata": self.order.metadata,
        }


def page(newest_first: Sequence[Batch], after: str | None, limit: str | None) -> dict[str, Any]:
    """A page of the list: ``limit`` batches (20) that stand behind ``after``. Raises ``Refusal``."""
    if limit is not None and not _LIMIT.fullmatch(limit):
        raise Refusal(400, "limit is no number from 1 to 100.", param="limit", code="invalid_value")
    ids = [batch.id for batch in newest_first]
    if after is not None and after not in ids:
        raise Refusal(404, f"No batch found with id '{after[:80]}'.", param="after")
    start, count = 0 if after is None else ids.index(after) + 1, int(limit or 20)
    shown = newest_first[start : start + count]
    return {
        "object": "list",
        "data": [batch.as_openai() for batch in shown],
        "first_id": shown[0].id if shown else None,
        "last_id": shown[-1].id if shown else None,
        "has_more": start + count < len(ids),
    }
