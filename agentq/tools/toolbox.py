"""The tool runner: permission, arguments, time limit, size limit; every failure becomes an observation."""

from __future__ import annotations

import asyncio
import contextvars
import importlib
import json
import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError as JsonSchemaViolation
from pydantic import ValidationError
from referencing import Registry

from agentq.errors import ConfigError
from agentq.place import place
from agentq.tools.declare import Tool, ToolContext, declared_tool
from agentq.tools.result import Outcome, ToolResult, failed, limit_bytes, not_begun, succeeded, timed_out
from agentq.tools.threads import Refused, ThreadPool
from schemas.catalog import ToolSpec

log = logging.getLogger(__name__)

CANCEL_GRACE_S = 1.0  # how long a cancelled async tool may clean up
_VIOLATIONS = 20  # told to the model at most
_VIOLATION_CHARS = 200
_CACHED_VALIDATORS = 1024


class Toolbox:
    """The tools of this process and the threads that plain functions run in.

    ``threads`` bounds the plain functions at work at once; a call that finds none free waits for one within its
    context's deadline. ``hung_per_tool`` bounds the abandoned threads of one tool: past it, its calls are refused at
    once until one ends. Threads start on demand, so a toolbox that calls nothing costs nothing. Safe to use from
    several threads and event loops.
    """

    def __init__(self, tools: Iterable[Tool] = (), *, threads: int = 32, hung_per_tool: int = 8) -> None:
        self._tools = {tool.name: tool for tool in tools}
        self._threads: ThreadPool[Outcome] = ThreadPool(threads, hung_per_group=hung_per_tool)
        self._validators: dict[int, tuple[ToolSpec, Draft202012Validator]] = {}
        self._tasks: set[asyncio.Task[Outcome]] = set()

    @property
    def specs(self) -> dict[str, ToolSpec]:
        """Every tool by name, as its function declares it."""
        return {name: tool.spec for name, tool in self._tools.items()}

    @property
    def hung(self) -> dict[str, int]:
        """How many abandoned calls of each tool still hold a thread."""
        return self._threads.hung

    def close(self) -> None:
        """Take no more calls; idle threads end, hanging ones are left behind (they are daemons)."""
        self._threads.close()

    async def call(
        self,
        name: str,
        arguments: dict[str, Any] | str,
        context: ToolContext,
        *,
        allowed: Collection[str],
        spec: ToolSpec | None = None,
    ) -> ToolResult:
        """Call one tool on a model's behalf.

        ``allowed`` are the names this agent may call. ``spec`` is the tool as the run pinned it (default: as its
        function declares it now): its schema, limits and effect hold. The time limit is the smaller of the tool's and
        what is left until ``context.deadline``; past it an async function is cancelled, a plain one abandoned.

        Raises nothing for what a model or a tool does; ``CancelledError`` of the caller passes, and then an effect
        that had begun may still happen.
        """
        began = time.monotonic()
        tool = self._tools.get(name)
        spec = spec or (tool.spec if tool else None)
        try:
            outcome = await self._outcome(name, tool, spec, arguments, context, allowed)
        except Exception as error:  # noqa: BLE001 - reported by class and place; its words may quote a person
            # Reached only through a fault of ours or a broken pinned schema; the run must still get its observation.
            log.error("the call of tool %r broke off: %s", name, place(error))
            outcome = failed(error)
        if outcome.code in ("exception", "timeout"):
            # Where, not what: an exception's words may quote what a person wrote.
            log.warning("tool %r of run %s ended with %s %s", name, context.run_id, outcome.code, outcome.origin)
        content, truncated = limit_bytes(outcome.content, spec.max_result_bytes if spec else 16_384)
        changes = any(known.effect != "read" for known in (spec, tool.spec if tool else None) if known)
        return ToolResult(
            ok=outcome.code == "ok",
            code=outcome.code,
            content=content,
            truncated=truncated,
            latency_ms=round((time.monotonic() - began) * 1000),
            unknown_outcome=outcome.began and changes,
        )

    async def _outcome(
        self,
        name: str,
        tool: Tool | None,
        spec: ToolSpec | None,
        arguments: dict[str, Any] | str,
        context: ToolContext,
        allowed: Collection[str],
    ) -> Outcome:
        if tool is None or spec is None:
            return not_begun("unknown_tool", f"There is no tool {name[:64]!r}. {self._choices(allowed)}")
        if name not in allowed:
            return not_begun("not_permitted", f"You are not permitted to call {name!r}. {self._choices(allowed)}")
        values = self._bind(tool, spec, arguments, context)
        if isinstance(values, Outcome):
            return values
        limit_s = min(spec.timeout_s, context.deadline - time.monotonic())
        if limit_s <= 0:
            return not_begun("timeout", "No time is left for this call; it was not made. Answer with what you know.")
        if tool.is_async:
            return await self._in_loop(tool, values, limit_s)
        return await self._in_thread(tool, values, spec.timeout_s, context.deadline)

    def _choices(self, allowed: Collection[str]) -> str:
        permitted = sorted(name for name in allowed if name in self._tools)
        if not permitted:
            return "No tools are permitted; answer without."
        return f"Permitted tools: {', '.join(permitted)}."

    # -- arguments --------------------------------------------------------------------------------------------------

    def _bind(
        self, tool: Tool, spec: ToolSpec, arguments: dict[str, Any] | str, context: ToolContext
    ) -> dict[str, Any] | Outcome:
        try:
            sent = _json_object(arguments)
            violations = [_violation(error) for error in self._validator(spec).iter_errors(sent)]
            if not violations:
                return tool.bind(sent, context)
        except RecursionError:
            violations = ["$: nested too deeply"]
        except ValidationError as error:
            violations = [
                f"{_json_path(fault['loc'])}: {fault['msg']}"
                for fault in error.errors(include_url=False, include_context=False, include_input=False)
            ]
        except ValueError as error:
            violations = [f"$: {error}"]
        except Exception as error:  # noqa: BLE001  a validator in the tool's own types failed, before the tool began
            return replace(failed(error), began=False)
        told = "; ".join(sorted(violation[:_VIOLATION_CHARS] for violation in violations)[:_VIOLATIONS])
        more = f" (and {len(violations) - _VIOLATIONS} more)" if len(violations) > _VIOLATIONS else ""
        return not_begun("bad_arguments", f"The arguments do not fit: {told}{more}. Correct them and call again.")

    def _validator(self, spec: ToolSpec) -> Draft202012Validator:
        # Keyed by identity because a spec holds a dict; the entry keeps its spec alive, so the id cannot be reused.
        cached = self._validators.get(id(spec))
        if cached is not None:
            return cached[1]
        if len(self._validators) >= _CACHED_VALIDATORS:
            self._validators.clear()
        # An empty registry: the default one would fetch a foreign $ref over the network.
        validator = Draft202012Validator(spec.parameters, registry=Registry())
        self._validators[id(spec)] = (spec, validator)
        return validator

    # -- performing -------------------------------------------------------------------------------------------------

    async def _in_thread(self, tool: Tool, values: dict[str, Any], limit_s: float, deadline: float) -> Outcome:
        work = partial(contextvars.copy_context().run, _observe, tool.function, values)
        job = self._threads.submit(tool.name, work)
        future = asyncio.wrap_future(job.future)
        began = time.monotonic()
        try:
            while not future.done():
                # The limit counts from the thread's start: waiting for a free thread is not the tool's fault.
                started = job.started_at
                due = deadline if started is None else min(deadline, started + limit_s)
                left = due - time.monotonic()
                if left <= 0:
                    break
                await asyncio.wait({future}, timeout=min(left, limit_s))
        except asyncio.CancelledError:
            self._threads.give_up(job)
            raise
        where = self._threads.give_up(job)
        if where == "running":
            return timed_out(min(limit_s, deadline - (job.started_at or began)))
        if where == "waiting":
            return not_begun("timeout", "No thread was free in time; the call was not made. Answer with what you know.")
        try:
            return job.future.result()
        except Refused as refusal:
            return not_begun("exception", f"The call was not made: {refusal} Go on without this tool.")

    async def _in_loop(self, tool: Tool, values: dict[str, Any], limit_s: float) -> Outcome:
        task = asyncio.get_running_loop().create_task(_observe_async(tool.function, values))
        self._tasks.add(task)  # the loop holds tasks weakly, and one that ignores its cancellation outlives this call
        task.add_done_callback(self._tasks.discard)
        try:
            await asyncio.wait({task}, timeout=limit_s)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=CANCEL_GRACE_S)
        if task.done() and not task.cancelled():
            return task.result()
        return timed_out(limit_s)


