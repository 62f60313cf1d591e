"""``Toolbox.call``: whatever a model or a tool does becomes an observation the run can go on with."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal
from types import ModuleType
from typing import Annotated, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, BeforeValidator, Field

from agentq.errors import ConfigError
from agentq.tools import Toolbox, ToolContext, ToolError, ToolResult, load_toolbox, tool
from agentq.tools.declare import declared_tool

PATIENCE_S = 10.0


class Item(BaseModel):
    sku: Annotated[str, Field(pattern="^[A-Z]+$")]
    quantity: Annotated[int, Field(ge=1)] = 1


@tool()
def add(a: int, b: int = 2) -> int:
    """Add two numbers."""
    return a + b


@tool()
def order(items: list[Item], day: date | None = None) -> dict[str, Any]:
    """Order items."""
    return {"items": items, "day": day}


@tool(effect="write")
def refuse(x: int) -> None:
    """Say no."""
    raise ToolError("Orders over 100 need approval.", hint="Ask a person.")


@tool(effect="write")
def crash(x: str) -> None:
    """Break."""
    raise KeyError(x)


def box(*functions: Callable[..., Any], **options: Any) -> Toolbox:
    return Toolbox([found for function in functions if (found := declared_tool(function))], **options)


@pytest.fixture
async def toolbox() -> AsyncIterator[Toolbox]:
    toolbox = box(add, order, refuse, crash)
    yield toolbox
    toolbox.close()


async def call(toolbox: Toolbox, name: str, arguments: Any, context: ToolContext, **options: Any) -> ToolResult:
    options.setdefault("allowed", list(toolbox.specs))
    async with asyncio.timeout(PATIENCE_S):
        return await toolbox.call(name, arguments, context, **options)


# -- what comes back ------------------------------------------------------------------------------------------------


async def test_a_result_is_json_text(toolbox: Toolbox, context: ToolContext) -> None:
    result = await call(toolbox, "add", {"a": 1}, context)
    assert result == ToolResult(True, "ok", "3", False, result.latency_ms, False)
    assert 0 <= result.latency_ms < 5_000


async def test_arguments_may_be_json_text(toolbox: Toolbox, context: ToolContext) -> None:
    """A codec hands over what it could not read; valid text is used, anything else explained, nothing repaired."""
    assert (await call(toolbox, "add", '{"a": 1, "b": 1}', context)).content == "2"
    broken = await call(toolbox, "add", '{"a": 1', context)
    assert broken.code == "bad_arguments"
    assert "not valid JSON" in broken.content
    assert (await call(toolbox, "add", "[1]", context)).code == "bad_arguments"


async def test_the_function_gets_models_and_the_result_may_hold_them(toolbox: Toolbox, context: ToolContext) -> None:
    result = await call(toolbox, "order", {"items": [{"sku": "AB"}], "day": "2026-11-21"}, context)
    assert json.loads(result.content) == {"items": [{"sku": "AB", "quantity": 1}], "day": "2026-11-21"}


async def test_all_violations_are_told_with_their_paths(toolbox: Toolbox, context: ToolContext) -> None:
    result = await call(toolbox, "order", {"items": [{"sku": "a", "quantity": 0}, {}], "extra": 1}, context)
    assert (result.ok, result.code, result.unknown_outcome) == (False, "bad_arguments", False)
    for part in ("$.items[0].sku", "$.items[0].quantity", "$.items[1]: 'sku' is a required", "'extra'", "call again"):
        assert part in result.content


async def test_what_json_schema_cannot_check_is_checked_by_type(toolbox: Toolbox, context: ToolContext) -> None:
    """JSON Schema takes any string for a date; the binding does not."""
    result = await call(toolbox, "order", {"items": [], "day": "someday"}, context)
    assert result.code == "bad_arguments"
    assert "$.day" in result.content


async def test_alternatives_are_explained(toolbox: Toolbox, context: ToolContext) -> None:
    result = await call(toolbox, "order", {"items": [], "day": 5}, context)
    assert "$.day: 5 is not of type 'string' or $.day: 5 is not of type 'null'" in result.content


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1, 2}])
async def test_what_is_no_json_is_refused(toolbox: Toolbox, context: ToolContext, value: Any) -> None:
    """``amount <= limit`` must never meet a NaN."""
    assert (await call(toolbox, "add", {"a": value}, context)).code == "bad_arguments"


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 100_000, '{"a": ' + "9" * 10_000 + "}"])
async def test_hostile_text_is_refused(toolbox: Toolbox, context: ToolContext, text: str) -> None:
    assert (await call(toolbox, "add", text, context)).code == "bad_arguments"


async def test_deep_arguments_are_refused(toolbox: Toolbox, context: ToolContext) -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    assert (await call(toolbox, "add", {"a": deep}, context)).code == "bad_arguments"


async def test_an_unknown_tool_names_the_permitted_ones(toolbox: Toolbox, context: ToolContext) -> None:
    result = await call(toolbox, "subtract", {}, context, allowed=["order", "add", "gone"])
    assert result.code == "unknown_tool"
    assert "Permitted tools: add, order." in result.content


async def test_a_tool_the_agent_may_not_call_is_not_called(toolbox: Toolbox, context: ToolContext) -> None:
    result = await call(toolbox, "crash", {"x": "y"}, context, allowed=[])
    assert (result.code, result.unknown_outcome) == ("not_permitted", False)
    assert "No tools are permitted" in result.content


async def test_a_tools_own_refusal_reaches_the_model_in_its_words(toolbox: Toolbox, context: ToolContext) -> None:
    result = await call(toolbox, "refuse", {"x": 1}, context)
    assert result.code == "tool_error"
    assert result.content == "Orders over 100 need approval. Ask a person."
    assert result.unknown_outcome is False


async def test_a_crash_is_told_without_a_traceback_and_leaves_the_effect_unknown(
    toolbox: Toolbox, context: ToolContext, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says where it happened and not what: the words of an exception may be personal."""
    result = await call(toolbox, "crash", {"x": "secret words"}, context)
    assert (result.code, result.unknown_outcome) == ("exception", True)
    assert "KeyError: 'secret words'" in result.content
    assert "Traceback" not in result.content
    assert "in crash" in caplog.text
    assert "secret" not in caplog.text


