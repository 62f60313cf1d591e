"""Commands about notifications: what is on its way to others, what did not arrive, and trying that again."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agentq.cli.connect import data_dir_option, open_store
from agentq.cli.table import counted
from agentq.errors import Conflict, NotFound

if TYPE_CHECKING:
    from schemas.delivery import Delivery


@click.group(help="Webhooks and follow-up tasks: list them, try some again.")
def notifications() -> None:
    """The group ``agentq notifications``."""


@notifications.command("list", help="List deliveries, newest first: where to, how often tried, why not arrived.")
@data_dir_option
@click.option("--status", type=click.Choice(["pending", "delivered", "dead"]), help="Only those.")
@click.option("--of", "subject", metavar="ID", help="Only those of this run or batch.")
@click.option("--tenant", help="Only those of this tenant.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 10_000))
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def list_(
    data_dir: Path | None, status: str | None, subject: str | None, tenant: str | None, limit: int, as_json: bool
) -> None:
    """Reads MongoDB only."""
    from agentq.engine.delivery import receiver  # noqa: PLC0415

    wanted = {"status": status, "subject": subject, "tenant": tenant}
    condition = {name: value for name, value in wanted.items() if value is not None}
    found = asyncio.run(_latest(data_dir, condition, limit))
    if as_json:
        for delivery in found:
            click.echo(json.dumps(_facts(delivery, receiver(delivery))))
        return
    if not found and condition:
        click.echo("No delivery matches.")
        return
    if not found:
        click.echo("There are none. A request asks for one with its fields webhook and follow_up.")
        return
    for delivery in found:
        facts = _facts(delivery, receiver(delivery))
        click.echo(f"{facts['status']:9}  {facts['id']}  {facts['type']}  to {facts['to']}")
        if facts["status"] == "pending":
            click.echo(f"           {counted(facts['tries'], 'try', 'tries')}, next {facts['next']}{_because(facts)}")
        elif facts["status"] == "dead":
            click.echo(f"           given up after {counted(facts['tries'], 'try', 'tries')}{_because(facts)}")


def _because(facts: dict[str, Any]) -> str:
    return f": {facts['error']['code']}, {facts['error']['message']}" if facts["error"] else ""


async def _latest(data_dir: Path | None, condition: dict[str, Any], limit: int) -> list[Delivery]:
    async with open_store(data_dir) as store:
        return await store.deliveries.latest(condition, limit)


def _facts(delivery: Delivery, to: str) -> dict[str, Any]:
    error = delivery["error"]
    return {
        "id": delivery["_id"],
        "status": delivery["status"],
        "type": delivery["type"],
        "of": delivery["subject"],
        "tenant": delivery["tenant"],
        "to": to,
        "tries": delivery["attempts"],
        "next": delivery["not_before"].isoformat(timespec="seconds") if delivery["status"] == "pending" else None,
        "error": None if error is None else {"code": error["code"], "message": error["message"]},
    }


@notifications.command(
    help="Try a dead or a pending delivery again, at once and from the start of its schedule; --dead: all dead ones."
)
@data_dir_option
@click.argument("delivery_id", required=False)
@click.option("--dead", "everything", is_flag=True, help="Every dead delivery.")
@click.option("--tenant", help="With --dead: only those of this tenant.")
def retry(data_dir: Path | None, delivery_id: str | None, everything: bool, tenant: str | None) -> None:
    """Exit 0 when it is on its way again; 2 where it has arrived or is being tried."""
    if (delivery_id is None) != everything:
        raise click.UsageError("Name a delivery, or say --dead.")
    click.echo(f"{asyncio.run(_retry(data_dir, delivery_id, tenant))} on the way again")


async def _retry(data_dir: Path | None, delivery_id: str | None, tenant: str | None) -> int:
    async with open_store(data_dir) as store:
        if delivery_id is None:
            return await store.deliveries.redrive({} if tenant is None else {"tenant": tenant})
        if redriven := await store.deliveries.redrive({"_id": delivery_id}):
            return redriven
        if await store.deliveries.hasten(delivery_id):
            return 1
        delivery = await store.deliveries.load(delivery_id)
    if delivery is None:
        raise NotFound(
            f"There is no delivery {delivery_id!r}.", hint="'agentq notifications list --status dead' shows some."
        )
    if delivery["status"] == "pending":
        raise Conflict(
            f"Delivery {delivery_id} is being tried.", hint="'agentq notifications list' says what came of it."
        )
    raise Conflict(f"Delivery {delivery_id} has arrived.", hint="There is nothing to retry.")