def load_toolbox(modules: Sequence[str], *, threads: int = 32) -> Toolbox:
    """Import ``modules`` and collect the functions that ``@tool`` decorated in them.

    Raises ``ConfigError`` (``details["module"]`` names the one at fault) where a module does not import, declares no
    tool, or two different functions bear one name.
    """
    tools: dict[str, Tool] = {}
    for path in modules:
        found = [tool for value in vars(_import(path)).values() if (tool := declared_tool(value))]
        if not found:
            raise ConfigError(
                f"Module {path!r} declares no tool.", hint="Decorate its functions with @tool(...).", module=path
            )
        for tool in found:
            other = tools.setdefault(tool.name, tool)
            if other.function is not tool.function:
                raise ConfigError(
                    f"Two tools are named {tool.name!r}: {_origin(other)} and {_origin(tool)}.",
                    hint="Rename one with @tool(name=...).",
                    module=path,
                )
    return Toolbox(tools.values(), threads=threads)


def _import(path: str) -> ModuleType:
    try:
        return importlib.import_module(path)
    except ConfigError as error:
        raise ConfigError(error.message, hint=error.hint, **{**error.details, "module": path}) from None
    except ModuleNotFoundError as error:
        if error.name is not None and (path == error.name or path.startswith(f"{error.name}.")):
            hint = "Correct the name, or put the module beside tools.yaml or its folder on PYTHONPATH."
        else:
            hint = f"Install or correct {error.name!r}, which it imports."
        raise ConfigError(f"Module {path!r} cannot be imported: {error}.", hint=hint, module=path) from error
    except Exception as error:
        raise ConfigError(
            f"Module {path!r} cannot be imported: {type(error).__name__}: {error}.",
            hint="Correct the module; importing it must have no effect that can fail.",
            module=path,
        ) from error


