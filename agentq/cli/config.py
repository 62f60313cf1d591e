"""``agentq config``: the settings in force."""

from __future__ import annotations

import json
from pathlib import Path

import click

from agentq.cli.connect import data_dir_option, settings_for
from config.settings import explain


@click.group()
def config() -> None:
    """Show the settings and where each comes from."""


@config.command()
@data_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def show(data_dir: Path | None, as_json: bool) -> None:
    """Print each setting, its value (secrets masked) and its source."""
    rows = explain(settings_for(data_dir))
    if as_json:
        click.echo(json.dumps([{"name": n, "value": str(v), "source": s} for n, v, s in rows], indent=2))
        return
    names = max(len(name) for name, _, _ in rows)
    values = min(60, max(len(str(value)) for _, value, _ in rows))
    for name, value, source in rows:
        click.echo(f"{name:<{names}}  {value!s:<{values}}  {source}")
