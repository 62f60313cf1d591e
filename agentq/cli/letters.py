"""Dead letters as the ``dlq`` commands share them: which are meant, what is told of one, how one goes on."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from agentq.cli.repair import operating
from agentq.errors import Conflict, InvalidRequest

if TYPE_CHECKING:
    from agentq.client import Client
    from agentq.runtime.operator import Kind, Operator
    from schemas.run import RunDoc

MOST = 10_000
_KINDS = ("quarantined", "held", "rejected")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def filters(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say which dead letters are meant; ``seek`` takes them together."""
    for option in (
        click.option("--since", help="Not older than: 2h, 7d, or a time as 2026-05-01T03:00Z."),
        click.option("--code", help="Only with this error code."),
        click.option("--workflow", help="Only of this workflow."),
        click.option("--tenant", help="Only of this tenant."),
        click.option("--kind", "kinds", type=click.Choice(_KINDS), multiple=True, help="May be repeated."),
    ):
        command = option(command)
    return command


async def seek(
    data_dir: Path | None, limit: int, which: dict[str, Any], default: Sequence[str] = _KINDS
) -> list[tuple[Kind, RunDoc]]:
    """The dead letters that the filters let through; of the kinds ``default`` where none is named."""
    from agentq.store.api import Letters  # noqa: PLC0415 - the store is imported when it is used

    given = {name: value for name, value in which.items() if name != "kinds"}
    given["since"] = None if given["since"] is None else _moment(given["since"])
    kinds = cast("Sequence[Kind]", which["kinds"] or default)
    async with operating(data_dir) as operator:
        return await operator.dead_letters(kinds, Letters(**given), limit)


def _moment(text: str) -> datetime:
    number, unit = text[:-1], text[-1:]
    if number.isdecimal() and unit in _UNITS and len(number) < 7:
        return datetime.now(UTC) - timedelta(seconds=int(number) * _UNITS[unit])
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidRequest(
            f"--since {text!r} is no time.", code="invalid_time", hint="Write 30m, 2h, 7d, or 2026-05-01T03:00Z."
        ) from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def facts_of(kind: Kind, run: RunDoc) -> dict[str, Any]:
    from agentq.runtime.operator import affected  # noqa: PLC0415

    code, step, message = affected(kind, run)
    return {
        "run_id": run["_id"], "kind": kind, "tenant": run["tenant"], "workflow": run["workflow"].get("name"),
        "code": code, "step": step, "message": message, "at": (run["ended_at"] or run["created_at"]).isoformat(),
    }  # fmt: skip


def kind_of(run: RunDoc) -> Kind:
    """Raises ``Conflict`` for a run with which nothing is wrong."""
    from agentq.engine.repair import held_steps  # noqa: PLC0415

    if run["status"] == "failed" and "quarantine" in run:
        return "quarantined"
    if run["status"] == "rejected" and "refused" in run:
        return "rejected"
    if held_steps(run):
        return "held"
    raise Conflict(f"Run {run['_id']} is no dead letter; it is {run['status']}.", hint="See 'agentq dlq list'.")


def chosen(
    data_dir: Path | None, everything: bool, limit: int, which: dict[str, Any], default: Sequence[str]
) -> list[tuple[Kind, RunDoc]]:
    """What an act on many is for. Raises ``InvalidRequest`` where nobody said which."""
    if not everything and not any(which.values()):
        raise InvalidRequest(
            "Which ones?", code="missing_argument", hint="Name a RUN, filter by --code, --workflow, ..., or say --all."
        )
    return asyncio.run(seek(data_dir, limit, which, default))


def confirm(question: str, yes: bool) -> None:
    """Ask on a terminal; elsewhere raise ``InvalidRequest``."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise InvalidRequest(question, code="not_confirmed", hint="Add --yes to do it without being asked.")
    click.confirm(question, abort=True)


async def retried(operator: Operator, client: Client, run_id: str, *, step_id: str | None = None) -> str:
    """The id of the run that goes on: a new one where a refused request is handed in again."""
    run = await operator.load(run_id)
    if kind_of(run) != "rejected":
        await operator.retry(run_id, step_id=step_id)
        return run_id
    return await hand_in(operator, client, run, kept_body(run), edited=False)


async def hand_in(operator: Operator, client: Client, run: RunDoc, body: Any, *, edited: bool) -> str:
    """A refused request as a new run. Repeated after a crash in between, it gives the same run."""
    from agentq.protocol import parse_request  # noqa: PLC0415

    request = parse_request(body)
    if "run" in run["refused"]:
        raise Conflict(f"It was handed in again as run {run['refused']['run']}.")
    if request.idempotency_key is None:
        request = request.model_copy(update={"idempotency_key": f"refused:{run['_id']}"})
    new_id = (await asyncio.to_thread(client.accept, request)).run_id
    await operator.handed_in_again(run["_id"], new_id, edited=edited)
    return new_id


def kept_body(run: RunDoc) -> Any:
    """What is kept of a refused request. Raises ``Conflict`` where nothing is."""
    if "body" not in run["refused"]:
        raise Conflict(
            f"The body of {run['_id']} was not kept: it was no JSON, or too large.",
            code="not_kept",
            hint="Ask its sender to send it again; 'agentq dlq drop' takes it off the list.",
        )
    return json.loads(run["refused"]["body"])
