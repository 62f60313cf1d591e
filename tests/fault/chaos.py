"""A seeded stream of faults. Each is one method of ``Chaos``: do it, hold it for a while, repair it.

Faults of different kinds overlap, two on the same server do not. What is drawn depends on the seed alone; what it
meets depends on timing.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from amqp.exceptions import AMQPError
from celery import Celery
from kombu.exceptions import OperationalError
from pymongo.errors import PyMongoError

from agentq.client import Client
from agentq.errors import AgentqError, Conflict
from agentq.protocol import POOLS
from tests.fault.fleet import SCHEDULERS, Fleet
from tests.fault.plant import Plant
from tests.fault.proxy import Proxy
from tests.fault.recovery import Recovery
from workers.queues import publishing

FREEZE_S = (5.5, 7.5)  # past the lease of 5 s
SHORT_S = (0.5, 3.0)


@dataclass(frozen=True)
class Kind:
    """``weight``: how often, against the others. ``on``: what it occupies; None may happen at any time."""

    name: str
    weight: int
    on: str | None
    act: Callable[[random.Random], bool]


class Chaos:
    """``run(seconds, every_s)`` plays faults; when it returns, everything is repaired. ``done`` counts them by kind."""

    def __init__(self, plant: Plant, fleet: Fleet, recovery: Recovery, client: Client, accepted: list[str]) -> None:
        self._plant, self._fleet, self._recovery, self._client = plant, fleet, recovery, client
        self._accepted = accepted
        self._busy = {name: threading.Lock() for name in ("broker", "mongo", "model", "freeze")}
        self._calm = threading.Event()
        self._lock = threading.Lock()
        self._celery = Celery("chaos", broker=plant.broker.url, set_as_current=False)
        self._celery.conf.broker_transport_options = {"max_retries": 1, "socket_timeout": 3}
        # On RabbitMQ the workers declare the queues, with arguments of their own.
        self._options = {} if plant.broker.url.startswith("redis") else {"declare": [], **publishing(plant.broker.url)}
        self.done: Counter[str] = Counter()
        self.cancelled: set[str] = set()
        self.mongo_faults: list[tuple[float, float]] = []
        self.errors: list[str] = []
        self.kinds = self._kinds()

    def _kinds(self) -> list[Kind]:
        mongo: list[Kind] = (
            self._replica_kinds()
            if self._plant.replicas is not None
            else [
                Kind("MongoDB killed, back with its data", 4, "mongo", self.kill_mongod),
                *self._proxy_kinds("MongoDB", 2, "mongo", lambda: self._plant.mongo_proxy),
            ]
        )
        return [
            Kind("worker killed", 24, None, self.kill_worker),
            Kind("worker frozen past its lease", 7, "freeze", self.freeze_worker),
            Kind("worker told to stop (SIGTERM)", 8, None, self.stop_worker),
            Kind("scheduler killed", 6, None, self.kill_scheduler),
            Kind("broker killed, back with its data", 4, "broker", self.restart_broker),
            Kind("broker killed, back empty", 4, "broker", self.lose_broker),
            Kind("broker emptied while it runs", 4, "broker", self.empty_broker),
            *self._proxy_kinds("broker", 2, "broker", lambda: self._plant.broker_proxy),
            *mongo,
            *self._proxy_kinds("model server", 2, "model", lambda: self._plant.model_proxy),
            Kind("every open step hinted three times more", 6, None, self.repeat_hints),
            Kind("run cancelled", 8, None, self.cancel_run),
        ]

    def _replica_kinds(self) -> list[Kind]:
        return [
            Kind("MongoDB primary killed", 8, "mongo", self.kill_primary),
            Kind("MongoDB primary frozen", 3, "mongo", self.freeze_primary),
        ]

    def _proxy_kinds(self, server: str, weight: int, on: str, proxy: Callable[[], Proxy]) -> list[Kind]:
        def held(fault: Callable[[Proxy, random.Random], object]) -> Callable[[random.Random], bool]:
            return lambda rng: self._through(proxy(), on, fault, rng)

        faults: dict[str, Callable[[Proxy, random.Random], object]] = {
            "connections reset": lambda one, _: one.reset(),
            "connections half-open": lambda one, _: one.half_open(),
            "silent (black hole)": lambda one, _: one.black_hole(),
            "connections cut in mid-answer": lambda one, rng: one.cut_after(rng.randint(50, 5_000)),
            "slow (latency)": lambda one, rng: one.latency(rng.uniform(0.02, 0.2)),
            "refuses connections": lambda one, _: one.refuse(),
        }
        return [Kind(f"{server}: {name}", weight, on, held(fault)) for name, fault in faults.items()]

    # -- the stream -------------------------------------------------------------------------------------------------

    def run(self, rng: random.Random, seconds: float, every_s: float) -> None:
        """Faults for so many seconds, one every ``every_s`` on average."""
        deadline = time.monotonic() + seconds
        weights = [kind.weight for kind in self.kinds]
        acting: list[threading.Thread] = []
        while time.monotonic() < deadline:
            self._calm.wait(rng.expovariate(1 / every_s))
            kind, own = rng.choices(self.kinds, weights)[0], random.Random(rng.random())
            lock = self._busy[kind.on] if kind.on else None
            if lock is None or lock.acquire(blocking=False):
                thread = threading.Thread(target=self._act, args=(kind, lock, own), name=kind.name, daemon=True)
                thread.start()
                acting.append(thread)
        for thread in acting:
            thread.join(120)
        self._celery.close()

    def _act(self, kind: Kind, lock: threading.Lock | None, rng: random.Random) -> None:
        began = time.time()
        try:
            if kind.act(rng):
                with self._lock:
                    self.done[kind.name] += 1
        except Exception as error:  # noqa: BLE001 - a fault that fails is the campaign's own fault, and is shown
            self.errors.append(f"{kind.name}: {type(error).__name__}: {error}")
        finally:
            if kind.on == "mongo":
                self.mongo_faults.append((began, time.time()))
            if lock is not None:
                lock.release()

    def _hold(self, rng: random.Random, span: tuple[float, float]) -> None:
        self._calm.wait(rng.uniform(*span))

    # -- processes --------------------------------------------------------------------------------------------------

    def kill_worker(self, rng: random.Random) -> bool:
        return self._fleet.kill(rng) is not None

    def freeze_worker(self, rng: random.Random) -> bool:
        member = self._fleet.freeze(rng)
        if member is None:
            return False
        self._recovery.happened(member.process.pid)
        self._hold(rng, FREEZE_S)
        self._fleet.thaw(member)
        return True

    def stop_worker(self, rng: random.Random) -> bool:
        return self._fleet.ask_to_stop(rng) is not None

    def kill_scheduler(self, rng: random.Random) -> bool:
        return self._fleet.kill(rng, SCHEDULERS) is not None

    # -- servers ----------------------------------------------------------------------------------------------------

    def restart_broker(self, rng: random.Random) -> bool:
        self._plant.restart_broker()
        return True

    def lose_broker(self, rng: random.Random) -> bool:
        self._plant.lose_broker()
        return True

    def empty_broker(self, rng: random.Random) -> bool:
        self._plant.empty_broker()
        return True

    def kill_mongod(self, rng: random.Random) -> bool:
        self._plant.restart_mongod(rng.uniform(0.0, 2.0))
        return True

    def kill_primary(self, rng: random.Random) -> bool:
        replicas = self._replicas()
        member = replicas.primary()
        replicas.kill(member)
        self._hold(rng, (1.0, 3.0))
        replicas.restart(member)
        self._wait(replicas.healthy)
        return True

    def freeze_primary(self, rng: random.Random) -> bool:
        replicas = self._replicas()
        member = replicas.primary()
        replicas.freeze(member)
        self._hold(rng, (3.0, 6.0))
        replicas.thaw(member)
        self._wait(replicas.healthy)
        return True

    def _replicas(self) -> Any:
        assert self._plant.replicas is not None
        return self._plant.replicas

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError("the replica set did not become healthy again")
            self._calm.wait(0.2)

    def _through(
        self, proxy: Proxy, on: str, fault: Callable[[Proxy, random.Random], object], rng: random.Random
    ) -> bool:
        fault(proxy, rng)
        self._hold(rng, SHORT_S)
        proxy.heal()
        return True

    # -- callers ----------------------------------------------------------------------------------------------------

    def repeat_hints(self, rng: random.Random) -> bool:
        """Every step that is open now, whoever works on it, is hinted three times more, in any order."""
        try:
            live = list(self._plant.mongo["agentq"]["runs"].find({"next_due": {"$type": "date"}}, {"steps": 1}))
        except PyMongoError:
            return False  # MongoDB is away
        hints = [
            (step["pool"], [run["_id"], step_id, step["attempt"]])
            for run in live
            for step_id, step in run["steps"].items()
        ] * 3
        rng.shuffle(hints)
        return bool(hints) and all(self._send(pool, [hint for name, hint in hints if name == pool]) for pool in POOLS)

    def _send(self, pool: str, hints: list[list[Any]]) -> bool:
        for start in range(0, len(hints), 20):
            message = {"hints": hints[start : start + 20]}
            try:
                self._celery.send_task(f"agentq.{pool}", kwargs=message, queue=pool, retry=False, **self._options)
            except (OperationalError, AMQPError, OSError):
                return False  # the broker is away
        return True

    def cancel_run(self, rng: random.Random) -> bool:
        recent = self._accepted[-20:]
        if not recent:
            return False
        run_id = rng.choice(recent)
        try:
            self.cancelled.add(run_id)
            self._client.run(run_id).cancel("chaos")
        except Conflict:  # it was quicker
            self.cancelled.discard(run_id)
            return False
        except AgentqError:
            return False  # MongoDB is away: nobody knows whether it was asked for
        return True
