"""Commands about runs: submit, runs, show, wait, cancel, conversation."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agentq.cli.connect import data_dir_option, open_client, open_store
from agentq.cli.table import one_line, print_table, span
from agentq.errors import AgentqError, InvalidRequest, NotFound
from agentq.event import Event

if TYPE_CHECKING:
    from agentq.client import Client, Outcome
    from agentq.engine.stuck import Stuck
    from schemas.run import RunDoc


def _priority(context: click.Context, option: click.Parameter, value: str) -> dict[str, Any]:  # noqa: ARG001
    """``interactive:7`` as the request's fields."""
    name, _, number = value.partition(":")
    if name not in ("interactive", "standard", "batch") or (number and (len(number) != 1 or not number.isdigit())):
        raise click.BadParameter(
            f"{value!r} is no priority. Write interactive, standard or batch, or one of them with ':' and a digit, "
            "as in interactive:7."
        )
    return {"priority": name, **({"urgency": int(number)} if number else {})}


@click.command(help="Hand in a request. TEXT '-' reads it from standard input. Prints the run's id.")
@data_dir_option
@click.argument("text")
@click.option("--workflow", default="default", show_default=True)
@click.option("--tenant", default="default", show_default=True)
@click.option("--user", help="Who asks; tools may check it.")
@click.option("--conversation", help="Runs of one conversation see each other's messages.")
@click.option(
    "--conversation-policy",
    type=click.Choice(["enqueue", "reject", "interrupt", "merge"]),
    help="While a run of the conversation is under way [enqueue].",
)
@click.option(
    "--priority",
    default="standard",
    show_default=True,
    callback=_priority,
    metavar="CLASS[:0-9]",
    help="interactive, standard or batch; then how urgent in it, 9 first.",
)
@click.option("--key", help="Which of the tenant's keys asks; it may have limits.")
@click.option("--at", help="Not before this time, as 2026-12-01T09:00:00+01:00.")
@click.option("--delay", "delay_s", type=float, help="Not before so many seconds from now.")
@click.option("--expires-at", help="The run must have ended by this time.")
@click.option("--cron", help="Again and again: minute hour day month weekday. Prints the schedule's id.")
@click.option("--timezone", help="With --cron [UTC].")
@click.option("--debounce-key", help="A later request with it replaces one that still waits.")
@click.option("--debounce", "debounce_s", type=float, help="Seconds without another before it goes [5].")
@click.option("--singleton-key", help="One run at a time: while one lives, this gives its id.")
@click.option("--budget-usd", type=float, help="Stop with the best draft once this is spent.")
@click.option("--deadline", "deadline_s", type=float, help="Seconds after which the run must have ended.")
@click.option("--idempotency-key", help="Submitting again with this key gives the same run.")
@click.option("--wait", is_flag=True, help="Wait for the answer and print it.")
@click.option("--timeout", "timeout_s", type=float, default=300.0, show_default=True, help="Seconds, with --wait.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def submit(
    data_dir: Path | None,
    text: str,
    wait: bool,
    timeout_s: float,
    as_json: bool,
    cron: str | None,
    timezone: str | None,
    **options: Any,
) -> None:
    """Exit 0 when accepted (with --wait: when succeeded), 1 when the run ended otherwise, 2 for a refused request."""
    if cron is not None and wait:
        raise click.UsageError("--wait does not go with --cron: there is no run yet.")
    if cron is None and timezone is not None:
        raise click.UsageError("--timezone goes with --cron; a time given with --at says its own offset.")
    if options["conversation_policy"] is not None and options["conversation"] is None:
        raise click.UsageError("--conversation-policy needs a --conversation.")
    request = {name: value for name, value in options.items() if value is not None}
    request |= request.pop("priority")
    body = sys.stdin.read() if text == "-" else text
    with open_client(data_dir) as client, _naming_options():
        if cron is not None:
            _submit_schedule(client, {"input": body, **request}, cron, timezone or "UTC", as_json)
            return
        run = client.submit(body, **request)
        if wait:
            print_outcome(run.wait(timeout_s), as_json)
        elif as_json:
            facts = {"run_id": run.run_id, "position": run.position, "estimated_start_s": run.estimated_start_s}
            click.echo(json.dumps(facts))
        else:
            click.echo(run.run_id)
            with suppress(AgentqError):  # it has been accepted, whatever is known of its place
                _say_place(run.position, run.estimated_start_s)


