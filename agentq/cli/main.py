"""The ``agentq`` command: the table of subcommands, and what an error looks like.

A subcommand's module is imported when it is used, never for ``--help``: Celery alone takes seconds to import.
"""

from __future__ import annotations

import importlib
import json
from typing import Any, NoReturn

import click

from agentq import __version__
from agentq.errors import AgentqError, ConfigError, Conflict, InvalidRequest, NotFound

# name -> (module, one line of help). The module has a click command called NAME (with `_` for `-`).
COMMANDS: dict[str, tuple[str, str]] = {
    "up": ("agentq.cli.up", "Start everything on this machine; Ctrl-C stops it."),
    "demo": ("agentq.cli.demo", "Start everything, work through an example, stop."),
    "submit": ("agentq.cli.runs", "Hand in a request."),
    "runs": ("agentq.cli.runs", "List runs."),
    "show": ("agentq.cli.runs", "Show one run: its steps, events, cost."),
    "wait": ("agentq.cli.runs", "Wait until a run has ended, and print its answer."),
    "cancel": ("agentq.cli.runs", "Cancel a run."),
    "batch": ("agentq.cli.batch", "Hand in files of requests, follow them, read their results."),
    "pause": ("agentq.cli.repair", "Let no step of a run start any more."),
    "resume": ("agentq.cli.repair", "Let a paused run go on."),
    "fork": ("agentq.cli.repair", "Begin a new run from the middle of another."),
    "dlq": ("agentq.cli.dlq", "Dead letters: what failed for good, waits for a person, or was refused."),
    "limits": ("agentq.cli.limits", "What a tenant or a key may have in flight: set, show, clear."),
    "schedule": ("agentq.cli.limits", "Recurring requests: list, drop."),
    "conversation": ("agentq.cli.runs", "Show the messages of a conversation."),
    "notifications": ("agentq.cli.notifications", "Webhooks and follow-up tasks: list, retry."),
    "audit": ("agentq.cli.audit", "Verify and export the audit trail."),
    "restore-check": ("agentq.cli.repair", "After a restore from a backup: what may go on, and what must not."),
    "config": ("agentq.cli.config", "Show the settings and where each comes from."),
    "doctor": ("agentq.cli.doctor", "Check this machine and the running system."),
}

# The caller's own mistakes end with code 2, as wrong usage does; everything else with 1.
USER_MISTAKES = (ConfigError, Conflict, InvalidRequest, NotFound)
_WANTS_JSON = "agentq.cli.json"


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called; an AgentqError becomes a sentence and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name][0])
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_WANTS_JSON] = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AgentqError as error:
            fail(error, as_json=ctx.meta[_WANTS_JSON])


def fail(error: AgentqError, *, as_json: bool = False) -> NoReturn:
    """Print a sentence, the stable code and the hint (or the error as a JSON object) on stderr; exit 2 for
    USER_MISTAKES, else 1."""
    if as_json:
        click.echo(json.dumps({"error": error.as_dict()}, default=str), err=True)
    else:
        code = click.style(f"[{error.code}]", dim=True)
        click.echo(f"{click.style('error:', fg='red', bold=True)} {error.message} {code}", err=True)
        if error.hint:
            click.echo(f"  {error.hint}", err=True)
        for fault in error.details.get("faults", [])[1:]:
            click.echo(f"  also {fault}", err=True)
    raise click.exceptions.Exit(2 if isinstance(error, USER_MISTAKES) else 1)


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """A durable message queue for LLM agents.

    Try `agentq demo`, or `agentq up` and then, in another terminal, `agentq submit`.
    """
