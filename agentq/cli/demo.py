"""``agentq demo``: the whole system started, an example worked through, its audit trail verified, all of it stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import click

from agentq.cli.connect import data_dir_option, settings_for
from agentq.embedded.plan import CHECKOUT
from agentq.embedded.stack import Stack
from agentq.errors import AgentqError

_EXAMPLE = CHECKOUT / "examples" / "support_desk"


class DemoFailed(AgentqError):
    code = "demo_failed"


@click.command()
@data_dir_option
@click.option("--no-flower", is_flag=True, help="Do not start Flower.")
def demo(data_dir: Path | None, no_flower: bool) -> None:
    """Start everything, let the support desk example answer its customers, verify the audit trail, stop.

    Needs no key and no network: without a provider's key the offline model server answers. The data stays in the
    directory `demo` below the data directory, so that you can look at it afterwards.
    """
    home = settings_for(data_dir).data_dir / "demo"
    settings = settings_for(home, app_dir=_EXAMPLE, flower=False if no_flower else None)
    click.secho("Starting Redis, MongoDB, a model server, four worker pools and a scheduler", bold=True)
    with Stack(settings, report=lambda line: click.echo(f"  {line}")) as stack:
        click.secho("\nThe support desk at work", bold=True)
        _run(stack.settings, "examples.support_desk.demo")
        click.secho("\nIs the audit trail whole?", bold=True)
        _run(stack.settings, "agentq.cli", "audit", "verify")
        click.secho("\nStopping", bold=True)
    shown = os.path.relpath(home)
    click.secho("\nLook around", bold=True)
    click.echo(f"  start it again   agentq up --app {os.path.relpath(_EXAMPLE)} --data-dir {shown}")
    click.echo(f"  then             agentq runs --data-dir {shown}    agentq doctor --data-dir {shown}")
    click.echo(f"  the example      {os.path.relpath(_EXAMPLE)}")


def _run(settings: Mapping[str, str], *argv: str) -> None:
    """Run ``python -m argv`` as a user of the running stack would: another process, told by the environment."""
    env = {**os.environ, **{f"AGENTQ_{name.upper()}": value for name, value in settings.items()}}
    sys.stdout.flush()
    code = subprocess.run([sys.executable, "-m", *argv], cwd=CHECKOUT, env=env, check=False).returncode
    if code:
        raise DemoFailed(
            f"`python -m {' '.join(argv)}` ended with exit code {code}.",
            hint=f"The logs are in {settings['data_dir']}/logs.",
        )