async def test_the_pinned_specification_holds(toolbox: Toolbox, context: ToolContext) -> None:
    """A run keeps the schema, limits and effect it started with; what the code says now counts where stricter."""
    specs = toolbox.specs
    stricter = specs["add"].model_copy(update={"parameters": {"required": ["b"]}})
    assert "'b' is a required" in (await call(toolbox, "add", {"a": 1}, context, spec=stricter)).content
    smaller = specs["add"].model_copy(update={"max_result_bytes": 1})
    assert (await call(toolbox, "add", {"a": 10, "b": 10}, context, spec=smaller)).truncated is True
    read = specs["crash"].model_copy(update={"effect": "read"})
    assert (await call(toolbox, "crash", {"x": "y"}, context, spec=read)).unknown_outcome is True


async def test_a_broken_pinned_schema_is_an_observation(toolbox: Toolbox, context: ToolContext) -> None:
    for schema in ({"type": "objekt"}, {"$ref": "http://127.0.0.1:9/schema"}, {"properties": {"a": {"pattern": "("}}}):
        spec = toolbox.specs["add"].model_copy(update={"parameters": schema})
        result = await call(toolbox, "add", {"a": "x"}, context, spec=spec)
        assert (result.ok, result.unknown_outcome) == (False, False), schema


class ObjectId:
    """Named like BSON's."""

    def __str__(self) -> str:
        return "656f"


