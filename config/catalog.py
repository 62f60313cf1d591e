"""The catalog: models, agents, tools and workflows from YAML, checked against each other before anything runs.

A directory holds ``models.yaml``, ``agents.yaml``, ``tools.yaml`` and ``workflows/*.yaml``, each optional. Of several
directories the later one overrides by name. Every fault of a load is reported together, with its file and line.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agentq.errors import ConfigError
from agentq.tools import Toolbox, load_toolbox
from config.checks import cross_check, reachable_bundle
from config.entries import Written, read_directories
from config.faults import Fault, refuse
from config.settings import Settings
from schemas.catalog import Bundle, ToolSpec

DEFAULT_DIRECTORY = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Catalog:
    """What this process can run: a bundle per workflow by name, and the functions behind their tools."""

    bundles: Mapping[str, Bundle]
    toolbox: Toolbox


def catalog_directories(settings: Settings) -> list[Path]:
    """The default catalog, and the application's over it.

    Where Anthropic is the only provider configured, the default models are its: a key is all that has to change.
    """
    openai = settings.openai_api_key or settings.openai_base_url
    anthropic = settings.anthropic_api_key or settings.anthropic_base_url
    only_anthropic = [DEFAULT_DIRECTORY / "anthropic"] if anthropic and not openai else []
    return [DEFAULT_DIRECTORY, *only_anthropic, *([settings.app_dir] if settings.app_dir else [])]


def load_catalog(directories: Sequence[Path], *, tool_threads: int = 32) -> Catalog:
    """Read, check and bundle. Imports the tool modules, from ``sys.path`` (to which all directories but the first are
    appended); starts no thread.

    Raises one ``ConfigError`` for all faults: ``file:line: reason. mend`` of the first, ``details["faults"]`` for all.
    """
    written = read_directories(directories)
    faults = list(written.faults)
    for directory in map(str, directories[1:]):  # an application's tool modules may lie beside its YAML
        if directory not in sys.path:
            sys.path.append(directory)
    toolbox, fault = _toolbox(written, tool_threads)
    if fault is not None:
        faults.append(fault)
    tools = None if toolbox is None else _with_limits(toolbox.specs, written)
    faults += cross_check(written, tools)
    if not faults and not written.workflows:
        faults.append(Fault(", ".join(map(str, directories)), "there is no workflow", "Add workflows/default.yaml."))
    refuse(faults)
    assert toolbox is not None
    assert tools is not None
    bundles = {
        name: reachable_bundle(entry.spec, written, tools) for name, entry in written.workflows.items() if entry.spec
    }
    return Catalog(bundles, toolbox)


def _toolbox(written: Written, threads: int) -> tuple[Toolbox | None, Fault | None]:
    try:
        return load_toolbox(list(written.modules), threads=threads), None
    except ConfigError as error:
        where = written.modules.get(str(error.details.get("module")), "tools.yaml")
        return None, Fault(where, error.message.rstrip("."), error.hint)


def _with_limits(specs: Mapping[str, ToolSpec], written: Written) -> dict[str, ToolSpec]:
    """The tools as their functions declare them, under the operator's limits."""
    changes = {name: entry.spec.model_dump(exclude_none=True) for name, entry in written.limits.items() if entry.spec}
    return {name: spec.model_copy(update=changes.get(name, {})) for name, spec in specs.items()}