def _origin(tool: Tool) -> str:
    return f"{tool.function.__module__}.{tool.function.__qualname__}"


def _json_object(arguments: Any) -> dict[str, Any]:
    """The arguments as one JSON object; raises ValueError in words for the model. Nothing is repaired or guessed."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(arguments, dict):
        raise ValueError("the arguments must be one JSON object")
    try:
        json.dumps(arguments, allow_nan=False)
    except TypeError as error:
        raise ValueError(f"not JSON ({error})") from None
    except ValueError:
        raise ValueError("NaN and infinite numbers are not JSON") from None
    return arguments


def _violation(error: JsonSchemaViolation) -> str:
    """``$.path: what is wrong``; of alternatives (anyOf), what is wrong with each."""
    if not error.context:
        return f"{error.json_path}: {error.message[:_VIOLATION_CHARS]}"
    reasons = dict.fromkeys(_violation(inner) for inner in error.context)
    return " or ".join(reasons)


def _json_path(loc: tuple[int | str, ...]) -> str:
    return "$" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)


def _observe(function: Callable[..., Any], values: dict[str, Any]) -> Outcome:
    try:
        return succeeded(function(**values))
    except BaseException as error:  # noqa: BLE001  even SystemExit of a tool must not end a worker's thread
        return failed(error)


async def _observe_async(function: Callable[..., Any], values: dict[str, Any]) -> Outcome:
    task = asyncio.current_task()
    try:
        return succeeded(await function(**values))
    except GeneratorExit:
        raise
    except asyncio.CancelledError as error:
        if task is not None and task.cancelling():
            raise
        return failed(error)  # the tool's own, not ours
    except BaseException as error:  # noqa: BLE001  SystemExit in a task would end the event loop
        return failed(error)
