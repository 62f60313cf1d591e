"""The public surface is a promise: a change of it is made on purpose, here."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import agentq.client
import agentq.errors
import agentq.protocol
from agentq.client import Client, Handle, Outcome
from agentq.protocol import Request


def public(kind: type) -> list[str]:
    return sorted(name for name in vars(kind) if not name.startswith("_"))


def parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def defined(module: Any) -> list[str]:
    """The public names that a module defines itself, what it imports not counted."""
    names: set[str] = set()
    for node in ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body:
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                names.add(name)
            case ast.Assign(targets=targets):
                names.update(target.id for target in targets if isinstance(target, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
    return sorted(name for name in names if not name.startswith("_"))


def test_the_client() -> None:
    assert agentq.client.__all__ == ["Client", "Handle", "Outcome"]
    assert public(Client) == [
        "accept", "close", "drop_schedule", "events", "hand_in", "run", "schedule", "schedules", "submit",
        "submit_many",
    ]  # fmt: skip
    assert parameters(Client) == ["mongo_url", "broker_url", "database"]
    assert parameters(Client.submit) == [
        "input", "workflow", "tenant", "user", "conversation", "priority", "budget_usd", "deadline_s",
        "idempotency_key", "metadata", "key", "urgency", "conversation_policy", "at", "delay_s", "expires_at",
        "debounce_key", "debounce_s", "singleton_key", "webhook", "follow_up",
    ]  # fmt: skip
    assert parameters(Client.submit_many) == ["requests", "chunk"]
    assert parameters(Client.run) == parameters(Client.events) == ["run_id"]


def test_the_handle_and_the_outcome() -> None:
    assert public(Handle) == ["cancel", "estimated_start_s", "events", "outcome", "position", "status", "wait"]
    assert parameters(Handle.wait) == ["timeout_s"]
    assert parameters(Handle.cancel) == ["reason"]
    assert [*Outcome.__dataclass_fields__] == [
        "run_id", "status", "answer", "agent", "acceptance", "tools", "citations", "problems", "cost_usd", "latency_s",
        "error",
    ]  # fmt: skip


def test_the_request_and_the_protocol() -> None:
    assert [*Request.model_fields] == parameters(Client.submit)
    assert defined(agentq.protocol) == sorted(
        [
            "ASK_TASK", "ConversationPolicy", "FollowUp", "Hint", "INTAKE_QUEUE", "MAX_DEPTH", "MAX_INPUT_BYTES",
            "MAX_METADATA_BYTES", "Moment", "Notify", "POOLS", "Pool", "Priority", "Request", "RunStatus",
            "SUBMIT_TASK", "TERMINAL", "Webhook", "hint_message", "parse_request", "task_name",
        ]
    )  # fmt: skip


def test_the_names_that_other_languages_use() -> None:
    """A foreign application has these in its source: they never change."""
    assert (agentq.protocol.SUBMIT_TASK, agentq.protocol.ASK_TASK) == ("agentq.submit", "agentq.ask")
    assert agentq.protocol.INTAKE_QUEUE == "agentq"
    assert agentq.protocol.POOLS == ("router", "specialist", "critic", "tools")


def test_the_errors_and_their_codes() -> None:
    """Programs match on the codes."""
    codes = {name: getattr(agentq.errors, name).code for name in defined(agentq.errors)}
    assert codes == {
        "AgentqError": "internal",
        "ConfigError": "config_error",
        "Conflict": "conflict",
        "IdempotencyConflict": "idempotency_conflict",
        "InvalidRequest": "invalid_request",
        "NotFound": "not_found",
        "ProviderError": "provider_error",
        "QueueFull": "queue_full",
        "ToolError": "tool_error",
        "Unavailable": "unavailable",
        "UnknownWorkflow": "unknown_workflow",
    }
