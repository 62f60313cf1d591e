"""The catalog as it is written: every entry of every file, later directories over earlier ones, with its place."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, Field

from config.faults import Fault, Faulty, suggest
from config.spec_faults import Loc, read_spec
from config.yaml_source import YamlFile, read_yaml
from schemas.catalog import END, AgentSpec, ModelSpec, Spec, WorkflowSpec

M = TypeVar("M", bound=BaseModel)

FILES = ("models.yaml", "agents.yaml", "tools.yaml", "workflows")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")


class ToolLimits(Spec):
    """What an operator may change about a tool."""

    timeout_s: float | None = Field(None, gt=0, description="seconds a call may take; default the tool's own")
    max_result_bytes: int | None = Field(None, gt=0, description="bytes of UTF-8; default the tool's own")


@dataclass(frozen=True, slots=True)
class Entry(Generic[M]):
    """One named thing. ``spec`` is None where its text is faulty: it exists, but nothing more is known of it."""

    spec: M | None
    file: YamlFile
    at: Loc

    def where(self, *loc: str | int, key: bool = False) -> str:
        """``file:line`` of a value in this entry (``key``: of its key)."""
        return self.file.at((*self.at, *loc), key=key)


@dataclass(slots=True)
class Written:
    """All entries by kind and name, and what was wrong with reading them. ``modules`` are places by module."""

    models: dict[str, Entry[ModelSpec]] = field(default_factory=dict)
    agents: dict[str, Entry[AgentSpec]] = field(default_factory=dict)
    limits: dict[str, Entry[ToolLimits]] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    workflows: dict[str, Entry[WorkflowSpec]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


def read_directories(directories: Sequence[Path]) -> Written:
    """Read every catalog file of the directories, in order. Faults are gathered, not raised."""
    written = Written()
    for directory in directories:
        if not directory.is_dir():
            written.faults.append(Fault(str(directory), "there is no such directory", "Correct app_dir."))
        elif not any((directory / name).exists() for name in FILES):
            written.faults.append(Fault(str(directory), f"it holds none of {', '.join(FILES)}", "Correct app_dir."))
        else:
            _read_directory(directory, written)
    return written


def _read_directory(directory: Path, written: Written) -> None:
    for path in (*sorted(directory.glob("*.yml")), *sorted((directory / "workflows").glob("*.yml"))):
        if path.parent.name == "workflows" or f"{path.stem}.yaml" in FILES:
            written.faults.append(Fault(_shown(path), "it is not read", f"Rename it to {path.stem}.yaml."))
    models = _sections(directory / "models.yaml", ("models",), written)
    if models:
        written.models |= _named(ModelSpec, *models, "models", written)
    agents = _sections(directory / "agents.yaml", ("agents",), written)
    if agents:
        written.agents |= _named(AgentSpec, *agents, "agents", written)
    tools = _sections(directory / "tools.yaml", ("modules", "limits"), written)
    if tools:
        written.limits |= _named(ToolLimits, *tools, "limits", written)
        written.modules |= _modules(*tools, written)
    written.workflows |= _workflows(sorted((directory / "workflows").glob("*.yaml")), written)


def _shown(path: Path) -> str:
    """The path as a person in the working directory would type it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _load(path: Path, written: Written) -> YamlFile | None:
    try:
        return read_yaml(path, _shown(path))
    except Faulty as faulty:
        written.faults.extend(faulty.faults)
        return None


def _sections(path: Path, known: tuple[str, ...], written: Written) -> tuple[YamlFile, dict[str, Any]] | None:
    """A file and its top-level sections; None where there is no such file or it cannot be used."""
    file = _load(path, written) if path.exists() else None
    if file is None:
        return None
    data = {} if file.data is None else file.data
    if not isinstance(data, dict):
        written.faults.append(Fault(file.at(()), f"it should begin with '{known[0]}:'", "Indent what follows."))
        return None
    for key in data.keys() - set(known):
        reason = f"there is no section '{key}'"
        written.faults.append(Fault(file.at([key], key=True), reason, suggest(key, known, what="sections")))
    return file, data


def _named(model: type[M], file: YamlFile, data: dict[str, Any], section: str, written: Written) -> dict[str, Entry[M]]:
    entries: dict[str, Entry[M]] = {}
    listed = data.get(section)
    if listed is None:
        return entries
    if not isinstance(listed, dict):
        written.faults.append(Fault(file.at([section]), f"{section} should be 'name: ...' entries", "See the guide."))
        return entries
    for name, value in listed.items():
        at: Loc = (section, name)
        if not _NAME.fullmatch(name):
            mend = "Use letters, digits, _ . and -, beginning with a letter, 64 at most."
            written.faults.append(Fault(file.at(at, key=True), f"'{name}' is no usable name", mend))
        spec, faults = read_spec(model, file, at, value)
        written.faults.extend(faults)
        entries[name] = Entry(spec, file, at)
    return entries


def _modules(file: YamlFile, data: dict[str, Any], written: Written) -> dict[str, str]:
    listed = data.get("modules") or []
    if not isinstance(listed, list):
        written.faults.append(Fault(file.at(["modules"]), "modules should be a list", "Write '- python.module' lines."))
        return {}
    found: dict[str, str] = {}
    for index, module in enumerate(listed):
        where = file.at(["modules", index])
        if isinstance(module, str) and re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", module):
            found[module] = where
        else:
            written.faults.append(Fault(where, f"{module!r} is no Python module name", "Write it like package.module."))
    return found


def _workflows(paths: list[Path], written: Written) -> dict[str, Entry[WorkflowSpec]]:
    entries: dict[str, Entry[WorkflowSpec]] = {}
    for path in paths:
        file = _load(path, written)
        if file is None:
            continue
        faults = list(_edge_faults(file))
        spec, others = read_spec(WorkflowSpec, file, (), {} if file.data is None else file.data, whole=not faults)
        written.faults += faults + others
        name = file.data.get("name") if isinstance(file.data, dict) else None
        if not isinstance(name, str):
            continue
        if name in entries:
            other = entries[name].where("name")
            written.faults.append(Fault(file.at(["name"]), f"workflow '{name}' is also in {other}", "Rename one."))
        entries[name] = Entry(spec, file, ())
    return entries


def _edge_faults(file: YamlFile) -> Iterator[Fault]:
    """Every edge that leads nowhere, each with its line (the model's own check stops at the first)."""
    data = file.data if isinstance(file.data, dict) else {}
    nodes = data.get("nodes")
    if not isinstance(nodes, dict) or not nodes:
        return
    if END in nodes:
        yield Fault(file.at(["nodes", END], key=True), f"'{END}' is the built-in last node", "Name yours otherwise.")
    start = data.get("start")
    if isinstance(start, str) and start not in nodes:
        yield Fault(file.at(["start"]), f"start '{start}' is no node", suggest(start, nodes, what="nodes"))
    for name, node in nodes.items():
        for edge in ("next", "revise"):
            target = node.get(edge) if isinstance(node, dict) else None
            if not isinstance(target, str):
                continue
            where, path = file.at(["nodes", name, edge]), f"nodes.{name}.{edge}"
            if target not in nodes and target != END:
                yield Fault(where, f"{path} '{target}' is no node", suggest(target, [*nodes, END], what="nodes"))
            elif edge == "revise" and not _is_agent(nodes.get(target)):
                yield Fault(
                    where, f"{path} '{target}' is no agent node", "Send drafts back to the agent that wrote them."
                )


def _is_agent(node: Any) -> bool:
    return isinstance(node, dict) and node.get("type") == "agent"
