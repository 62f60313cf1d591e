"""The sources of settings, one ``Layer`` each: values, and where each value comes from."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dotenv.parser import parse_stream

from config.faults import Fault, Faulty, suggest
from config.yaml_source import read_yaml

PREFIX = "AGENTQ_"
STANDARD = {
    name.upper(): name for name in ("openai_api_key", "openai_base_url", "anthropic_api_key", "anthropic_base_url")
}
# Read by entry points and examples, or told by `agentq up` to the processes it starts; no settings.
NOT_SETTINGS = frozenset({"AGENTQ_CONFIG", "AGENTQ_FLOWER_URL", "AGENTQ_READY_FILE", "AGENTQ_SUPPORT_DESK_DB"})
FOR_TESTS = "AGENTQ_TEST_"

# Kubernetes and Docker links put such variables into every container beside a service named agentq or agentq-redis.
_SERVICE_LINK = re.compile(r"_SERVICE_HOST$|_SERVICE_PORT(_\w+)?$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$")
_SERVICE_ADDRESS = re.compile(r"^(tcp|udp|sctp)://")


@dataclass(frozen=True, slots=True)
class Layer:
    """``origins`` names the source of each value for people. ``variables`` are known variables that are no settings."""

    values: Mapping[str, Any] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


def environment_layer(environ: Mapping[str, str], known: frozenset[str]) -> Layer:
    """``AGENTQ_*`` and the providers' standard variables."""
    return _variables(((name, value, f"environment {name}") for name, value in sorted(environ.items())), known)


def dotenv_layer(cwd: Path, known: frozenset[str]) -> Layer:
    """``.env`` in the working directory: the same variables, no expansion of ``$NAME``; others are none of ours."""
    path = cwd / ".env"
    if not path.is_file():
        return Layer()
    try:
        with path.open(encoding="utf-8-sig") as file:
            bindings = list(parse_stream(file))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise Faulty(Fault(".env", f"it cannot be read: {reason}", "Check its permissions and encoding.")) from None
    for binding in bindings:
        if binding.error:
            raise Faulty(Fault(f".env:{_line(binding.original)}", "it is not NAME=value", "Quote values with spaces."))
    return _variables(
        ((b.key, b.value or "", f".env:{_line(b.original)}") for b in bindings if b.key is not None), known
    )


def _line(original: Any) -> int:
    text: str = original.string  # a binding takes the blank lines before it along
    return int(original.line) + text[: len(text) - len(text.lstrip())].count("\n")


def _variables(found: Iterable[tuple[str, str, str]], known: frozenset[str]) -> Layer:
    values: dict[str, str] = {}
    origins: dict[str, str] = {}
    variables: dict[str, str] = {}
    standard: dict[str, tuple[str, str]] = {}
    faults: list[Fault] = []
    for name, value, origin in found:
        setting = _setting(name, known)
        if setting is None and name in STANDARD and value:
            standard[STANDARD[name]] = value, origin
        elif name in NOT_SETTINGS:
            variables[name] = value
        elif not _is_ours(name, value):
            continue
        elif setting is None:
            names = {f"{PREFIX}{each.upper()}" for each in known} | NOT_SETTINGS
            faults.append(Fault(_named(origin, name), "there is no such setting", suggest(name.upper(), names)))
        elif value:
            values[setting], origins[setting] = value, origin
    for setting, (value, origin) in standard.items():
        if setting not in values:
            values[setting], origins[setting] = value, origin
    return Layer(values, origins, variables, faults)


def _setting(name: str, known: frozenset[str]) -> str | None:
    setting = name.removeprefix(PREFIX).lower()
    return setting if name == f"{PREFIX}{setting.upper()}" and setting in known else None


def _is_ours(name: str, value: str) -> bool:
    if not name.upper().startswith(PREFIX) or name.startswith(FOR_TESTS):
        return False
    return not (_SERVICE_LINK.search(name) or (name.endswith("_PORT") and _SERVICE_ADDRESS.match(value)))


def _named(origin: str, name: str) -> str:
    return origin if name in origin else f"{origin}: {name}"


def yaml_layer(cwd: Path, named: str | None, known: frozenset[str]) -> Layer:
    """``agentq.yaml`` in the working directory if there is one, or the file that ``named`` says must exist."""
    path = cwd / (named or "agentq.yaml")
    if not path.is_file():
        if named is None:
            return Layer()
        raise Faulty(Fault("AGENTQ_CONFIG", f"there is no file {named}", "Correct it, or unset it."))
    file = read_yaml(path, named or "agentq.yaml")
    data = {} if file.data is None else file.data
    if not isinstance(data, dict):
        raise Faulty(Fault(file.at(()), "settings are 'name: value' lines", "Write e.g. 'lease_s: 30'."))
    faults = [
        Fault(file.at([name], key=True), f"there is no setting '{name}'", suggest(name, known, what="settings"))
        for name in data
        if name not in known
    ]
    values = {name: value for name, value in data.items() if name in known and value is not None}
    return Layer(values, {name: file.at([name]) for name in values}, faults=faults)


def stack_layer(data_dir: Path, known: frozenset[str]) -> Layer:
    """What the stack that runs on ``data_dir`` says of itself; nothing if none runs.

    A record that was left behind by a killed stack, or is being replaced, counts as none.
    """
    try:
        record = json.loads((data_dir / "stack.json").read_text(encoding="utf-8"))
        alive = _is_alive(int(record["pid"])) and _is_locked(data_dir / "stack.lock")
        settings = dict(record["settings"])
    except (OSError, ValueError, TypeError, KeyError):
        return Layer()
    values = {name: settings[name] for name in settings.keys() & known} if alive else {}
    return Layer(values, dict.fromkeys(values, "running stack"))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def _is_locked(lock: Path) -> bool:
    """The stack holds a lock while it lives: unlike a process id it is never given to another. No file: believe it."""
    try:
        fd = os.open(lock, os.O_RDWR)
    except OSError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