@contextmanager
def _naming_options() -> Iterator[None]:
    """Within it, a refusal that names fields of the request names the options that gave them."""
    given = click.get_current_context().command.params
    options = {str(one.name): one.opts[0] for one in given if isinstance(one, click.Option)}

    def named(text: str) -> str:
        return re.sub(r"'\w+'|^\w+(?=: )", lambda found: options.get(found[0].strip("'"), found[0]), text)

    try:
        yield
    except InvalidRequest as error:
        if "field" in error.details:
            error.message, error.hint = named(error.message), named(error.hint)
        raise


def _submit_schedule(client: Client, request: dict[str, Any], cron: str, timezone: str, as_json: bool) -> None:
    from agentq.schedule import next_time  # noqa: PLC0415 - as the client, it is imported when it is used

    schedule_id = client.schedule(request, cron, timezone)
    click.echo(json.dumps({"schedule_id": schedule_id}) if as_json else schedule_id)
    if not as_json and (due := next_time(cron, timezone, datetime.now(UTC))) is not None:
        click.echo(f"first due {due:%Y-%m-%d %H:%M} UTC", err=True)


def _say_place(position: int | None, start_s: float | None) -> None:
    """On stderr, of a run that was handed in: what it waits for. Nothing where it does not wait."""
    told = [] if position == 0 else [f"{'over a thousand' if position is None else position} before it"]
    told += [f"starts in about {span(start_s)}"] if start_s else []
    if told:
        click.echo(f"waits: {', '.join(told)}", err=True)


