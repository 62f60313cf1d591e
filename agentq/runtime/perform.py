"""Performing the one effect of a step: a model call or a tool call. Whatever happens becomes an outcome."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from agentq.engine.decision import Failed, Observed, Outcome, Replied
from agentq.engine.effects import ToolCallEffect
from agentq.errors import ProviderError
from agentq.llm.types import Llm
from agentq.place import place
from agentq.tools import Toolbox, ToolContext, ToolResult
from schemas.llm import LlmCall
from schemas.run import RunDoc

log = logging.getLogger(__name__)


async def perform(
    effect: LlmCall | ToolCallEffect, run: RunDoc, step_id: str, llm: Llm, toolbox: Toolbox, now_ms: Callable[[], int]
) -> Outcome:
    """Never raises but for cancellation: a bug in the transport or in the toolbox is a failed attempt.

    ``now_ms`` is the store's time: outcomes are compared with deadlines that were set by it.
    """
    try:
        if isinstance(effect, LlmCall):
            return Replied(await llm.complete(effect), now_ms())
        result = await _call_tool(effect, run, step_id, toolbox, now_ms)
        return Observed(result.ok, result.code, result.content, result.unknown_outcome, result.latency_ms, now_ms())
    except ProviderError as error:
        return Failed(error.code, error.message, error.retryable, error.retry_after_s, now_ms())
    except Exception as error:  # noqa: BLE001 - reported by class and place; its words may quote a person
        log.error("step %s of run %s failed unexpectedly: %s", step_id, run["_id"], place(error))
        return Failed("internal", f"{type(error).__name__} in the worker.", True, None, now_ms())


async def _call_tool(
    effect: ToolCallEffect, run: RunDoc, step_id: str, toolbox: Toolbox, now_ms: Callable[[], int]
) -> ToolResult:
    context = ToolContext(
        run_id=run["_id"],
        step_id=step_id,
        attempt=run["steps"][step_id]["attempt"],
        tenant=run["tenant"],
        user=run["user"],
        conversation=run["conversation"],
        agent=effect.agent or "",
        idempotency_key=f"{run['_id']}:{step_id}",
        # The tool's own time limit counts from its start; until then it may wait for a thread as long as the run may.
        deadline=time.monotonic() + run["deadline_at"].timestamp() - now_ms() / 1000,
    )
    return await toolbox.call(effect.name, effect.arguments, context, spec=effect.spec, allowed=effect.allowed)