class Rude(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


def raiser(error: BaseException) -> Callable[[], None]:
    def run() -> None:
        raise error

    return run


def circular() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("give", "code", "content"),
    [
        (lambda: None, "ok", "null"),
        (lambda: "ü", "ok", '"ü"'),
        (lambda: datetime(2026, 11, 21, tzinfo=UTC), "ok", '"2026-11-21T00:00:00Z"'),
        (
            lambda: {"price": Decimal("1.10"), "tags": {"a"}, 1: (2,)},
            "ok",
            '{"price": "1.10", "tags": ["a"], "1": [2]}',
        ),
        (lambda: [ObjectId()], "ok", '["656f"]'),
        (lambda: "\ud800", "ok", '"?"'),
        (lambda: float("nan"), "exception", "ValueError"),
        (lambda: {"x": float("inf")}, "exception", "ValueError"),
        (object, "exception", "returned a object"),
        (circular, "exception", "ValueError"),
        (lambda: b"\xff", "exception", "Error"),
        (raiser(SystemExit(3)), "exception", "SystemExit"),
        (raiser(KeyboardInterrupt()), "exception", "KeyboardInterrupt"),
        (raiser(asyncio.CancelledError()), "exception", "CancelledError"),
        (raiser(TimeoutError()), "exception", "TimeoutError"),
        (raiser(Rude()), "exception", "Rude"),
        (raiser(ValueError("x" * 10_000)), "exception", "ValueError: xxx"),
        (raiser(ToolError("")), "tool_error", "refused"),
    ],
)
async def test_every_return_and_raise_becomes_an_observation(
    context: ToolContext, give: Callable[[], Any], code: str, content: str, asynchronous: bool
) -> None:
    @tool()
    def plain() -> Any:
        """Give it."""
        return give()

    @tool(name="plain")
    async def coroutine() -> Any:
        """Give it."""
        return give()

    toolbox = box(coroutine if asynchronous else plain)
    result = await call(toolbox, "plain", {}, context)
    toolbox.close()
    assert result.code == code
    assert content in result.content
    assert len(result.content) < 600


def explode(value: Any) -> Any:
    raise RuntimeError("boom")


async def test_a_validator_that_crashes_is_an_observation_and_nothing_began(context: ToolContext) -> None:
    @tool(effect="irreversible")
    def fragile(x: Annotated[int, BeforeValidator(explode)]) -> None:
        """Never reached."""

    result = await call(box(fragile), "fragile", {"x": 1}, context)
    assert (result.code, result.unknown_outcome) == ("exception", False)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4),
    max_leaves=12,
)
LIKELY = st.fixed_dictionaries({}, optional={"items": JSON, "day": JSON, "a": JSON, "b": JSON, "x": JSON})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(arguments=LIKELY | JSON | st.text(), name=st.sampled_from(["add", "order", "refuse", "crash"]) | st.text())
def test_no_arguments_make_a_call_raise(context: ToolContext, arguments: Any, name: str) -> None:
    """Any JSON, any text, any name: a result in UTF-8 within the limit, and ok only where the tool ran."""

    async def once() -> ToolResult:
        toolbox = box(add, order, refuse, crash)
        try:
            return await call(toolbox, name, arguments, context)
        finally:
            toolbox.close()

    result = asyncio.run(once())
    assert result.ok == (result.code == "ok")
    assert len(result.content.encode()) <= 16_384
    if result.ok:
        json.loads(result.content)


@given(text=st.text(), limit=st.integers(1, 200))
def test_a_result_is_cut_at_a_character_and_says_so(text: str, limit: int) -> None:
    from agentq.tools.result import limit_bytes

    cut, truncated = limit_bytes(text, limit)
    assert len(cut.encode()) <= limit
    assert truncated == (len(text.encode("utf-8", "replace")) > limit)
    if truncated:
        assert "..."[:limit] in cut
    else:
        assert cut == text.encode("utf-8", "replace").decode()


# -- time -----------------------------------------------------------------------------------------------------------


