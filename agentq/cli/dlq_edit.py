"""``agentq dlq edit``: change something about a dead letter, then let it go on."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from agentq.cli.connect import data_dir_option, open_client
from agentq.cli.letters import hand_in, kept_body, kind_of
from agentq.cli.repair import edit_options, edits_of, operating, pair
from agentq.errors import Conflict, InvalidRequest

if TYPE_CHECKING:
    from agentq.engine.edits import Edits


class _PlainLoader(yaml.SafeLoader):
    """YAML whose values are JSON's: what looks like a date stays a text."""


_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def to_yaml(value: Any) -> str:
    """``value`` as it is shown and edited."""
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)).rstrip()


@click.command(help="Change something about one, then let it go on: in $EDITOR, or by options.")
@data_dir_option
@click.argument("run_id")
@click.option("--set", "values", multiple=True, metavar="PATH=VALUE", help="payload.amount=12, request.workflow=shop")
@edit_options
def edit(
    data_dir: Path | None, run_id: str, values: tuple[str, ...], model: str | None, prompt_file: Path | None,
    limits: tuple[str, ...],
) -> None:  # fmt: skip
    """Exit 0 when it goes on; 2 when what was edited makes no sense."""
    by_options = edits_of(model, prompt_file, limits)
    given = bool(values or by_options.told())
    click.echo(asyncio.run(_edit(data_dir, run_id, values, by_options if given else None)))


async def _edit(data_dir: Path | None, run_id: str, values: tuple[str, ...], given: Edits | None) -> str:
    async with operating(data_dir) as operator:
        run = await operator.load(run_id)
        if kind_of(run) == "rejected":
            if given is not None and given.told():
                raise InvalidRequest(
                    "A refused request has none of these.", code="invalid_edit", hint="--set request.NAME=VALUE"
                )
            body = kept_body(run)
            body = _with_values(body, values, "request") if values else _in_editor(body, "the request")
            with open_client(data_dir) as client:
                return await hand_in(operator, client, run, body, edited=True)
        if kind_of(run) == "held":
            raise Conflict(
                f"A held step of {run_id} is done again as it is, or not at all.",
                hint=f"See 'agentq dlq show {run_id}', or fork the run from that step.",
            )
        now = await operator.editable(run)
        if given is None:
            given = _edits_from(now, _in_editor(now, "what the run goes on with"))
        elif values:
            if "payload" not in now:
                raise InvalidRequest("The step has no arguments.", code="invalid_edit", hint="See 'agentq dlq show'.")
            given = replace(given, payload=_with_values(now["payload"], values, "payload"))
        after = await operator.retry(run_id, given)
        return f"{run_id}: {after['status']}"


def _with_values(value: Any, settings: Sequence[str], root: str) -> Any:
    """``root.a.b=VALUE`` set in a copy of ``value``; VALUE is read as YAML, so 12 is a number and "12" a text."""
    whole: dict[str, Any] = {root: json.loads(json.dumps(value))}
    for setting in settings:
        path, text = pair(setting, "--set")
        names = path.split(".")
        if names[0] != root or len(names) < 2:
            raise InvalidRequest(f"--set {path} is nothing here.", code="invalid_edit", hint=f"--set {root}.NAME=VALUE")
        at = whole
        for name in names[:-1]:
            inner = at.setdefault(name, {})
            if not isinstance(inner, dict):
                raise InvalidRequest(f"{name!r} in {path} holds no names.", code="invalid_edit", hint="Check the path.")
            at = inner
        at[names[-1]] = from_yaml(text)
    return whole[root]


def _in_editor(value: Any, what: str) -> Any:
    if not sys.stdin.isatty() and not os.environ.keys() & {"EDITOR", "VISUAL"}:
        raise InvalidRequest(
            "What is to be edited?", code="missing_argument", hint="Say it with --set, --model, --limit."
        )
    shown = f"# Change {what}, save, and leave the editor; leave without saving to change nothing.\n{to_yaml(value)}\n"
    written = click.edit(shown, extension=".yaml")
    if written is None:
        raise Conflict("Nothing was changed.", code="not_edited", hint="Save the file in the editor to go on.")
    return from_yaml(written)


def from_yaml(text: str) -> Any:
    """Raises ``InvalidRequest`` where it is no YAML."""
    try:
        return yaml.load(text, _PlainLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" in line {mark.line + 1}"
        raise InvalidRequest(f"That is no YAML{where}.", code="invalid_edit", hint="Edit it again.") from None


def _edits_from(before: dict[str, Any], after: Any) -> Edits:
    """What differs between the two."""
    from agentq.engine.edits import Edits  # noqa: PLC0415

    if not isinstance(after, dict) or set(after) - set(before):
        known = ", ".join(before)
        raise InvalidRequest("There is something that cannot be edited.", code="invalid_edit", hint=f"Keep to {known}.")
    changed = {name: value for name, value in after.items() if value != before[name]}
    for name, kind, words in (
        ("prompt", str, "a text"),
        ("model", str, "a name"),
        ("payload", dict, "names and values"),
    ):
        if name in changed and not isinstance(changed[name], kind):
            raise InvalidRequest(f"{name} is not {words}.", code="invalid_edit", hint="Edit it again.")
    limits = changed.pop("limits", None) or {}
    if not isinstance(limits, dict):
        raise InvalidRequest("limits is no list of names and values.", code="invalid_edit", hint="Write NAME: VALUE.")
    limits = {name: value for name, value in limits.items() if value != before["limits"].get(name)}
    return Edits(**changed, limits=limits)