@click.command(help="Wait for a run to end and print its answer.")
@data_dir_option
@click.argument("run_id")
@click.option("--timeout", "timeout_s", type=float, default=300.0, show_default=True, help="Seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def wait(data_dir: Path | None, run_id: str, timeout_s: float, as_json: bool) -> None:
    """Exit 0 when the run succeeded, 1 when it ended otherwise."""
    with open_client(data_dir) as client:
        print_outcome(client.run(run_id).wait(timeout_s), as_json)


def print_outcome(outcome: Outcome, as_json: bool) -> None:
    """The answer on stdout, the facts on stderr; ends with code 1 unless the run succeeded."""
    if as_json:
        click.echo(json.dumps(asdict(outcome)))
    else:
        if outcome.answer is not None:
            click.echo(outcome.answer)
        if outcome.error is not None:
            click.echo(f"{outcome.error['message']} {outcome.error.get('hint', '')}".strip(), err=True)
        facts = [outcome.run_id, outcome.status]
        facts += [f"by {outcome.agent}"] if outcome.agent else []
        facts += [f"accepted: {outcome.acceptance}"] if outcome.acceptance else []
        facts += [f"${outcome.cost_usd:.6f}", f"{outcome.latency_s:.2f} s"]
        click.echo(f"({', '.join(facts)})", err=True)
    if outcome.status != "succeeded":
        raise SystemExit(1)


@click.command(help="Ask for a run's end. It is cancelled within about a second.")
@data_dir_option
@click.argument("run_id")
@click.option("--reason", default="", help="Recorded in the audit trail.")
def cancel(data_dir: Path | None, run_id: str, reason: str) -> None:
    """Exit 0 when asked, now or before; 2 when the run has ended otherwise."""
    with open_client(data_dir) as client:
        run = client.run(run_id)
        if run.cancel(reason):
            told = "cancellation requested"
        else:
            told = "has been cancelled already" if run.status() == "cancelled" else "cancellation was requested before"
    click.echo(f"{run_id}: {told}")


@click.command(help="List the latest runs, newest first.")
@data_dir_option
@click.option("--status", help="Only runs of this status.")
@click.option("--tenant", help="Only runs of this tenant.")
@click.option("--workflow", help="Only runs of this workflow.")
@click.option("--stuck", is_flag=True, help="Only live runs that do not get on: why, and what to do about it.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 10_000))
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def runs(
    data_dir: Path | None,
    status: str | None,
    tenant: str | None,
    workflow: str | None,
    stuck: bool,
    limit: int,
    as_json: bool,
) -> None:
    """Reads MongoDB only."""
    if stuck:
        _print_stuck(data_dir, limit, as_json)
        return
    wanted = {"status": status, "tenant": tenant, "workflow.name": workflow}
    condition = {name: value for name, value in wanted.items() if value is not None}
    found = asyncio.run(_latest(data_dir, condition, limit))
    if as_json:
        for run in found:
            click.echo(json.dumps(_summary(run)))
        return
    if not found:
        click.echo("No runs yet. Hand one in with: agentq submit 'your request'")
        return
    rows = [("run", "status", "workflow", "agent", "age", "took", "cost", "input")]
    for run in found:
        facts = _summary(run)
        age = (datetime.now(UTC) - run["created_at"]).total_seconds()
        took = "-" if facts["latency_s"] is None else span(facts["latency_s"])
        said = one_line(run["input"], 60) or f"({facts['error']})"
        cost = f"${facts['cost_usd']:.5f}"
        rows.append(
            (
                facts["run_id"],
                run["status"],
                facts["workflow"] or "-",
                facts["agent"] or "-",
                span(age),
                took,
                cost,
                said,
            )
        )
    print_table(rows)


def _print_stuck(data_dir: Path | None, limit: int, as_json: bool) -> None:
    from agentq.cli.repair import operating  # noqa: PLC0415 - the engine is imported when it is used
    from agentq.runtime.operator import MOST_LIVE_RUNS  # noqa: PLC0415

    async def look() -> tuple[list[tuple[RunDoc, Stuck]], int]:
        async with operating(data_dir) as operator:
            return await operator.stuck(limit)

    found, seen = asyncio.run(look())
    if as_json:
        for run, stuck in found:
            click.echo(json.dumps({**_summary(run), "why": stuck.why, "todo": stuck.todo}))
        return
    rows = [("run", "status", "age", "why", "what to do")]
    for run, stuck in found:
        age = span((datetime.now(UTC) - run["created_at"]).total_seconds())
        rows.append((run["_id"], run["status"], age, one_line(stuck.why, 70), stuck.todo))
    if found:
        print_table(rows)
    bounded = "" if seen < MOST_LIVE_RUNS else " (there are more; those that are due first were looked at)"
    click.echo(f"{len(found)} stuck of {seen} live runs{bounded}", err=bool(found))


async def _latest(data_dir: Path | None, condition: dict[str, Any], limit: int) -> list[RunDoc]:
    async with open_store(data_dir) as store:
        return await store.latest(condition, limit)


def _summary(run: RunDoc) -> dict[str, Any]:
    ended, result = run["ended_at"], run["result"]
    return {
        "run_id": run["_id"],
        "status": run["status"],
        "workflow": run["workflow"].get("name"),
        "tenant": run["tenant"],
        "agent": result["agent"] if result else None,
        "created_at": run["created_at"].isoformat(),
        "latency_s": (ended - run["created_at"]).total_seconds() if ended else None,
        "cost_usd": run["usage"].get("cost_nano_usd", 0) / 1e9,
        "error": (run["error"] or {}).get("code"),
    }


@click.command(help="Show a run: its timeline of steps, calls and costs, what is still open, its answer.")
@data_dir_option
@click.argument("run_id")
@click.option("--json", "as_json", is_flag=True, help="The whole run and its events as JSON.")
def show(data_dir: Path | None, run_id: str, as_json: bool) -> None:
    """Reads MongoDB only."""
    run, events = asyncio.run(_run_and_events(data_dir, run_id))
    if as_json:
        click.echo(json.dumps({"run": run, "events": events}, default=str))
        return
    facts = _summary(run)
    click.echo(f"run       {run_id}  {run['status']}")
    click.echo(f"request   {one_line(run['input'], 200)}")
    if run["workflow"]:
        click.echo(f"workflow  {run['workflow']['name']}  version {run['workflow']['hash'][:12]}")
    who = [f"tenant {run['tenant']}"]
    who += [f"user {run['user']}"] if run["user"] else []
    who += [f"conversation {run['conversation']} turn {run['turn']}"] if run["conversation"] else []
    click.echo(f"for       {', '.join(who)}")
    if "forked_from" in run:
        click.echo(f"fork      of {run['forked_from']['run']}, from step {run['forked_from']['step']}")
    if "pause" in run:
        click.echo(f"paused    {one_line(run['pause']['reason'], 200)}; go on with: agentq resume {run_id}")
    if "backlog" in run:
        click.echo(f"backlog   {_backlog(data_dir, run_id, run)}")
    _show_totals(run, facts)
    click.echo("\n   at ms  step  event")
    began = events[0]["at_ms"] if events else 0
    for event in events:
        click.echo(f"{event['at_ms'] - began:8d}  {event['step'] or '-':4s}  {_describe(event)}")
    for step_id, step in sorted(run["steps"].items()):
        lease = run["leases"].get(step_id)
        where = f"worked on by {lease['worker']}" if lease else f"waits for {_waits_for(run, step_id)}"
        click.echo(f"    open  {step_id:4s}  {step['kind']} (attempt {step['attempt']}), {where}")
    if run["result"] is not None:
        click.echo(f"\nanswer    accepted: {run['result']['acceptance']}\n{run['result']['answer']}")
    if run["error"] is not None:
        click.echo(f"\nerror     {run['error']['code']}: {run['error']['message']} {run['error'].get('hint', '')}")


def _backlog(data_dir: Path | None, run_id: str, run: RunDoc) -> str:
    """What a waiting run waits for, and for how long."""
    backlog = run["backlog"]
    if backlog.get("hold") == "time":
        return f"not before {backlog['at']:%Y-%m-%d %H:%M:%S} UTC"
    if backlog.get("hold") == "turn":
        return f"after the run of conversation {run['conversation']} that is under way"
    with open_client(data_dir) as client:
        handle = client.run(run_id)
        position, start_s = handle.position, handle.estimated_start_s
    before = "over a thousand" if position is None else str(position)
    when = "" if start_s is None else f", starts in about {span(start_s)}"
    return f"{before} before it in the {run['priority']} line of {run['tenant']}{when}"


def _show_totals(run: RunDoc, facts: dict[str, Any]) -> None:
    usage = run["usage"]
    took = "" if facts["latency_s"] is None else f", {span(facts['latency_s'])}"
    click.echo(
        f"took      {usage.get('steps', 0)} steps, {usage.get('llm_calls', 0)} model calls, "
        f"{usage.get('tool_calls', 0)} tool calls, "
        f"{usage.get('input_tokens', 0)}+{usage.get('output_tokens', 0)} tokens, "
        f"${facts['cost_usd']:.6f}{took}"
    )
    if run["waste"]:
        waste = run["waste"]
        click.echo(
            f"waste     {waste.get('lost_calls', 0)} calls lost with their worker ({waste.get('lost_llm_calls', 0)} to "
            f"models: perhaps paid, in no cost), {waste.get('cut_calls', 0)} cut, "
            f"{waste.get('llm_calls', 0)} late, "
            f"${waste.get('cost_nano_usd', 0) / 1e9:.6f}"
        )


def _waits_for(run: RunDoc, step_id: str) -> str:
    step = run["steps"][step_id]
    if "held" in step:
        return f"a person ({step['held']})"
    if "joins" in run and run["joins"]["step"] == step_id:
        job, live_at = run["joins"].get("job", "a job"), step["not_before"]
        return f"{job} of {run['joins']['endpoint']}, is made live at {live_at:%Y-%m-%d %H:%M} UTC at the latest"
    if "not_before" in step:
        return f"{step['not_before']:%H:%M:%S} UTC"
    return f"the {step['pool']} pool"


_TOLD_ELSEWHERE = {"model", "input_tokens", "output_tokens", "cost_nano_usd", "latency_ms"}


def _describe(event: Event) -> str:
    data = event["data"]
    told = {key: value for key, value in data.items() if key not in _TOLD_ELSEWHERE and value not in (None, [], "")}
    facts = " ".join(
        f"{key}={one_line(_plain(value), 90)}" for key, value in told.items() if not key.endswith("sha256")
    )
    call = ""
    if "model" in data:
        call = (
            f"  [{data['model']}, {data['input_tokens']}+{data['output_tokens']} tokens, "
            f"${data['cost_nano_usd'] / 1e9:.6f}, {data['latency_ms']} ms]"
        )
    elif "latency_ms" in data:
        call = f"  [{data['latency_ms']} ms]"
    return f"{event['type']:16s} {facts}{call}"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


async def _run_and_events(data_dir: Path | None, run_id: str) -> tuple[RunDoc, list[Event]]:
    async with open_store(data_dir) as store:
        run = await store.load(run_id)
        if run is None:
            raise NotFound(f"There is no run {run_id!r}.", hint="'agentq runs' lists the latest.")
        events = {event["seq"]: event async for event in store.audit_events(run_id)}
        events |= {event["seq"]: event for event in run["events"]}
        return run, [events[seq] for seq in sorted(events)]


@click.command(help="Print the messages of a conversation, in order.")
@data_dir_option
@click.argument("conversation_id")
@click.option("--tenant", default="default", show_default=True)
def conversation(data_dir: Path | None, conversation_id: str, tenant: str) -> None:
    """Reads MongoDB only."""
    turns = asyncio.run(_turns(data_dir, tenant, conversation_id))
    if not turns:
        raise NotFound(
            f"Tenant {tenant!r} has no conversation {conversation_id!r}.", hint="Check the name and --tenant."
        )
    for run in turns:
        click.echo(f"[{run['turn']}] {run['user'] or 'user'}: {one_line(run['input'], 2000)}")
        result = run["result"]
        answer = result["answer"] if result else f"({run['status']})"
        click.echo(f"    {(result and result['agent']) or 'agentq'}: {one_line(answer, 4000)}")


async def _turns(data_dir: Path | None, tenant: str, conversation_id: str) -> list[RunDoc]:
    async with open_store(data_dir) as store:
        return await store.conversation(tenant, conversation_id)
