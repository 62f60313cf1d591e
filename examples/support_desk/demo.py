"""The support desk at work: ``python -m examples.support_desk.demo``.

Loads the desk's data anew, submits all requests to the running system, shows each answer as it comes, and ends with
the scorecard. Exit code 0 if every expectation is met. Needs a system that runs with ``--app examples/support_desk``.
"""

from __future__ import annotations

import argparse
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from pydantic import SecretStr
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from agentq.client import Client, Handle, Outcome
from agentq.errors import AgentqError
from config.settings import load_settings
from examples.support_desk.desk import database
from examples.support_desk.scorecard import DEMO_RUNS, DeskRequest, exit_code, load_requests, score, show
from examples.support_desk.seed import seed

WORKFLOW = "support_desk"
AT_ONCE = 16  # conversations waited for side by side; the requests themselves run in the worker pools


@dataclass(frozen=True, slots=True)
class Answered:
    request: DeskRequest
    outcome: Outcome


def talks(requests: list[DeskRequest]) -> list[list[DeskRequest]]:
    """The requests as conversations, in order; a request without a conversation is one of its own."""
    grouped: dict[str, list[DeskRequest]] = {}
    for request in requests:
        grouped.setdefault(request.conversation or f"alone:{request.id}", []).append(request)
    return list(grouped.values())


def hold(client: Client, talk: list[DeskRequest], demo: str, timeout_s: float) -> list[Answered]:
    """Send the requests of one conversation, each after the one before has been answered."""
    answered: list[Answered] = []
    for request in talk:
        handle = submit(client, request, demo)
        answered.append(Answered(request, handle.wait(timeout_s)))
    return answered


def submit(client: Client, request: DeskRequest, demo: str) -> Handle:
    """Hand in one request. ``demo`` keeps the conversations and keys of one demo apart from those of others."""
    return client.submit(
        request.text,
        workflow=WORKFLOW,
        user=request.user,
        conversation=f"{request.conversation}-{demo}" if request.conversation else None,
        priority="interactive",
        idempotency_key=f"demo-{demo}-{request.id}",
        metadata={"request": request.id, "demo": demo},
    )


def work_off(client: Client, requests: list[DeskRequest], demo: str, timeout_s: float) -> Iterator[Answered]:
    """All requests, conversations side by side; yields them as they end."""
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="demo") as pool:
        futures = [pool.submit(hold, client, talk, demo, timeout_s) for talk in talks(requests)]
        for future in as_completed(futures):
            yield from future.result()


def tell(console: Console, answered: Answered) -> None:
    """One answer with who gave it, what was called for it and what it cost."""
    request, outcome = answered.request, answered.outcome
    console.print()
    console.print(f"[bold]{request.id}[/] ({request.user or 'not signed in'})", highlight=False)
    console.print(request.text.strip(), style="cyan", markup=False, highlight=False)
    console.print(outcome.answer or f"no answer: {outcome.error}", markup=False, highlight=False)
    facts = [
        f"{outcome.status}, answered by {outcome.agent}",
        f"tools: {', '.join(dict.fromkeys(outcome.tools)) or 'none'}",
        f"cites: {', '.join(outcome.citations) or 'nothing'}",
        f"accepted by: {outcome.acceptance}",
        f"{outcome.cost_usd:.5f} USD",
        f"{outcome.latency_s:.2f} s",
    ]
    console.print(" | ".join(facts), style="dim", markup=False, highlight=False)


def run(client: Client, mongo_url: str, desk_database: str | None, timeout_s: float, console: Console) -> int:
    """The whole demo; the scorecard's exit code."""
    desk, requests, demo = database(mongo_url, desk_database), load_requests(), uuid.uuid4().hex[:8]
    loaded = seed(desk)
    console.print(f"Loaded {', '.join(f'{count} {name}' for name, count in loaded.items())}.", highlight=False)
    desk[DEMO_RUNS].delete_many({})
    outcomes: dict[str, Outcome] = {}
    began = time.monotonic()
    columns = (TextColumn("answered"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("answered", total=len(requests))
        for answered in work_off(client, requests, demo, timeout_s):
            outcomes[answered.request.id] = answered.outcome
            desk[DEMO_RUNS].insert_one({"_id": answered.request.id, "run_id": answered.outcome.run_id})
            tell(progress.console, answered)
            progress.advance(bar)
    console.print(f"\n{len(outcomes)} requests in {time.monotonic() - began:.1f} s.\n", highlight=False)
    scores = score(requests, outcomes, desk)
    show(scores, console)
    return exit_code(scores)


def plain(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.support_desk.demo", description=__doc__)
    parser.add_argument("--mongo-url", help="default: the settings or the running stack")
    parser.add_argument("--broker-url", help="default: the settings or the running stack")
    parser.add_argument(
        "--desk-database", help="the desk's own database; default AGENTQ_SUPPORT_DESK_DB or support_desk"
    )
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds to wait for one answer; default 300")
    arguments = parser.parse_args(argv)
    try:
        settings = load_settings()
        mongo = arguments.mongo_url or plain(settings.mongo_url)
        broker = arguments.broker_url or plain(settings.broker_url)
        if not mongo:
            print("No agentq is running here: start it with 'agentq up --app examples/support_desk'.", file=sys.stderr)
            return 2
        with Client(mongo, broker, settings.mongo_database) as client:
            return run(client, mongo, arguments.desk_database, arguments.timeout, Console())
    except AgentqError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
