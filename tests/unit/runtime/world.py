"""A whole agentq in memory for unit tests: the real engine, runtime and scheduler over the in-memory store, a list as
broker, the scripted model and real tools."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from agentq.event import chain, genesis
from agentq.protocol import POOLS, Hint, Pool, Request
from agentq.run import new_run
from agentq.runtime.leases import LeaseKeeper
from agentq.runtime.runtime import Limits, Runtime
from agentq.runtime.scheduler import Scheduler
from agentq.store.memory import MemoryStore
from agentq.testing import ScriptedLlm
from agentq.tools import ToolContext, ToolError, tool
from agentq.tools.toolbox import Toolbox
from schemas.catalog import Bundle
from schemas.run import RUN, RunDoc

EFFECTS: list[str] = []


@tool(effect="read")
def look_up(order: str) -> dict[str, str]:
    """Look up an order."""
    if order == "missing":
        raise ToolError("There is no such order.")
    return {"order": order, "status": "shipped", "source": "KB-7"}


class Shop:
    """Tools with effects that a test can count."""

    def __init__(self) -> None:
        self.refunds: list[str] = []
        self.posts: list[str] = []

    def toolbox(self) -> Toolbox:
        @tool(effect="write", keyed=True)
        def refund(order: str, context: ToolContext) -> str:
            """Refund an order, once a key."""
            if context.idempotency_key not in self.refunds:
                self.refunds.append(context.idempotency_key)
            return f"refunded {order}"

        @tool(effect="irreversible")
        def post(text: str) -> str:
            """Post a letter."""
            self.posts.append(text)
            return "posted"

        from agentq.tools.declare import declared_tool

        found = [declared_tool(function) for function in (look_up, refund, post)]
        return Toolbox([one for one in found if one is not None])


def make_bundle(toolbox: Toolbox, *, native: bool = True, structured: bool = True, **limits: Any) -> Bundle:
    """route -> agent -> critic, with two specialists."""
    agent = {"description": "money", "instructions": "Help.", "model": "m", "tools": ["look_up", "refund", "post"]}
    return Bundle.model_validate(
        {
            "workflow": {
                "name": "default",
                "start": "route",
                "nodes": {
                    "route": {"type": "route", "model": "m", "agents": ["billing", "orders"], "default": "orders",
                              "next": "agent"},
                    "agent": {"type": "agent", "agent": "$route", "next": "critic"},
                    "critic": {"type": "critic", "model": "m", "max_revisions": 2, "revise": "agent", "next": "end"},
                },
                "limits": limits.pop("run", {}),
            },
            "agents": {"billing": {**agent, **limits}, "orders": {**agent, "description": "parcels", **limits}},
            "models": {
                "m": {"provider": "openai", "model": "m-1", "native_tools": native, "structured_output": structured,
                      "input_usd_per_mtok": 1, "output_usd_per_mtok": 2}
            },
            "tools": {name: spec.model_dump() for name, spec in toolbox.specs.items()},
        }
    )  # fmt: skip


class World:
    """``run_all`` delivers hints and ticks the scheduler until nothing is left to do."""

    def __init__(self, llm: ScriptedLlm, *, inline: bool = True, bundle: Bundle | None = None, **limits: Any) -> None:
        self.time = datetime(2026, 1, 1, tzinfo=UTC)
        self.store = MemoryStore(lambda: self.time)
        self.llm = llm
        self.shop = Shop()
        self.toolbox = self.shop.toolbox()
        self.bundle = bundle or make_bundle(self.toolbox, **limits)
        self.store.bundles[self.bundle.hash] = self.bundle
        self.hints: list[tuple[Pool, Hint]] = []
        self.inline = inline
        self.broker_lost = False
        self.replies: list[str] = []
        self.keepers: list[LeaseKeeper] = []

    async def publish(self, hints: Sequence[tuple[Pool, Hint]]) -> None:
        self.hints += hints

    async def reply(self, run: RunDoc) -> None:
        self.replies.append(run["_id"])

    def worker(self, pools: Sequence[Pool] = POOLS, **options: Any) -> Runtime:
        keeper = LeaseKeeper(30_000, monotonic=lambda: self.time.timestamp())  # noqa: PLW0108 - the time of then, not of now
        self.keepers.append(keeper)
        return Runtime(
            self.store, self.llm, self.toolbox, self.publish, pools=pools, worker="w", keeper=keeper, reply=self.reply,
            limits=Limits(inline=self.inline), **options,
        )  # fmt: skip

    def scheduler(self) -> Scheduler:
        async def lost() -> bool:
            was, self.broker_lost = self.broker_lost, False
            return was

        return Scheduler(self.store, self.publish, lost, name="s", reply=self.reply, max_attempts=5)

    def submit(self, text: str = "Where is order 17?", run_id: str = "r1", **fields: Any) -> str:
        turn = fields.pop("turn", None)
        doc = new_run(Request(input=text, **fields), self.bundle.registered(), run_id=run_id, now=self.time, turn=turn)
        self.store.insert(dict(doc))
        self.hints.append(("router", Hint(run_id, "s1", 1)))
        return run_id

    async def deliver(self, worker: Runtime | None = None) -> None:
        """Deliver hints until there are none."""
        worker = worker or self.worker()
        while self.hints:
            pool, hint = self.hints.pop(0)
            await worker.handle(pool, [hint])

    async def run_all(self, hours: float = 1) -> None:
        """Deliver, and let time pass for the scheduler, until every run has ended or ``hours`` have gone by."""
        scheduler = self.scheduler()
        end = self.time + timedelta(hours=hours)
        await self.deliver()
        while self.time < end and any(run["next_due"] is not None for run in self.store.runs.values()):
            self.time += timedelta(seconds=1)
            await scheduler.tick()
            await self.deliver()

    def run(self, run_id: str = "r1") -> RunDoc:
        """The stored run, checked against its schema and with an intact audit chain."""
        run = self.store.runs[run_id]
        RUN.validate_python(run)
        return run

    def events(self, run_id: str = "r1") -> list[str]:
        """Types of the run's audit events, after checking that they form one chain that ends in the run's head."""
        stored = {event["seq"]: event for event in self.run(run_id)["events"]}
        stored |= {event["seq"]: event for event in self.store.audit.values() if event["run"] == run_id}
        found = [stored[seq] for seq in sorted(stored)]
        news = [{key: event[key] for key in ("type", "at_ms", "step", "data")} for event in found]
        again, head = chain(run_id, genesis(run_id), news)  # type: ignore[arg-type]
        assert again == found
        assert head == self.run(run_id)["audit"]
        return [event["type"] for event in found]
