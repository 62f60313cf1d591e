"""One engine room a process: an event loop in a thread of its own, on which Celery's tasks have their hints worked off.

Celery owns the process, its signals and its messages; the loop owns everything asynchronous. The leases are renewed
on a second loop in a second thread, which no busy engine can starve.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import logging
import os
import socket
import threading
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import uvloop
from celery import Celery

from agentq.client import Client
from agentq.errors import AgentqError, ConfigError, Unavailable
from agentq.llm.http import HttpLlm
from agentq.protocol import POOLS, Pool
from agentq.runtime.leases import LeaseKeeper
from agentq.runtime.runtime import Limits, Runtime
from agentq.store.mongo import MongoStore
from config.catalog import Catalog, catalog_directories, load_catalog
from config.settings import Settings
from workers.failpoints import crash_point
from workers.hints import HintPublisher, parse_hints, parse_time
from workers.replies import Replies
from workers.waiting import open_store

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class _Engine:
    """What lives in one process once it works."""

    pid: int
    loop: asyncio.AbstractEventLoop
    runtime: Runtime
    store: MongoStore
    llm: HttpLlm
    catalog: Catalog
    publisher: HintPublisher
    client: Client
    tasks: list[asyncio.Task[None]]
    lease_task: asyncio.Task[None]
    lease_loop: asyncio.AbstractEventLoop
    lease_store: MongoStore


class EngineHost:
    """Starts the engine at first use in each process, so that a fork gets its own."""

    def __init__(self, app: Celery, settings: Settings) -> None:
        self.app = app
        self.settings = settings
        self.pools: tuple[Pool, ...] = POOLS
        self._lock = threading.Lock()
        self._engine: _Engine | None = None
        self.stopping = threading.Event()  # the worker is to stop: nothing new is begun or waited for

    def serve(self, queues: list[str]) -> None:
        """The queues this worker consumes: the pools whose steps it may go on with in place."""
        self.pools = tuple(pool for pool in POOLS if pool in queues)

    def work(self, pool: Pool, hints: Any, at: Any = None) -> None:
        """Work off the hints of one message; returns when it is done. A malformed message is counted and dropped."""
        engine = self.engine()
        try:
            parsed = parse_hints(hints)
        except ValueError as error:
            self.count("malformed_messages")
            log.error("a message for %s was dropped: %s", pool, error)
            return
        handling = engine.runtime.handle(pool, parsed, parse_time(at))
        asyncio.run_coroutine_threadsafe(handling, engine.loop).result()

    def count(self, what: str) -> None:
        """Count something in this worker's sign of life."""
        engine = self.engine()
        engine.loop.call_soon_threadsafe(engine.runtime.count, what)

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the engine's loop, from a Celery thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.engine().loop).result()

    @property
    def client(self) -> Client:
        return self.engine().client

    @property
    def store(self) -> MongoStore:
        return self.engine().store

    def engine(self) -> _Engine:
        """This process's engine, started if need be, which waits for MongoDB. Raises ``ConfigError`` where settings or
        files are wrong, ``Unavailable`` where the worker is to stop before MongoDB has answered."""
        engine = self._engine
        if engine is not None and engine.pid == os.getpid():
            return engine
        with self._lock:
            if self._engine is None or self._engine.pid != os.getpid():
                self._engine = self._start()
            return self._engine

    def _start(self) -> _Engine:
        settings = self.settings
        if settings.mongo_url is None:
            raise ConfigError(
                "No MongoDB URL is set.", hint="Set AGENTQ_MONGO_URL, or start the embedded stack: agentq up."
            )
        loop, lease_loop = _loop_thread("engine"), _loop_thread("leases")
        catalog = load_catalog(catalog_directories(settings), tool_threads=settings.tool_threads)
        limits = Limits(
            lease_ms=int(settings.lease_s * 1000),
            max_attempts=settings.max_attempts,
            steps_in_flight=settings.steps_in_flight,
            inline=settings.inline_steps,
        )
        keeper = LeaseKeeper(limits.lease_ms)
        mongo_url, broker_url = settings.mongo_url.get_secret_value(), self.app.conf.broker_url
        replies = Replies(self.app, ThreadPoolExecutor(2, "replies"))

        async def build() -> tuple[MongoStore, HttpLlm, HintPublisher, Runtime, list[asyncio.Task[None]]]:
            store = MongoStore(mongo_url, settings.mongo_database)
            if not await open_store(store, self.stopping.is_set, list(catalog.bundles.values())):
                raise Unavailable("The worker stops before MongoDB has answered.", code="stopped")
            publisher = HintPublisher(self.app, settings.hint_batch, store.now)
            llm = HttpLlm(settings.providers())
            runtime = Runtime(
                store, llm, catalog.toolbox, publisher, pools=self.pools, worker=worker_name(), keeper=keeper,
                limits=limits, reply=replies, crash=crash_point(settings.failpoint),
            )  # fmt: skip
            tasks = [asyncio.create_task(_follow_clock(store)), asyncio.create_task(_report(store, runtime))]
            return store, llm, publisher, runtime, tasks

        async def keep(runtime: Runtime) -> tuple[MongoStore, asyncio.Task[None]]:
            def cut(run_id: str) -> None:
                loop.call_soon_threadsafe(runtime.cut, run_id)

            store = MongoStore(mongo_url, settings.mongo_database)
            return store, asyncio.create_task(keeper.run(store, cut))

        store, llm, publisher, runtime, tasks = asyncio.run_coroutine_threadsafe(build(), loop).result()
        lease_store, lease_task = asyncio.run_coroutine_threadsafe(keep(runtime), lease_loop).result()
        client = Client(mongo_url, broker_url, settings.mongo_database)
        _calm_the_collector()
        return _Engine(
            os.getpid(), loop, runtime, store, llm, catalog, publisher, client, tasks, lease_task, lease_loop,
            lease_store,
        )  # fmt: skip

    def drain(self) -> None:
        """The worker is to stop: hand back what has not begun, finish the steps under way, hand on what follows. Model
        calls that take longer than ``drain_s`` are cut and repeated elsewhere."""
        self.stopping.set()
        engine = self._engine
        if engine is not None and engine.pid == os.getpid():
            engine.loop.call_soon_threadsafe(engine.runtime.drain)
            engine.loop.call_soon_threadsafe(lambda: engine.loop.call_later(self.settings.drain_s, engine.runtime.cut))

    def stop(self) -> None:
        """After the last task: leases, model connections, tools, publisher, database, in this order."""
        engine = self._engine
        if engine is None or engine.pid != os.getpid():
            return
        self._engine = None

        async def close() -> None:
            for task in engine.tasks:
                task.cancel()
            await engine.llm.close()
            engine.catalog.toolbox.close()
            await engine.store.close()

        async def close_leases() -> None:
            engine.lease_task.cancel()
            await engine.lease_store.close()

        asyncio.run_coroutine_threadsafe(close_leases(), engine.lease_loop).result(5)
        asyncio.run_coroutine_threadsafe(close(), engine.loop).result(5)
        engine.publisher.close()
        engine.client.close()
        for loop in (engine.lease_loop, engine.loop):
            loop.call_soon_threadsafe(loop.stop)


async def _follow_clock(store: MongoStore) -> None:
    while True:
        await asyncio.sleep(60)
        with contextlib.suppress(AgentqError):
            await store.sync_clock()


async def _report(store: MongoStore, runtime: Runtime) -> None:
    """A sign of life every five seconds, and every half while there is something to tell."""
    told: dict[str, Any] = {}
    for beat in itertools.count():
        if (news := runtime.report()) != told or beat % 10 == 0:
            with contextlib.suppress(AgentqError):
                await store.beat(f"worker:{worker_name()}", news)
                told = news
        await asyncio.sleep(0.5)


def _calm_the_collector() -> None:
    """What lives now lives as long as the process, and runs are trees without cycles: the default thresholds make the
    collector walk thousands of documents in flight over and over (a third of a loaded worker's time)."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 1_000)


def worker_name() -> str:
    """Who holds a lease, for people: host and process."""
    return f"{socket.gethostname()}:{os.getpid()}"


def _loop_thread(name: str) -> asyncio.AbstractEventLoop:
    loop = uvloop.new_event_loop()
    threading.Thread(target=loop.run_forever, name=name, daemon=True).start()
    return loop
