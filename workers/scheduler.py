"""The scheduler process: ``python -m workers.scheduler``. Several may run."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvloop

from agentq.client import Client
from agentq.errors import AgentqError, ConfigError
from agentq.llm.jobs import OpenAiJobs
from agentq.runtime.admission import Admission
from agentq.runtime.bookkeeper import Bookkeeper
from agentq.runtime.joiner import Joiner
from agentq.runtime.scheduler import Scheduler
from agentq.store.mongo import MongoStore
from config.settings import Settings, load_settings
from workers.epoch import BrokerEpoch
from workers.failpoints import crash_point
from workers.hints import HintPublisher
from workers.host import worker_name
from workers.liveness import beat
from workers.notifications import make_notifier
from workers.replies import Replies
from workers.waiting import open_store

log = logging.getLogger("workers.scheduler")


async def run(settings: Settings) -> None:
    """Schedule until SIGTERM or SIGINT; before that, wait for MongoDB."""
    from workers.app import make_app  # noqa: PLC0415 - the application reads its settings when it is imported

    if settings.mongo_url is None:
        raise ConfigError("No MongoDB URL is set.", hint="Set AGENTQ_MONGO_URL, or start the stack: agentq up.")
    app = make_app(settings)
    store = MongoStore(settings.mongo_url.get_secret_value(), settings.mongo_database)
    stop = asyncio.Event()
    for sign in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(sign, stop.set)
    if not await open_store(store, stop.is_set):
        await store.close()
        return
    threads = ThreadPoolExecutor(2, "scheduler")
    publisher = HintPublisher(app, settings.hint_batch, store.now)
    replies = Replies(app, ThreadPoolExecutor(2, "replies"))  # a store of answers that hangs must hold up nothing else
    scheduler = Scheduler(
        store, publisher, BrokerEpoch(app, threads), name=worker_name(), reply=replies,
        max_attempts=settings.max_attempts, crash=crash_point(settings.failpoint),
    )  # fmt: skip
    bookkeeper = Bookkeeper(store, store.batches, reply=replies)
    notifier = make_notifier(settings, app, store)
    client = Client(settings.mongo_url.get_secret_value(), app.conf.broker_url, settings.mongo_database)

    async def hand_in(schedule: dict[str, Any]) -> None:
        await asyncio.get_running_loop().run_in_executor(threads, client.hand_in, schedule)

    provider = OpenAiJobs(settings.providers())
    joiner = Joiner(
        store, store.jobs, provider, publisher, name=worker_name(), reply=replies, max_attempts=settings.max_attempts,
        crash=crash_point(settings.failpoint),
    )  # fmt: skip
    admission = Admission(
        store.backlog, store.queues, publisher, name=worker_name(), window=settings.steps_in_flight, hand_in=hand_in,
        room=store.batches.room, crash=crash_point(settings.failpoint),
    )  # fmt: skip
    ticking = asyncio.create_task(scheduler.run(settings.scheduler_interval_s))
    counting = asyncio.create_task(bookkeeper.run(settings.scheduler_interval_s))
    notifying = asyncio.create_task(notifier.run(settings.scheduler_interval_s))
    joining = asyncio.create_task(joiner.run(settings.scheduler_interval_s))
    admitting = asyncio.create_task(admission.run())
    beating = asyncio.create_task(_beat())
    await asyncio.wait([ticking, asyncio.create_task(stop.wait())], return_when=asyncio.FIRST_COMPLETED)
    for task in (ticking, counting, notifying, joining, admitting, beating):
        task.cancel()
    await provider.close()
    client.close()
    await store.close()
    publisher.close()
    if not stop.is_set():
        ticking.result()


async def _beat() -> None:
    while True:
        beat()
        await asyncio.sleep(5)


def main() -> int:
    """0 after a clean stop, 2 where settings are wrong, 1 where a server refuses what it is asked."""
    try:
        settings = load_settings()
        logging.basicConfig(level=settings.log_level, format="[%(asctime)s: %(levelname)s] %(message)s")
        uvloop.run(run(settings))
    except AgentqError as error:
        print(f"agentq: {error}", file=sys.stderr)  # noqa: T201 - the terminal is the interface here
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
