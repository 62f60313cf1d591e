"""``@tool``: what a model may call, declared by a plain typed function.

The decorator returns the function unchanged (so tests and other code call it directly) and attaches a ``Tool``. There
is no registry: a tool exists for agentq when its module is named in ``tools.yaml``.

    @tool(effect="write", keyed=True, timeout_s=5)
    def refund(order_id: Annotated[str, Field(pattern=r"^A-[0-9]+$")], cents: int, context: ToolContext) -> Refund:
        '''Pay money back for an order.

        Args:
            order_id: as printed on the invoice.
            cents: the amount, in cents of the order's currency.
        '''
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeVar

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError as JsonSchemaError
from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import SchemaError

from agentq.errors import ConfigError
from schemas.catalog import ToolSpec

Effect = Literal["read", "write", "irreversible"]
F = TypeVar("F", bound=Callable[..., Any])

_ATTRIBUTE = "__agentq_tool__"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")  # what OpenAI and Anthropic both accept as a function's name
_ARGS_SECTION = re.compile(r"^(?:Args|Arguments|Parameters):[ \t]*\n((?:[ \t]+\S.*(?:\n|$)|[ \t]*\n)+)", re.MULTILINE)
_ARGUMENT = re.compile(r"^(\w+)[ \t]*(?:\([^)]*\))?:[ \t]*(.*)$")


@dataclass(frozen=True, slots=True)
class ToolContext:
    """Who calls, for which step. A parameter of this type is filled in by the tool runner, never by the model.

    ``idempotency_key`` is the same for every attempt of the step: a keyed tool hands it to its callee or stores it
    with its effect. ``deadline`` is ``time.monotonic()`` seconds: work that cannot end before it should not begin.
    """

    run_id: str
    step_id: str
    attempt: int
    tenant: str
    user: str | None
    conversation: str | None
    agent: str
    idempotency_key: str
    deadline: float


@dataclass(frozen=True, slots=True)
class Tool:
    """A declared tool: its function, what the model is told of it, and how arguments become Python values."""

    name: str
    function: Callable[..., Any]
    spec: ToolSpec
    is_async: bool
    arguments: type[BaseModel]
    parameters: tuple[str, ...]
    context_parameter: str | None

    def bind(self, arguments: dict[str, Any], context: ToolContext) -> dict[str, Any]:
        """Keyword arguments for the function, as the types its signature names; raises pydantic's ValidationError.

        Arguments that were not sent are left out, so the function's own defaults hold.
        """
        bound = self.arguments.model_validate(arguments)
        values = {
            name: getattr(bound, f"p{index}")
            for index, name in enumerate(self.parameters)
            if f"p{index}" in bound.model_fields_set
        }
        if self.context_parameter is not None:
            values[self.context_parameter] = context
        return values


def tool(
    effect: Effect = "read",
    *,
    keyed: bool = False,
    timeout_s: float = 10.0,
    max_result_bytes: int = 16_384,
    name: str | None = None,
) -> Callable[[F], F]:
    """Declare a function, plain or ``async``, as a tool.

    ``effect``: ``read`` changes nothing, ``write`` can be changed back, ``irreversible`` cannot. ``keyed``: calling it
    again with the same ``ToolContext.idempotency_key`` does nothing twice. ``timeout_s`` bounds one call and
    ``max_result_bytes`` its result (UTF-8). ``name`` is what the model calls it (default: the function's name).

    A plain function runs in a thread, which cannot be killed: past its time limit it is abandoned, not stopped. An
    async function shares its event loop with every other step of the process, so it must never block.

    Raises ``ConfigError`` where the declaration cannot work, naming the parameter and the mend.
    """
    if callable(effect):
        raise ConfigError(
            f"@tool on {getattr(effect, '__name__', effect)!r} has no parentheses.", hint="Write @tool() or @tool(...)."
        )

    def declare(function: F) -> F:
        declared = _declare(
            function, name=name, effect=effect, keyed=keyed, timeout_s=timeout_s, limit=max_result_bytes
        )
        setattr(function, _ATTRIBUTE, declared)
        return function

    return declare


def declared_tool(value: Any) -> Tool | None:
    """The ``Tool`` attached to a decorated function, None for anything else."""
    if not inspect.isfunction(value):
        return None
    found = getattr(value, _ATTRIBUTE, None)
    return found if isinstance(found, Tool) else None


def _declare(
    function: Callable[..., Any], *, name: str | None, effect: Effect, keyed: bool, timeout_s: float, limit: int
) -> Tool:
    where = f"{function.__module__}.{getattr(function, '__qualname__', function)}"
    _refuse_unfit(function, where)
    name = name or function.__name__
    if not _NAME.fullmatch(name):
        _refuse(where, f"{name!r} is no name a model provider accepts", "Use letters, digits, _ and -, 64 at most.")
    description, described = _read_docstring(function, where)
    signature, context_parameter = _read_signature(function, where)
    if keyed and context_parameter is None:
        _refuse(
            where, "it is keyed but takes no ToolContext", "Add a parameter 'context: ToolContext' and use its key."
        )
    strangers = described.keys() - signature.keys() - {context_parameter}
    if strangers:
        _refuse(where, f"Args describes {sorted(strangers)}, which are no parameters", "Correct the docstring.")
    arguments = _arguments_model(where, signature, described)
    try:
        spec = ToolSpec(
            description=description,
            parameters=_json_schema(arguments, where),
            effect=effect,
            keyed=keyed,
            timeout_s=timeout_s,
            max_result_bytes=limit,
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = ".".join(map(str, first["loc"]))
        _refuse(where, f"{option}={first['input']!r} is wrong: {first['msg']}", "Correct the option of @tool.")
    return Tool(
        name=name,
        function=function,
        spec=spec,
        is_async=inspect.iscoroutinefunction(function),
        arguments=arguments,
        parameters=tuple(signature),
        context_parameter=context_parameter,
    )


def _refuse(where: str, reason: str, mend: str) -> NoReturn:
    raise ConfigError(f"Tool {where}: {reason}.", hint=mend) from None


def _refuse_unfit(function: Any, where: str) -> None:
    if not inspect.isfunction(function):
        _refuse(where, "only plain and async functions can be tools", "Wrap the call in a function.")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        _refuse(where, "a generator cannot be a tool", "Return a list.")


def _read_docstring(function: Callable[..., Any], where: str) -> tuple[str, dict[str, str]]:
    """The first paragraph, and the parameter descriptions of a Google-style ``Args:`` section."""
    text = inspect.cleandoc(function.__doc__ or "")
    description = " ".join(text.split("\n\n")[0].split())
    if not description:
        _refuse(where, "it has no docstring", "Tell the model in one sentence what the tool does and when to use it.")
    section = _ARGS_SECTION.search(text)
    return description, _read_args(section.group(1)) if section else {}


def _read_args(section: str) -> dict[str, str]:
    described: dict[str, str] = {}
    current: str | None = None
    lines = section.rstrip().splitlines()
    margin = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    for line in lines:
        match = _ARGUMENT.match(line[margin:])
        if match:
            current = match.group(1)
            described[current] = match.group(2).strip()
        elif current is not None and line.strip():
            described[current] += f" {line.strip()}"
    return described


def _read_signature(function: Callable[..., Any], where: str) -> tuple[dict[str, tuple[Any, Any]], str | None]:
    """``{parameter: (annotation, default)}`` of what the model sends, and the name of the context parameter."""
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError) as error:
        _refuse(where, f"its annotations cannot be read: {error}", "Define these types at module level, above it.")
    context_parameter: str | None = None
    signature: dict[str, tuple[Any, Any]] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            _refuse(where, f"parameter '{parameter}' cannot be described to a model", "Name every parameter.")
        if name not in hints:
            _refuse(where, f"parameter '{name}' has no annotation", f"Annotate it, e.g. '{name}: str'.")
        if isinstance(parameter.default, FieldInfo):
            _refuse(
                where,
                f"parameter '{name}' has a Field as its default",
                f"Write '{name}: Annotated[..., Field(...)]' and a plain default.",
            )
        if hints[name] is ToolContext:
            if context_parameter is not None:
                _refuse(where, "it takes two ToolContext parameters", "Keep one.")
            context_parameter = name
        else:
            signature[name] = (hints[name], parameter.default)
    return signature, context_parameter


def _arguments_model(where: str, signature: dict[str, tuple[Any, Any]], described: dict[str, str]) -> type[BaseModel]:
    """A model with one field per parameter, named by alias so that a parameter may be called ``copy`` or ``_id``."""
    fields: dict[str, Any] = {}
    for index, (name, (hint, default)) in enumerate(signature.items()):
        options: dict[str, Any] = {"alias": name, "validation_alias": name, "serialization_alias": name}
        if name in described and not _has_description(hint):
            options["description"] = described[name]
        fields[f"p{index}"] = (hint, Field(... if default is inspect.Parameter.empty else default, **options))
    try:
        return create_model("Arguments", __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields)
    except (PydanticUserError, SchemaError, TypeError, ValueError, NameError) as error:
        _refuse(where, f"its parameters have no JSON form: {_first_line(error)}", "Use JSON types or pydantic models.")


def _has_description(hint: Any) -> bool:
    return any(isinstance(extra, FieldInfo) and extra.description for extra in getattr(hint, "__metadata__", ()))


class _Schema(GenerateJsonSchema):
    def emit_warning(self, kind: Any, detail: str) -> None:
        """A default that has no JSON form is merely not shown to the model; the function still applies it."""


def _json_schema(arguments: type[BaseModel], where: str) -> dict[str, Any]:
    try:
        schema: dict[str, Any] = _tidy(arguments.model_json_schema(schema_generator=_Schema))
    except (PydanticUserError, TypeError, ValueError) as error:
        _refuse(
            where, f"its parameters have no JSON Schema: {_first_line(error)}", "Use JSON types or pydantic models."
        )
    schema.setdefault("properties", {})
    try:
        Draft202012Validator.check_schema(schema)
    except JsonSchemaError as error:
        _refuse(where, f"its JSON Schema is wrong at {error.json_path}: {error.message}", "Correct the Field options.")
    return schema


_SUBSCHEMAS_BY_NAME = {"properties", "$defs"}
_LITERALS = {"default", "const", "enum", "examples"}


def _tidy(node: Any) -> Any:
    """The schema without generated titles, and with every object closed unless it says otherwise."""
    if isinstance(node, list):
        return [_tidy(child) for child in node]
    if not isinstance(node, dict):
        return node
    tidy: dict[str, Any] = {}
    for key, value in node.items():
        if key in _SUBSCHEMAS_BY_NAME:
            tidy[key] = {name: _tidy(child) for name, child in value.items()}
        elif key in _LITERALS:
            tidy[key] = value
        elif key != "title":
            tidy[key] = _tidy(value)
    if "properties" in tidy:
        tidy.setdefault("additionalProperties", False)
    return tidy


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
