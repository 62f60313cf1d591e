"""The outside as one process sees it: the way to the database, the model, the tools and the broker.

Every call is a point at which the seed decides: how long it takes, whether it is applied, whether its answer comes,
whether the process survives it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from agentq.engine.commit import Commit, Grant
from agentq.errors import AgentqError, ProviderError, Unavailable
from agentq.event import Event
from agentq.protocol import Hint, Pool
from agentq.runtime.leases import LeaseKeeper
from agentq.runtime.scheduler import ROUNDS
from agentq.store.api import Held, Queue, Verdict
from agentq.store.memory import MemoryStore
from agentq.tools import ToolContext, ToolResult
from schemas.catalog import Bundle
from schemas.chat import Message
from schemas.llm import LlmCall, LlmReply
from schemas.run import RunDoc
from tests.simulation.invariants import Books
from tests.simulation.job_port import JobsServer
from tests.simulation.loop import Killed, Process, answer, fail
from tests.simulation.workload import TOOLS

if TYPE_CHECKING:
    from tests.simulation.world import World

START = datetime(2026, 1, 1, tzinfo=UTC)
UNHEARD = ("tool_unknown_undone", "tool_unknown_done")
SPINNING = ROUNDS  # times that one look of the scheduler meets the same run unchanged


class Server(MemoryStore):
    """The database itself. The in-memory store, with the books told of what it did."""

    books: Books
    jobs: JobsServer

    async def claim(self, hint: Hint, grant: Grant) -> RunDoc | None:
        run = await super().claim(hint, grant)
        if run is not None:
            self.books.claimed(run, hint, grant.worker, self._clock())
        return run

    async def commit(self, commit: Commit) -> Verdict:
        before = self.runs.get(commit.run_id)
        verdict = await super().commit(commit)
        after = self.runs.get(commit.run_id)
        if before is not None and after is not None and after is not before:
            self.books.committed(before, after, commit, self._clock())
        return verdict

    async def book_waste(self, run_id: str, token: str, waste: dict[str, int]) -> None:
        known = token in self.runs[run_id].get("late", [])
        await super().book_waste(run_id, token, waste)
        if not known:
            self.books.wasted(self.runs[run_id], token, waste)

    async def due_by(self, limit: int, skew_ms: int) -> list[RunDoc]:
        """``due`` by the asking process's clock, as MongoDB's store asks."""
        clock = self._clock
        self._clock = lambda: clock() + timedelta(milliseconds=skew_ms)
        try:
            return await super().due(limit)
        finally:
            self._clock = clock

    async def all_live(self) -> list[RunDoc]:
        """``live`` in one answer."""
        return [run async for run in self.live()]


def now_or_never(work: Coroutine[Any, Any, Any]) -> tuple[Any, AgentqError | None]:
    """The result of a method that never waits, or its error."""
    try:
        work.send(None)
    except StopIteration as done:
        return done.value, None
    except AgentqError as error:
        return None, error
    raise AssertionError("a method of the store waited")


class Port:
    """One process's way to the outside: the store, the model, the tools and the broker as it sees them."""

    def __init__(self, world: World, process: Process) -> None:
        self.world = world
        self.process = process
        self.met: Counter[tuple[str, int]] = Counter()  # by the scheduler's look under way: runs and their revisions

    # -- the store --------------------------------------------------------------------------------------------------

    def now(self) -> datetime:
        return START + timedelta(milliseconds=self.world.clock.ms + self.process.skew_ms)

    async def sync_clock(self) -> None:
        """The skew is what is left after it."""

    async def claim(self, hint: Hint, grant: Grant) -> RunDoc | None:
        found: RunDoc | None = await self._ask("claim", self.world.server.claim, hint, grant)
        return found

    async def commit(self, commit: Commit) -> Verdict:
        verdict: Verdict = await self._ask("commit", self.world.server.commit, commit)
        return verdict

    async def renew(self, leases: Sequence[Held], ms: int) -> set[Held]:
        lost: set[Held] = await self._ask("renew", self.world.server.renew, leases, ms)
        return lost

    async def load(self, run_id: str) -> RunDoc | None:
        found: RunDoc | None = await self._ask("load", self.world.server.load, run_id)
        return found

    async def record(self, run: RunDoc) -> None:
        await self._ask("record", self.world.server.record, run)

    async def due(self, limit: int) -> list[RunDoc]:
        found: list[RunDoc] = await self._ask("due", self.world.server.due_by, limit, self.process.skew_ms)
        self.met.update((run["_id"], run["rev"]) for run in found)
        calm = not self.world.faults.on  # faults delay what moves a run on
        if calm and max(self.met.values(), default=0) >= SPINNING:
            self.world.books.wrong(f"one look of {self.process.name} goes round and round")
            self.world.clock.stopped = True
        return found

    async def set_due(self, run: RunDoc, due: datetime | None) -> None:
        await self._ask("set_due", self.world.server.set_due, run, due)

    async def copy_audit(self, events: Sequence[Event]) -> None:
        await self._ask("copy_audit", self.world.server.copy_audit, events)

    def audit_events(self, run_id: str) -> AsyncIterator[Event]:
        return self.world.server.audit_events(run_id)

    async def settle(self, run: RunDoc) -> None:
        await self._ask("settle", self.world.server.settle, run)

    async def pass_turn(self, run: RunDoc) -> None:
        await self._ask("pass_turn", self.world.server.pass_turn, run)

    async def notify(self, run: RunDoc) -> None:
        await self._ask("notify", self.world.server.notify, run)

    async def book_waste(self, run_id: str, token: str, waste: dict[str, int]) -> None:
        await self._ask("book_waste", self.world.server.book_waste, run_id, token, waste)

    async def history(self, run: RunDoc, tokens: int) -> list[Message]:
        found: list[Message] = await self._ask("history", self.world.server.history, run, tokens)
        return found

    async def bundle(self, bundle_hash: str) -> Bundle | None:
        return await self.world.server.bundle(bundle_hash)

    async def register(self, bundles: Sequence[Bundle]) -> None:
        await self.world.server.register(bundles)

    async def live(self) -> AsyncIterator[RunDoc]:
        for run in await self._ask("live", self.world.server.all_live):
            yield run

    async def queues(self) -> dict[Pool, Queue]:
        """Workers report nothing here: every repeated hint is a probe."""
        return {}

    async def stopped(self, run_ids: Collection[str]) -> set[str]:
        found: set[str] = await self._ask("stopped", self.world.server.stopped, run_ids)
        return found

    async def beat(self, name: str, facts: dict[str, Any]) -> None:
        """Of no consequence here."""

    def _ask(self, name: str, method: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> asyncio.Future[Any]:
        """Send a call to the database; the seed decides when it is applied, when its answer comes, and if."""
        world, process = self.world, self.process
        future = process.create_future()
        fault = world.faults.strike("store", process.name)
        if fault is None and world.clock.ms < world.outage_until and world.faults.on:
            fault = "refuse" if world.rng.random() < 0.8 else "lose_answer"
            process.disturbed_at = world.clock.ms
        elif fault is not None:
            world.note(process, f"{fault} at {name} {_brief(args)}")
            world.disturb(process, fault)
        if fault == "kill_before":
            world.kill(process)
        elif fault == "refuse":
            world.clock.after(world.slow(3_000), process, fail, future, _unavailable())
        elif fault is None:
            self._usual(future, name, method, args)
        else:
            there, back = world.quick(), world.quick()
            if fault == "slow":
                there, back = (world.slow(60_000), back) if world.rng.random() < 0.5 else (there, world.slow(60_000))
            world.clock.after(there, None, self._apply, future, name, method, args, back, fault)
        return future

    def _usual(self, future: asyncio.Future[Any], name: str, method: Any, args: tuple[Any, ...]) -> None:
        world = self.world
        if world.rng.random() < 0.5:
            self._apply(future, name, method, args, world.quick(), None)
        else:
            world.clock.after(world.quick(), None, self._apply, future, name, method, args, 0, None)

    def _apply(
        self, future: asyncio.Future[Any], name: str, method: Any, args: tuple[Any, ...], back: int, fault: str | None
    ) -> None:
        """The call reaches the database."""
        world, process = self.world, self.process
        result, error = now_or_never(method(*args))
        if world.clock.trace is not None and name not in ("due", "set_due"):
            world.note(process, f"{name} {_brief(args)} -> {_brief((result,))}")
        if fault == "kill_after":
            world.kill(process)
        elif fault == "lose_answer":
            world.clock.after(back, process, fail, future, _unavailable())
        elif error is not None:
            world.clock.after(back, process, fail, future, error)
        else:
            world.clock.after(back, process, answer, future, result)

    # -- the model --------------------------------------------------------------------------------------------------

    async def complete(self, call: LlmCall) -> LlmReply:
        """A model call. It is paid for if it is answered; only who hears the answer can book it."""
        world, process = self.world, self.process
        run_id, step_id = call.key.split(":")
        world.books.effect(process, run_id, step_id)
        world.books.jobs.live(run_id, step_id)
        fault = world.faults.strike("llm", process.name)
        world.note(process, f"model {call.purpose} for {call.key} {fault or ''}")
        if fault is not None:
            world.disturb(process, fault)
        await self._wait(world.slow(100_000) if fault == "llm_slow" else world.slow(3_000))
        if fault == "kill_after":
            await self._die()
        if fault == "llm_busy":
            wish = world.rng.choice((None, 5.0, 40.0))
            raise ProviderError("busy", code="rate_limited", retryable=True, retry_after_s=wish)
        if fault == "llm_refused":
            raise ProviderError("no", code="refused", retryable=False)
        return world.answer(call, run_id, process)

    def _wait(self, ms: int) -> asyncio.Future[Any]:
        future = self.process.create_future()
        self.world.clock.after(ms, self.process, answer, future, None)
        return future

    def _die(self) -> asyncio.Future[Any]:
        self.world.kill(self.process)
        return self.process.create_future()

    # -- the tools --------------------------------------------------------------------------------------------------

    async def call(
        self, name: str, arguments: Any, context: ToolContext, *, allowed: Any, spec: Any = None
    ) -> ToolResult:
        """A tool call, as ``agentq.tools.Toolbox`` makes it."""
        world, process = self.world, self.process
        run_id, step_id = context.run_id, context.step_id
        world.books.effect(process, run_id, step_id)
        fault = world.unheard.pop((run_id, step_id), None) if world.faults.on else None
        fault = fault or world.faults.strike("tool", process.name)
        if fault in UNHEARD and world.rng.random() < 0.5:
            world.unheard[run_id, step_id] = fault  # whose answer was too late may be too late again
        world.note(process, f"tool {name} for {run_id}:{step_id} {fault or ''}")
        if fault is not None:
            world.disturb(process, fault)
        if fault in ("kill_before", "tool_unknown_undone"):
            await (self._die() if fault == "kill_before" else self._wait(10_000))
            return self._unknown(name)
        if world.rng.random() < 0.5:
            await self._wait(world.quick())
        if name == "refund":
            world.books.keyed_effect(run_id, step_id, context.idempotency_key)
        elif name == "post":
            world.books.unsafe_effect(run_id, step_id)
        if fault == "kill_after":
            await self._die()
        await self._wait(world.slow(100_000) if fault == "tool_slow" else world.slow(1_000))
        if fault == "tool_unknown_done":
            return self._unknown(name)
        if fault == "tool_bug":
            raise RuntimeError("a fault of the tool runner, after the tool")
        return ToolResult(True, "ok", f"{name} is done", False, 1, False)

    def _unknown(self, name: str) -> ToolResult:
        return ToolResult(False, "timeout", "No answer in time.", False, 1, TOOLS[name].effect != "read")

    # -- the broker and the rest ------------------------------------------------------------------------------------

    async def publish(self, hints: Sequence[tuple[Pool, Hint]]) -> None:
        """Hand hints to the broker. Never raises, as the publisher promises."""
        world, process = self.world, self.process
        for _, hint in hints:
            world.books.published(hint)
        fault = world.faults.strike("publish", process.name)
        if fault is not None:
            world.note(process, f"{fault} {hints}")
        if fault == "kill_before":
            await self._die()
        if fault != "hint_lost":
            world.broker.take(hints, fault)
        if fault == "kill_after":
            await self._die()
        await self._wait(world.quick())

    async def reply(self, run: RunDoc) -> None:
        """Nobody waits through Celery here."""

    async def broker_lost(self) -> bool:
        await self._wait(self.world.quick())
        was, self.world.broker.lost = self.world.broker.lost, False
        return was

    def crash_point(self, point: str) -> None:
        tries = 3 if point.startswith("job_") else 1  # these are passed more rarely
        if any(self.world.faults.strike("point", self.process.name) for _ in range(tries)):
            self.world.note(self.process, f"killed at {point}")
            self.world.points.add(point)
            self.world.kill(self.process)
            raise Killed


class Keeper(LeaseKeeper):
    """The real keeper, woken up as its ``run`` does, but only while it holds something: sleep costs schedules."""

    def __init__(self, lease_ms: int, process: Process, port: Any) -> None:
        super().__init__(lease_ms, monotonic=process.monotonic)
        self._process = process
        self._port = port
        self._armed = False
        self.on_stopped: Callable[[str], None] = print  # the runtime's cut, which is made later

    def add(self, held: Held, since: float | None = None) -> None:
        super().add(held, since)
        if not self._armed:
            self._armed = True
            self._process.start(self._keep())

    async def _keep(self) -> None:
        while self._since:
            await asyncio.sleep(self.lease_ms / 6000)
            with suppress(Unavailable):
                await self.renew_due(self._port)
                await self.watch(self._port, self.on_stopped)
        self._armed = False


def _unavailable() -> Unavailable:
    return Unavailable("The database does not answer.")


def _brief(values: tuple[Any, ...]) -> str:
    """Arguments and results for the trace."""
    told = []
    for value in values:
        if isinstance(value, Commit):
            told.append(
                f"{value.run_id} rev {value.rev} step {value.step_id} token {value.token} "
                f"closes {list(value.closed)} opens {list(value.opened)} grants {list(value.grants)} "
                f"[{' '.join(event['type'] for event in value.events)}] {value.after['status']}"
            )
        elif isinstance(value, dict) and "rev" in value:
            told.append(f"{value['_id']} rev {value['rev']} steps {list(value['steps'])}")
        elif isinstance(value, dict) and "live" in value:
            told.append(f"{value['_id']} {value['status']}")
        elif isinstance(value, (Hint, Grant, Held, Verdict, str, int)) or value is None:
            told.append(str(value))
        else:
            told.append(f"<{type(value).__name__}>")
    return ", ".join(told)
