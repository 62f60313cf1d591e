"""``@tool``: what a model is told follows from the function, and a declaration that cannot work is refused at once."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from agentq.errors import ConfigError
from agentq.tools import ToolContext, tool
from agentq.tools.declare import Tool, declared_tool


class Speed(Enum):
    SLOW = "slow"
    FAST = "fast"


class Address(BaseModel):
    street: str
    title: str = Field("Mx", title="Salutation")


@tool(effect="write", keyed=True, timeout_s=3, max_result_bytes=100, name="ship-it")
def ship(
    order: Annotated[str, Field(pattern=r"^A-[0-9]+$", description="the order's number")],
    to: Address,
    context: ToolContext,
    speed: Speed = Speed.SLOW,
    colour: Literal["red", "blue"] | None = None,
    copy: int = 1,
) -> str:
    """Send an order
    to its buyer.

    More that is for people only.

    Args:
        order: this loses against the annotation.
        copy (int): how many,
            in pieces.
    """
    return f"{order} {to.street} {speed} {colour} {copy} {context.idempotency_key}"


def declared(function: Any) -> Tool:
    found = declared_tool(function)
    assert found is not None
    return found


def test_the_schema_follows_from_the_signature() -> None:
    """Types, enums, patterns, required, defaults and descriptions reach the model; objects are closed."""
    spec = declared(ship).spec
    assert spec.description == "Send an order to its buyer."
    assert (spec.effect, spec.keyed, spec.timeout_s, spec.max_result_bytes) == ("write", True, 3, 100)
    assert spec.recovery == "keyed"
    assert declared(ship).name == "ship-it"
    schema = spec.parameters
    assert schema["type"] == "object"
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["order", "to"]
    assert schema["properties"]["order"] == {
        "type": "string",
        "pattern": "^A-[0-9]+$",
        "description": "the order's number",
    }
    assert schema["properties"]["copy"] == {"type": "integer", "default": 1, "description": "how many, in pieces."}
    assert schema["$defs"]["Speed"] == {"type": "string", "enum": ["slow", "fast"]}
    assert schema["$defs"]["Address"]["additionalProperties"] is False
    assert set(schema["$defs"]["Address"]["properties"]) == {"street", "title"}
    assert {"enum": ["red", "blue"], "type": "string"} in schema["properties"]["colour"]["anyOf"]


def test_the_context_is_no_parameter_for_the_model() -> None:
    assert "context" not in declared(ship).spec.parameters["properties"]


def test_the_function_stays_itself(context: ToolContext) -> None:
    """Tests and other code call a tool like any function."""
    assert ship("A-1", Address(street="x"), context).startswith("A-1 x Speed.SLOW None 1 ")


def test_only_decorated_functions_are_tools() -> None:
    assert declared_tool(lambda: None) is None
    assert declared_tool(declared_tool) is None
    assert declared_tool("ship") is None


def test_a_function_without_parameters_is_a_tool() -> None:
    @tool()
    def now() -> str:
        """Say the time."""
        return "12:00"

    parameters = declared(now).spec.parameters
    assert parameters == {"type": "object", "properties": {}, "additionalProperties": False}


def test_binding_gives_the_types_of_the_signature(context: ToolContext) -> None:
    """Dates, decimals, models: the function never sees raw JSON; unsent parameters keep the function's defaults."""

    @tool()
    def book(day: date, price: Decimal, to: Address, note: str = "none", _private: int = 0) -> None:
        """Book a day."""

    values = declared(book).bind({"day": "2026-11-21", "price": "1.10", "to": {"street": "x"}}, context)
    assert values == {"day": date(2026, 11, 21), "price": Decimal("1.10"), "to": Address(street="x")}


def no_annotation(x) -> None:  # type: ignore[no-untyped-def]
    """Doc."""


def star_args(*x: int) -> None:
    """Doc."""


def star_kwargs(**x: int) -> None:
    """Doc."""


def positional(x: int, /) -> None:
    """Doc."""


def no_docstring(x: int) -> None: ...


def blank_docstring(x: int) -> None:
    """ """


def two_contexts(a: ToolContext, b: ToolContext) -> None:
    """Doc."""


def field_default(x: int = Field(3, gt=0)) -> None:
    """Doc."""


def unknown_type(x: Nowhere) -> None:  # type: ignore[name-defined]  # noqa: F821
    """Doc."""


class Opaque: ...


def opaque_type(x: Opaque) -> None:
    """Doc."""


def generator(x: int) -> Any:
    """Doc."""
    yield x


def bad_pattern(x: Annotated[str, Field(json_schema_extra={"pattern": "("})]) -> None:
    """Doc."""


def stale_docs(x: int) -> None:
    """Doc.

    Args:
        y: was renamed.
    """


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (no_annotation, "parameter 'x' has no annotation"),
        (star_args, "cannot be described"),
        (star_kwargs, "cannot be described"),
        (positional, "cannot be described"),
        (no_docstring, "no docstring"),
        (blank_docstring, "no docstring"),
        (two_contexts, "two ToolContext"),
        (field_default, "has a Field as its default"),
        (unknown_type, "annotations cannot be read: name 'Nowhere'"),
        (opaque_type, "no JSON form"),
        (generator, "generator"),
        (bad_pattern, "'\\(' is not a 'regex'"),
        (stale_docs, r"Args describes \['y'\]"),
        (print, "only plain and async functions"),
        (Opaque, "only plain and async functions"),
    ],
)
def test_a_wrong_declaration_is_refused_with_a_mend(function: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        tool()(function)
    assert caught.value.hint
    assert "Tool " in caught.value.message


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"keyed": True}, "keyed but takes no ToolContext"),
        ({"effect": "rite"}, "effect='rite' is wrong"),
        ({"timeout_s": 0}, "timeout_s=0 is wrong"),
        ({"max_result_bytes": -1}, "max_result_bytes=-1 is wrong"),
        ({"name": "no spaces"}, "no name a model provider accepts"),
    ],
)
def test_wrong_options_are_refused_with_a_mend(options: dict[str, Any], reason: str) -> None:
    def plain(x: int) -> None:
        """Doc."""

    with pytest.raises(ConfigError, match=reason):
        tool(**options)(plain)


def test_forgotten_parentheses_are_named() -> None:
    with pytest.raises(ConfigError, match="no parentheses"):
        tool(ship)  # type: ignore[arg-type]
