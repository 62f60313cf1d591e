"""Commands about one run that must stop, go on or begin again elsewhere; and about the system after a restore."""

from __future__ import annotations

import asyncio
import getpass
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agentq.cli.connect import data_dir_option, open_client, open_store
from agentq.cli.table import print_table
from agentq.errors import InvalidRequest

if TYPE_CHECKING:
    from agentq.engine.edits import Edits
    from agentq.runtime.operator import Operator


def edit_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options for which ``edits_of`` gives the edits."""
    file = click.Path(path_type=Path, dir_okay=False, exists=True)
    for option in (
        click.option(
            "--limit", "limits", multiple=True, metavar="NAME=VALUE", help="max_turns=12, agent.max_tokens=..."
        ),
        click.option("--prompt-file", type=file, help="Other instructions for the step's agent, or its node."),
        click.option("--model", help="Another model for the step, by its name in models.yaml."),
    ):
        command = option(command)
    return command


@asynccontextmanager
async def operating(data_dir: Path | None) -> AsyncIterator[Operator]:
    """The operator at this terminal, at work on the running system."""
    from agentq.runtime.operator import Operator  # noqa: PLC0415 - the engine is imported when it is used

    async with open_store(data_dir) as store:
        yield Operator(store, getpass.getuser())


def edits_of(
    model: str | None, prompt_file: Path | None, limits: Sequence[str], *, payload: Any = None, agent: str | None = None
) -> Edits:
    """Raises ``InvalidRequest`` where a limit is not NAME=VALUE."""
    from agentq.engine.edits import Edits  # noqa: PLC0415

    prompt = None if prompt_file is None else prompt_file.read_text(encoding="utf-8")
    return Edits(payload, prompt, model, agent, dict(pair(limit, "--limit") for limit in limits))


def pair(text: str, option: str) -> tuple[str, str]:
    """NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise InvalidRequest(f"{option} {text!r} is not NAME=VALUE.", code="invalid_edit", hint=f"{option} name=value")
    return name.strip(), value.strip()


@click.command(help="Let no step of a run start any more. What is being worked on is finished and kept.")
@data_dir_option
@click.argument("run_id")
@click.option("--reason", default="", help="Recorded in the audit trail.")
def pause(data_dir: Path | None, run_id: str, reason: str) -> None:
    """Exit 0 when paused; 2 when it has ended or is paused already."""

    async def act() -> str:
        async with operating(data_dir) as operator:
            return (await operator.pause(run_id, reason))["status"]

    click.echo(f"{run_id}: {asyncio.run(act())}; go on with: agentq resume {run_id}")


@click.command(help="Let a paused run go on, with as much time left as it had.")
@data_dir_option
@click.argument("run_id")
def resume(data_dir: Path | None, run_id: str) -> None:
    """Exit 0 when it goes on; 2 when it is not paused."""

    async def act() -> str:
        async with operating(data_dir) as operator:
            return (await operator.resume(run_id))["status"]

    click.echo(f"{run_id}: {asyncio.run(act())}")


@click.command(help="Begin a new run from the middle of another: with the state it had before a step.")
@data_dir_option
@click.argument("run_id")
@click.option("--from", "step_id", required=True, metavar="STEP", help="'agentq show RUN' lists the steps.")
@click.option("--agent", help="Another agent takes the step and the turns after it.")
@edit_options
@click.option("--wait", is_flag=True, help="Wait for the answer and print it.")
@click.option("--timeout", "timeout_s", type=float, default=300.0, show_default=True, help="Seconds, with --wait.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def fork(
    data_dir: Path | None,
    run_id: str,
    step_id: str,
    agent: str | None,
    model: str | None,
    prompt_file: Path | None,
    limits: tuple[str, ...],
    wait: bool,
    timeout_s: float,
    as_json: bool,
) -> None:
    """The original stays as it is. Exit codes as for submit."""
    edits = edits_of(model, prompt_file, limits, agent=agent)

    async def act() -> tuple[str, list[str]]:
        async with operating(data_dir) as operator:
            made = await operator.fork(run_id, step_id, edits)
            return made.run["_id"], made.tools

    new_id, tools = asyncio.run(act())
    again = f" ({', '.join(tools)} at once)" if tools else ""
    click.echo(f"warning: tools from step {step_id} on are called again, for real{again}", err=True)
    if not wait:
        click.echo(json.dumps({"run_id": new_id}) if as_json else new_id)
        return
    from agentq.cli.runs import print_outcome  # noqa: PLC0415

    with open_client(data_dir) as client:
        print_outcome(client.run(new_id).wait(timeout_s), as_json)


@click.command(name="restore-check", help="After a restore from a backup, before schedulers and workers start.")
@data_dir_option
@click.option("--apply", is_flag=True, help="Do it; without this, only count.")
@click.option(
    "--release", is_flag=True, help="Do not pause runs that can still come to a tool that must not act twice."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def restore_check(data_dir: Path | None, apply: bool, release: bool, as_json: bool) -> None:
    """Steps open in the backup may have been done since: irreversible ones wait for a person, others are tried again
    with their key, leases are gone. Exit 2 while a scheduler or a worker is alive."""

    async def act() -> dict[str, int]:
        async with operating(data_dir) as operator:
            return dict(await operator.restore_check(apply=apply, release=release))

    counts = asyncio.run(act())
    if as_json:
        click.echo(json.dumps({"applied": apply, **counts}))
        return
    print_table([("what", "how many"), *((name, str(count)) for name, count in counts.items())])
    click.echo("done; start the system, then see: agentq runs --stuck" if apply else "nothing was changed: add --apply")
