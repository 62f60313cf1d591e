"""YAML whose every key and value knows its line.

Stricter than YAML: keys are plain strings and unique, numbers finite, no aliases (they make a small file expand without
bound, and hide where a value comes from), no tags, 1 MiB and 40 levels at most. Timestamps stay strings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from config.faults import Fault, Faulty

MAX_BYTES = 1024 * 1024
MAX_DEPTH = 40

_TAG = "tag:yaml.org,2002:"
_TAGS = {f"{_TAG}{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp")}

Loc = Sequence[str | int]


@dataclass(frozen=True, slots=True)
class YamlFile:
    """A read file: ``data`` is plain Python (None if it is empty), ``name`` is how messages call it."""

    name: str
    data: Any
    root: yaml.Node | None

    def at(self, loc: Loc, *, key: bool = False) -> str:
        """``file:line`` of the value at ``loc``, or of its key; of the deepest part that exists if it does not."""
        return f"{self.name}:{self.line(loc, key=key)}"

    def line(self, loc: Loc, *, key: bool = False) -> int:
        """The line, from 1. The line of a whole mapping or list is that of its key."""
        if self.root is None:
            return 1
        key_node, node = self.root, self.root
        for part in loc:
            found = _child(node, part)
            if found is None:
                key = True
                break
            key_node, node = found
        shown = key_node if key or not isinstance(node, yaml.ScalarNode) else node
        return _line(shown.start_mark)


def read_yaml(path: Path, name: str | None = None) -> YamlFile:
    """Read one file; raises ``Faulty`` with everything that is wrong with its YAML."""
    name = name or str(path)
    text = _read_text(path, name)
    try:
        _refuse_bombs(text, name)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = name if mark is None else f"{name}:{_line(mark)}"
        reason = error.problem or error.context or "this is not YAML"
        raise Faulty(Fault(where, f"the YAML is broken: {reason}", "Check indentation, quotes and colons.")) from None
    except yaml.YAMLError as error:
        raise Faulty(Fault(name, f"the YAML is broken: {str(error).splitlines()[0]}", "Save it as UTF-8.")) from None
    reader = _Reader(name)
    data = None if root is None else reader.value(root)
    if reader.faults:
        raise Faulty(*reader.faults)
    return YamlFile(name, data, root)


def _read_text(path: Path, name: str) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise Faulty(Fault(name, f"it cannot be read: {error.strerror}", "Check its name and permissions.")) from None
    if len(raw) > MAX_BYTES:
        raise Faulty(Fault(name, "it is larger than 1 MiB", "Split it, or remove what is no configuration."))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise Faulty(Fault(f"{name}:{line}", "it is not UTF-8", "Save it as UTF-8.")) from None


def _refuse_bombs(text: str, name: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = f"{name}:{_line(event.start_mark)}"
        if isinstance(event, yaml.AliasEvent):
            raise Faulty(Fault(where, f"the alias '*{event.anchor}' is not allowed", "Write the value out."))
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise Faulty(Fault(where, f"it is nested deeper than {MAX_DEPTH} levels", "Flatten it."))


def _line(mark: Any) -> int:
    return int(mark.line) + 1


def _child(node: yaml.Node, part: str | int) -> tuple[yaml.Node, yaml.Node] | None:
    """The key and value nodes of one step down; a list item is its own key."""
    if isinstance(node, yaml.MappingNode):
        return next(((key, value) for key, value in node.value if key.value == str(part)), None)
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        item: yaml.Node = node.value[part]
        return item, item
    return None


class _Reader:
    """Turns nodes into plain data and gathers what is wrong on the way."""

    def __init__(self, name: str) -> None:
        self.faults: list[Fault] = []
        self._name = name
        self._constructor = yaml.constructor.SafeConstructor()

    def value(self, node: yaml.Node) -> Any:
        if node.tag not in _TAGS:
            self._fault(node, f"the tag {node.tag.removeprefix(_TAG)} is not allowed", "Write a plain value.")
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(child) for child in node.value]
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        data: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = key_node.value, _line(key_node.start_mark)
            if not isinstance(key, str):
                self._fault(key_node, "a key must be a plain word", "Write 'name: value'.")
                continue
            if key_node.tag != f"{_TAG}str":
                kind = key_node.tag.removeprefix(_TAG)
                self._fault(key_node, f"the key {key} is read as {kind}", f'Put it in quotes: "{key}".')
            if key in data:
                self._fault(key_node, f"the key '{key}' is already on line {lines[key]}", "Remove one of the two.")
            lines[key] = line
            data[key] = self.value(value_node)
        return data

    def _scalar(self, node: yaml.Node) -> Any:
        if node.tag == f"{_TAG}timestamp":
            return node.value
        try:
            value = self._constructor.construct_object(node)
        except (ValueError, yaml.YAMLError):
            kind = node.tag.removeprefix(_TAG)
            self._fault(node, f"'{str(node.value)[:40]}' cannot be read as {kind}", "Put it in quotes.")
            return None
        if isinstance(value, float) and not math.isfinite(value):
            self._fault(node, f"'{node.value}' is not a finite number", "Write a number.")
        return value

    def _fault(self, node: yaml.Node, reason: str, mend: str) -> None:
        self.faults.append(Fault(f"{self._name}:{_line(node.start_mark)}", reason, mend))
