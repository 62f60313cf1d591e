"""``agentq doctor``: is this machine fit, and is the running system well?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click

from agentq.cli.check_machine import Check, Level, machine
from agentq.cli.connect import attached, data_dir_option, settings_for
from agentq.embedded.record import StackRecord
from config.settings import Settings

_COLOUR: dict[Level, str] = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command()
@data_dir_option
@click.option("--json", "json_output", is_flag=True, help="Print a JSON array of {level, name, found, mend}.")
def doctor(data_dir: Path | None, json_output: bool) -> None:
    """Check this machine and the running system, one line each, and say how to mend what is wrong.

    Ends with code 1 if anything failed; a warning is no failure.
    """
    settings, stack = attached(settings_for(data_dir))
    checks: list[Check] = []
    for check in _examine(settings, stack):
        checks.append(check)
        if not json_output:
            _print(check)
    if json_output:
        click.echo(json.dumps([vars(check) for check in checks], indent=2))
    if any(check.level == "fail" for check in checks):
        raise click.exceptions.Exit(1)


def _examine(settings: Settings, stack: StackRecord | None) -> Iterator[Check]:
    for check in machine(settings):
        yield check
        if check.name == "libraries" and check.level == "fail":
            return  # the next checks could not even be imported
    from agentq.cli.check_system import system  # noqa: PLC0415  needs the libraries just checked

    yield from system(settings, stack)


def _print(check: Check) -> None:
    click.echo(f"{click.style(f'{check.level:<4}', fg=_COLOUR[check.level])}  {check.name:<19}  {check.found}")
    if check.mend:
        click.echo(f"{'':27}-> {check.mend}")
