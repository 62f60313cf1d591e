"""The world of one schedule: the real runtime and scheduler in simulated processes, and what befalls them."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from agentq.errors import AgentqError
from agentq.protocol import POOLS, TERMINAL, Hint, Pool
from agentq.runtime.joiner import Joiner
from agentq.runtime.runtime import Limits, Runtime
from agentq.runtime.scheduler import ROUNDS, Scheduler
from agentq.store.memory_backlog import MemoryBacklog
from schemas.llm import LlmCall, LlmReply
from tests.simulation.broker import Broker
from tests.simulation.faults import KINDS, Faults, Mute
from tests.simulation.invariants import Books
from tests.simulation.job_books import joiner_of
from tests.simulation.job_port import JobsPort, JobsServer
from tests.simulation.loop import Clock, Process
from tests.simulation.port import START, Keeper, Port, Server, now_or_never
from tests.simulation.provider import Provider, ProviderPort
from tests.simulation.workload import Script, offer, scripts

MAX_ATTEMPTS = 5
CALM_LIMIT_MS = 3_600_000  # after the faults, everything must have ended by then


@dataclass(slots=True)
class Worker:
    process: Process
    runtime: Runtime
    pools: tuple[Pool, ...]

    def deliver(self, pool: Pool, message: list[Hint]) -> None:
        self.process.start(self.runtime.handle(pool, message))


class World:
    """One schedule. ``live()`` plays it; ``books.problems`` is what was wrong in it."""

    def __init__(self, seed: int, mute: Mute | None = None, *, trace: bool = False) -> None:
        self.rng = rng = random.Random(seed)
        self.clock = Clock([] if trace else None)
        self.processes: dict[str, Process] = {}
        self.books = Books(self.clock, self.processes)
        self._moment = (-1, START)
        self.server = Server(self._server_time)
        self.server.books = self.books
        self.server.jobs = JobsServer(self.server, self.books)
        self.books.jobs.docs, self.books.jobs.runs = self.server.jobs.docs, self.server.runs
        self.faults = Faults.of(rng, mute or Mute())
        self.broker = Broker(self)
        self.outage_until = 0
        self.workers: list[Worker] = []
        self.offer = offer(rng)
        self.scripts: dict[str, Script] = {script.run_id: script for script in scripts(rng, self.offer)}
        self.joins = any(script.windowed for script in self.scripts.values())
        self.provider = Provider(self) if self.joins else None
        self.batch: int | None = rng.choice((1, 1, 50, 50, None))
        self.events_kept = rng.choice((2, 5, 50))  # audit events in a run before they are copied out
        self._inline = rng.random() < 0.6
        self._room = rng.choice((1, 2, 256, 256))
        self._lease_ms = rng.choice((10_000, 30_000, 30_000))
        self._look_at_once = rng.choice((1, 2, 500, 500))
        self._schedulers = rng.choice((1, 1, 2, 3))
        self._pools = self._shares(rng.choice((1, 1, 2, 3, 4)))
        self._fault_ms = rng.choice((8_000, 30_000, 90_000, 200_000))
        self.points: set[str] = set()  # crash points at which a process died
        self.group = 50 if self.provider is None else rng.choice((1, 2, 50))  # answers taken in together
        self.job_bytes = 1_000_000 if self.provider is None else rng.choice((2_500, 1_000_000, 1_000_000))
        if self.provider is not None:
            self._fault_ms = max(self._fault_ms, 30_000)
            self.faults.spared = rng.choice(("w", "-"))  # half of the time all strike schedulers and joiners
        self.unheard: dict[tuple[str, str], str] = {}  # steps whose next tool call meets the fault of the last one
        self._cost = 0
        self._quiet_at = 0  # nothing that was delayed comes later
        self._names = 0

    def _shares(self, count: int) -> list[tuple[Pool, ...]]:
        """The pools of each worker: all of them in each, or each pool in one or some."""
        if count == 4:
            return [(pool,) for pool in POOLS]
        if count == 3:
            return [POOLS[:2], POOLS[2:], ("tools", "specialist")]
        return [POOLS] * count

    def _server_time(self) -> datetime:
        if self._moment[0] != self.clock.ms:
            self._moment = (self.clock.ms, START + timedelta(milliseconds=self.clock.ms))
        return self._moment[1]

    def quick(self) -> int:
        drawn = self.rng.random()
        return 1 if drawn < 0.5 else 1 + int(drawn * 10) if drawn < 0.9 else 1 + int((drawn - 0.9) * 4_000)

    def slow(self, most_ms: int) -> int:
        drawn = 1 + int(self.rng.random() ** 2 * most_ms)
        self._quiet_at = max(self._quiet_at, self.clock.ms + drawn)
        return drawn

    def note(self, process: Process | None, line: str) -> None:
        if self.clock.trace is not None:
            self.clock.note(f"{process.name if process else 'world':8} {line}")

    # -- playing ----------------------------------------------------------------------------------------------------

    def live(self) -> None:
        """Play the schedule to its end, and check it."""
        rng, after = self.rng, self.clock.after
        for script in self.scripts.values():
            made = script.bundle
            self.server.bundles[made[1]["hash"]] = made[0]
            after(script.born_ms, None, self._submit, script)
        for pools in self._pools:
            self._start_worker(pools)
        for _ in range(self._schedulers):
            self._start_scheduler()
        if self.provider is not None and rng.random() < 0.3:
            after(rng.randrange(self._fault_ms), None, self._cancel, rng.choice(list(self.scripts)))
        for kind in self.faults.world_events():
            after(rng.randrange(self._fault_ms), None, self._strike, kind)
        after(max(self._fault_ms, *(script.born_ms + 1 for script in self.scripts.values())), None, self._calm)
        self.clock.run(self._fault_ms + CALM_LIMIT_MS)
        if self.provider is not None:
            self.provider.close()
        patient = {script.run_id for script in self.scripts.values() if script.deadline_s is None}
        self.books.close(self.server.runs, self.server.audit, patient, self.server.bundles)

    def _submit(self, script: Script) -> None:
        """A client stores a run and publishes its first hint."""
        doc = script.birth(self._server_time())
        self.server.insert(dict(doc))
        if "backlog" in doc:
            now_or_never(MemoryBacklog(self.server).admit([script.run_id]))
        self.books.born(self.server.runs[script.run_id])
        self.note(None, f"accepted {script}")
        hint = ("router" if script.graph != "act_first" else "tools", Hint(script.run_id, "s1", 1))
        fault = self.faults.strike("publish")
        if fault not in ("hint_lost", "kill_before"):
            self.broker.take([hint], fault)  # type: ignore[list-item]

    def _process(self, role: str) -> Process:
        self._names += 1
        process = Process(self.clock, f"{role}{self._names}")
        self.processes[process.name] = process
        return process

    def _start_worker(self, pools: tuple[Pool, ...]) -> None:
        process = self._process("w")
        port: Any = Port(self, process)
        keeper = Keeper(self._lease_ms, process, port)
        limits = Limits(self._lease_ms, MAX_ATTEMPTS, self._room, self._inline)
        runtime = Runtime(
            port, port, port, port.publish, pools=pools, worker=process.name, keeper=keeper, limits=limits,
            reply=port.reply, crash=port.crash_point,
        )  # fmt: skip
        keeper.on_stopped = runtime.cut
        runtime._prefix = f"{process.name}t"  # random in production; here the seed decides all
        self.workers.append(Worker(process, runtime, pools))

    def _start_scheduler(self) -> None:
        process = self._process("s")
        port: Any = Port(self, process)
        scheduler = Scheduler(
            port, port.publish, port.broker_lost, name=process.name, reply=port.reply, max_attempts=MAX_ATTEMPTS,
            batch=self._look_at_once, crash=port.crash_point,
        )  # fmt: skip
        self.clock.after(self.rng.randrange(5_000), process, process.start, self._schedule(port, scheduler))
        if self.provider is not None:
            self._start_joiner(process, port, self.provider)

    def _start_joiner(self, process: Process, port: Any, provider: Provider) -> None:
        jobs: Any = JobsPort(port)
        way: Any = ProviderPort(self, provider, process)
        joiner = Joiner(
            port, jobs, way, port.publish, name=process.name, reply=port.reply, max_attempts=MAX_ATTEMPTS,
            crash=port.crash_point,
        )  # fmt: skip
        joiner._name = joiner_of(process.name)  # random in production
        self.clock.after(self.rng.randrange(5_000), process, process.start, self._join(process, joiner))

    async def _join(self, process: Process, joiner: Joiner) -> None:
        """``Joiner.run``, but the looks at which there is nothing to do are skipped where that is certain."""
        while True:
            try:
                await joiner.tick()
            except AgentqError as error:
                self.note(process, f"joins later: {error}")
            await asyncio.sleep(self._until_job_s(process) + self.rng.choice((1, 1, 5)))

    def _until_job_s(self, process: Process) -> float:
        """Until a job is due or is to be made, as things are; half a minute at most, they may change."""
        assert self.offer is not None
        now = self._server_time() + timedelta(milliseconds=process.skew_ms)
        dues = [job["due"] for job in self.server.jobs.docs.values() if job["live"]]
        gathering = timedelta(seconds=self.offer.gather_s)
        waiting = [run["joins"] for run in self.server.runs.values() if "joins" in run]
        dues += [joins["since"] + gathering for joins in waiting if "job" not in joins]
        most_s = 5.0 if self.faults.on else 30.0
        return max(0.0, min([most_s, *((due - now).total_seconds() for due in dues)]))

    async def _schedule(self, port: Port, scheduler: Scheduler) -> None:
        """``Scheduler.run``, but the looks at which nothing is due are skipped where that is certain."""
        calm_since: datetime | None = None
        while True:
            port.met.clear()
            looked = 0
            try:
                looked = await scheduler.tick()
            except AgentqError as error:
                self.note(port.process, f"waits: {error}")
            if not self.faults.on:
                calm_since = calm_since or self._server_time()
                self.books.overdue(self.server.runs, calm_since, self._server_time())
                self._end_if_settled()
            if looked < ROUNDS * self._look_at_once:
                await asyncio.sleep(self._until_due_s(port.process) + self.rng.choice((1, 1, 5)))

    def _until_due_s(self, process: Process) -> float:
        """Until the next run is due by this process's clock, as things are; half a minute at most, they may change."""
        if self.broker.lost:
            return 0.0
        moment = START + timedelta(milliseconds=self.clock.ms + process.skew_ms)
        dues = [(run["next_due"] - moment).total_seconds() for run in self.server.runs.values() if run["next_due"]]
        return max(0.0, min([30.0, *dues]))

    def kill(self, process: Process) -> None:
        """SIGKILL; another takes its place after a while."""
        if not process.alive:
            return
        self.note(process, "dies")
        process.kill()
        delay = self.slow(40_000)
        for worker in self.workers:
            if worker.process is process:
                self.clock.after(delay, None, self._start_worker, worker.pools)
        self.workers = [worker for worker in self.workers if worker.process is not process]
        if process.name.startswith("s"):
            self.clock.after(delay, None, self._start_scheduler)

    def disturb(self, process: Process, fault: str) -> None:
        """Book a fault that endangers the leases of a process, and freeze it if that is the fault."""
        if fault in KINDS["store"]:
            process.disturbed_at = self.clock.ms
        if fault in ("freeze", "suspend"):
            process.freeze(self.slow(150_000), monotonic_runs=fault == "freeze")

    def answer(self, call: LlmCall, run_id: str, process: Process) -> LlmReply:
        """An answered model call: paid for, and heard."""
        cost = self.next_cost()
        self.books.answered(run_id, cost, process)
        return self.scripts[run_id].answer(call.purpose, call.messages, self.server.runs[run_id], cost)

    def next_cost(self) -> int:
        """What a model call costs: unlike any other."""
        self._cost += 1
        return 1_000 + self._cost

    def job_name(self) -> str:
        self._names += 1
        return f"job_{self._names:04}"

    # -- the world's own faults -------------------------------------------------------------------------------------

    def _strike(self, kind: str) -> None:
        if not self.faults.fire_event(kind):
            return
        self.note(None, kind)
        alive = [process for process in self.processes.values() if process.alive]
        if kind == "wipe":
            self.broker.wipe()
        elif kind == "outage":
            self.outage_until = self.clock.ms + self.slow(60_000)
        elif kind == "endpoint_down" and self.provider is not None:
            self.provider.down_until, self.provider.refuses = (
                self.clock.ms + int(self.rng.random() ** 2 * 600_000),
                self.rng.random() < 0.3,
            )
        elif kind == "skew" and alive:
            process = self.rng.choice(alive)
            process.skew_ms = self.rng.choice((-600_000, -20_000, 20_000, 600_000))
            process.disturbed_at = self.clock.ms
            self.books.skewed = True
            self.books.ahead = max(self.books.ahead, timedelta(milliseconds=process.skew_ms))
        elif kind == "cancel":
            self._cancel(self.rng.choice(list(self.scripts)))
        elif kind == "drain":
            worker = self.rng.choice(self.workers) if self.workers else None
            if worker is not None:
                self.clock.after(0, worker.process, worker.runtime.drain)
                self._start_worker(worker.pools)

    def _cancel(self, run_id: str) -> None:
        """As the client's ``cancel`` does."""
        run = self.server.runs.get(run_id)
        if run is not None and run["status"] not in TERMINAL and run["cancel"] is None:
            now = self._server_time()
            run["cancel"], run["next_due"], run["rev"] = {"reason": "why not", "at": now}, now, run["rev"] + 1

    def _calm(self) -> None:
        """No more faults: everything is up, clocks are right. Who was frozen wakes up in its own time."""
        self.note(None, "calm")
        self.faults.on = False
        self.books.calm_at = START + timedelta(milliseconds=max(self.clock.ms, self._quiet_at))
        for process in self.processes.values():
            process.skew_ms = 0

    def _end_if_settled(self) -> None:
        """Nothing is left to do, and no zombie sleeps that could still do harm: a little later, the end."""
        asleep = max((process.frozen_until for process in self.processes.values() if process.alive), default=0)
        if max(asleep, self._quiet_at) > self.clock.ms or len(self.server.runs) < len(self.scripts):
            return
        if any(job["live"] for job in self.server.jobs.docs.values()):
            return
        for run in self.server.runs.values():
            if "joins" in run:
                return
            if run["next_due"] is not None and not (run["status"] == "waiting" and not run["leases"]):
                return
        self.clock.after(8_000, None, self._stop)

    def _stop(self) -> None:
        self.clock.stopped = True
