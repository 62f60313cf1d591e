"""Pydantic's complaints about a YAML entry, as faults with the line of the key or value at fault."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from config.faults import Fault, suggest
from config.yaml_source import YamlFile

M = TypeVar("M", bound=BaseModel)
Loc = tuple[str | int, ...]

_SUBJECT = re.compile(r"^(Value error, |(Input|String|List|Dictionary|Value) (?=should ))")


def read_spec(
    model: type[M], file: YamlFile, at: Loc, value: Any, *, whole: bool = True
) -> tuple[M | None, list[Fault]]:
    """``value``, which stands at ``at`` in ``file``, as a ``model``; or every reason why it is none.

    ``whole`` False: what the model says of itself as a whole is known already, and left out.
    """
    try:
        return model.model_validate(value), []
    except ValidationError as error:
        faults = []
        for wrong in error.errors(include_url=False):
            if not whole and not wrong["loc"]:
                continue
            loc, within = _without_tags(model, wrong["loc"])
            faults.append(_fault(wrong, file, at + loc, within))
        return None, faults


def _fault(wrong: Any, file: YamlFile, loc: Loc, within: type[BaseModel] | None) -> Fault:
    path = dotted(loc)
    parent, last = dotted(loc[:-1]) or file.name, loc[-1] if loc else ""
    fields = within.model_fields if within else {}
    field = fields.get(str(last))
    about = f"{last}: {field.description}." if field and field.description else ""
    if wrong["type"] == "missing":
        return Fault(file.at(loc[:-1], key=True), f"{parent} has no '{last}'", about or f"Add '{last}: ...'.")
    if wrong["type"] == "extra_forbidden":
        mend = suggest(str(last), fields, what="keys")
        return Fault(file.at(loc, key=True), f"{parent} has the unknown key '{last}'", mend)
    if wrong["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return _wrong_tag(wrong, file, loc)
    reason = _SUBJECT.sub("", wrong["msg"])
    if wrong["type"].endswith("model_type") or wrong["type"] == "model_attributes_type":
        reason = "should be 'key: value' lines"
    if wrong["type"] == "value_error" and isinstance(wrong["input"], dict):
        subject = reason.split()[0]  # our models' own checks begin with the key they complain about
        loc = (*loc, subject) if subject in wrong["input"] else loc
    shown = "" if isinstance(wrong["input"], dict | list) else f", got {_brief(wrong['input'])}"
    return Fault(file.at(loc), f"{path or file.name} {reason}{shown}".rstrip("."), about or _mend(wrong, field))


def _mend(wrong: Any, field: FieldInfo | None) -> str:
    if wrong["type"] == "literal_error" and field is not None and isinstance(wrong["input"], str):
        return suggest(wrong["input"], map(str, get_args(field.annotation)), what="values")
    return "Correct it." if field is None or field.is_required() else "Correct it, or leave it out."


def _wrong_tag(wrong: Any, file: YamlFile, loc: Loc) -> Fault:
    tag = wrong["ctx"]["discriminator"].strip("'")
    known = [name.strip(" '") for name in wrong["ctx"].get("expected_tags", "").split(",") if name.strip()]
    if wrong["type"] == "union_tag_not_found":
        return Fault(file.at(loc, key=True), f"{dotted(loc)} has no '{tag}'", f"Add '{tag}: ...'.")
    found = wrong["ctx"]["tag"]
    return Fault(file.at((*loc, tag)), f"{dotted(loc)}.{tag} is no known type, got '{found}'", suggest(found, known))


def dotted(loc: Sequence[str | int]) -> str:
    """``agents.helper.tools[0]``"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _without_tags(model: type[BaseModel], loc: Loc) -> tuple[Loc, type[BaseModel] | None]:
    """Pydantic's location without the tags it inserts for tagged unions, and the model that holds the last part."""
    clean: list[str | int] = []
    current: Any = model
    within: type[BaseModel] | None = None
    for part in loc:
        member = _member(current, str(part))
        if member is not None:
            current = member  # the part is the tag of a union, not a key
            continue
        clean.append(part)
        within = current if isinstance(current, type) and issubclass(current, BaseModel) else None
        current = _child_type(current, part)
    return tuple(clean), within


def _child_type(current: Any, part: str | int) -> Any:
    if isinstance(current, type) and issubclass(current, BaseModel):
        field = current.model_fields.get(str(part))
        if field is None:
            return None
        tagged = field.discriminator is not None
        return Annotated[field.annotation, "tagged"] if tagged else field.annotation
    arguments = get_args(current)
    return arguments[-1] if get_origin(current) in (dict, list) and arguments else None


def _member(current: Any, tag: str) -> type[BaseModel] | None:
    """The member of a tagged union whose ``type`` is ``tag``."""
    return next((member for member in _members(current) if tag in _tags(member)), None)


def _members(current: Any) -> Iterator[type[BaseModel]]:
    if get_origin(current) is Annotated:
        current = get_args(current)[0]
    if get_origin(current) in (Union, types.UnionType):
        for member in get_args(current):
            if isinstance(member, type) and issubclass(member, BaseModel):
                yield member


def _tags(member: type[BaseModel]) -> tuple[Any, ...]:
    field = member.model_fields.get("type")
    return get_args(field.annotation) if field and get_origin(field.annotation) is Literal else ()