class Gate:
    """Holds whoever enters until the test opens it."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()

    def pass_through(self) -> None:
        self.entered.set()
        self.opened.wait(PATIENCE_S)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


def hanging(gate: Gate, *, effect: Any = "write", timeout_s: float = 0.02) -> Callable[..., Any]:
    @tool(effect=effect, timeout_s=timeout_s)
    def hang() -> str:
        """Hang until the test lets go."""
        gate.pass_through()
        return "late"

    return hang


@tool()
def quick() -> str:
    """Answer at once."""
    return threading.current_thread().name


async def test_a_hanging_tool_is_abandoned_at_its_limit(context: ToolContext, gate: Gate) -> None:
    toolbox = box(hanging(gate))
    result = await call(toolbox, "hang", {}, context)
    assert (result.code, result.unknown_outcome) == ("timeout", True)
    assert "within 0.02 s" in result.content
    assert toolbox.hung == {"hang": 1}
    toolbox.close()


async def test_a_read_that_times_out_leaves_nothing_unknown(context: ToolContext, gate: Gate) -> None:
    toolbox = box(hanging(gate, effect="read"))
    assert (await call(toolbox, "hang", {}, context)).unknown_outcome is False
    toolbox.close()


async def test_hanging_tools_do_not_starve_others(context: ToolContext, gate: Gate) -> None:
    """Two threads, six hanging calls: the others are still served, because abandoned threads are replaced."""
    toolbox = box(hanging(gate), quick, threads=2, hung_per_tool=100)
    results = await asyncio.gather(*(call(toolbox, "hang", {}, context) for _ in range(6)))
    assert [result.code for result in results] == ["timeout"] * 6
    assert (await call(toolbox, "quick", {}, context)).ok
    assert toolbox.hung == {"hang": 6}
    toolbox.close()


async def test_a_tool_that_keeps_hanging_is_refused_until_it_ends(context: ToolContext, gate: Gate) -> None:
    """The number of abandoned threads is bounded; the refusal is immediate, clear, and leaves nothing unknown."""
    toolbox = box(hanging(gate), quick, threads=1, hung_per_tool=2)
    results = await asyncio.gather(*(call(toolbox, "hang", {}, context) for _ in range(4)))
    assert sorted(result.code for result in results) == ["exception", "exception", "timeout", "timeout"]
    refused = next(result for result in results if result.code == "exception")
    assert "2 earlier calls of this tool still hang" in refused.content
    assert refused.unknown_outcome is False
    assert (await call(toolbox, "quick", {}, context)).ok
    gate.opened.set()
    await eventually(lambda: toolbox.hung == {})
    assert (await call(toolbox, "hang", {}, context)).ok
    toolbox.close()


async def test_waiting_for_a_thread_is_not_charged_to_the_tool(context: ToolContext, gate: Gate) -> None:
    """One thread, many calls: each has its whole limit from the moment it starts."""
    toolbox = box(hanging(gate, timeout_s=0.05), quick, threads=1)
    blocked = asyncio.create_task(call(toolbox, "hang", {}, context))
    await eventually(gate.entered.is_set)
    waiting = [asyncio.create_task(call(toolbox, "quick", {}, context)) for _ in range(5)]
    assert all(result.ok for result in await asyncio.gather(*waiting))
    assert (await blocked).code == "timeout"
    toolbox.close()


async def test_the_deadline_bounds_the_wait_for_a_thread(context: ToolContext, gate: Gate) -> None:
    toolbox = box(hanging(gate, timeout_s=5), threads=1)
    blocked = asyncio.create_task(call(toolbox, "hang", {}, context))
    await eventually(gate.entered.is_set)
    late = await call(toolbox, "hang", {}, replace(context, deadline=time.monotonic() + 0.05))
    assert (late.code, late.unknown_outcome) == ("timeout", False)
    assert "No thread was free" in late.content
    gate.opened.set()
    assert (await blocked).content == '"late"'
    toolbox.close()


async def test_no_call_begins_after_the_deadline(toolbox: Toolbox, context: ToolContext) -> None:
    result = await call(toolbox, "crash", {"x": "y"}, replace(context, deadline=time.monotonic()))
    assert (result.code, result.unknown_outcome) == ("timeout", False)
    assert "not made" in result.content


async def test_an_async_tool_is_cancelled_at_its_limit(context: ToolContext) -> None:
    ended = asyncio.Event()

    @tool(effect="write", timeout_s=0.02)
    async def forever() -> None:
        """Wait."""
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    result = await call(box(forever), "forever", {}, context)
    assert (result.code, result.unknown_outcome) == ("timeout", True)
    assert ended.is_set()


async def test_an_async_tool_that_ends_while_it_is_cancelled_is_believed(context: ToolContext) -> None:
    """What it did is known then, and that is worth more than the limit."""

    @tool(effect="write", timeout_s=0.02)
    async def stubborn() -> str:
        """Wait."""
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "done after all"
        return ""

    assert (await call(box(stubborn), "stubborn", {}, context)).content == '"done after all"'


async def test_the_callers_cancellation_passes_and_reaches_the_tool(context: ToolContext, gate: Gate) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    @tool()
    async def forever() -> None:
        """Wait."""
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    toolbox = box(forever, hanging(gate, timeout_s=60))
    task = asyncio.create_task(call(toolbox, "forever", {}, context))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()

    task = asyncio.create_task(call(toolbox, "hang", {}, context))
    await eventually(gate.entered.is_set)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert toolbox.hung == {"hang": 1}
    toolbox.close()


async def test_a_closed_toolbox_refuses(context: ToolContext, gate: Gate) -> None:
    toolbox = box(hanging(gate, timeout_s=60), quick, threads=1)
    running = asyncio.create_task(call(toolbox, "hang", {}, context))
    waiting = asyncio.create_task(call(toolbox, "quick", {}, context))
    await eventually(gate.entered.is_set)
    toolbox.close()
    assert "shut down" in (await waiting).content
    assert "shut down" in (await call(toolbox, "quick", {}, context)).content
    gate.opened.set()
    assert (await running).ok


async def test_calls_run_side_by_side(context: ToolContext) -> None:
    """Three threads: three calls that wait for each other all end."""
    meeting = threading.Barrier(3)

    @tool()
    def meet() -> int:
        """Wait for two others."""
        return meeting.wait(PATIENCE_S)

    toolbox = box(meet, threads=3)
    results = await asyncio.gather(*(call(toolbox, "meet", {}, context) for _ in range(3)))
    assert sorted(result.content for result in results) == ["0", "1", "2"]
    toolbox.close()


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110  threads change what is awaited, and tell no loop
            await asyncio.sleep(0.002)


# -- loading --------------------------------------------------------------------------------------------------------


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    def make(name: str, **contents: Any) -> str:
        made = ModuleType(name)
        made.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, made)
        return name

    return make


def test_the_decorated_functions_of_the_modules_are_collected_once(module: Callable[..., str]) -> None:
    """A re-export is the same tool, an undecorated function none."""
    first = module("tools_one", add=add, other=print)
    second = module("tools_two", add=add, refuse=refuse)
    assert set(load_toolbox([first, second]).specs) == {"add", "refuse"}
    assert load_toolbox([]).specs == {}


def test_two_functions_of_one_name_are_refused(module: Callable[..., str]) -> None:
    @tool(name="add")
    def other() -> None:
        """Another."""

    with pytest.raises(ConfigError, match="Two tools are named 'add'") as caught:
        load_toolbox([module("tools_one", add=add), module("tools_two", other=other)])
    assert caught.value.details["module"] == "tools_two"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("x = 1", "declares no tool"),
        ("import no_such_module_at_all", "Install or correct 'no_such_module_at_all'"),
        ("raise OSError('no disk')", "OSError: no disk"),
        ("def broken(:", "SyntaxError"),
        ("from agentq.tools import tool\n@tool()\ndef f(x):\n    'Doc.'", "parameter 'x' has no annotation"),
    ],
)
def test_a_module_that_cannot_serve_is_named(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, source: str, reason: str
) -> None:
    name = f"tools_broken_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=reason) as caught:
        load_toolbox([name])
    assert caught.value.details["module"] == name


def test_a_module_that_does_not_exist_says_where_to_put_it() -> None:
    with pytest.raises(ConfigError, match="PYTHONPATH"):
        load_toolbox(["no_such_package.tools"])
