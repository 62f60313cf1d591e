"""A process of ours that is started while MongoDB is away waits for it, as it waits for its broker."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from agentq.errors import Unavailable
from agentq.store.mongo import MongoStore
from schemas.catalog import Bundle

log = logging.getLogger(__name__)
ATTEMPT_S = 3.0
RETRY_S = 0.5
REMIND_S = 60.0  # how often it is said again


async def open_store(store: MongoStore, stopping: Callable[[], bool], bundles: Sequence[Bundle] = ()) -> bool:
    """Open the store and register ``bundles`` in it, however long MongoDB is away; False if we were to stop meanwhile.

    Raises at once what is no outage: ``ConfigError`` where the settings are wrong.
    """
    told: float | None = None
    while not stopping():
        try:
            await store.open(within_s=ATTEMPT_S)
            await store.register(bundles)
        except Unavailable as error:
            if told is None or time.monotonic() - told >= REMIND_S:
                told = time.monotonic()
                log.warning("waiting for MongoDB: %s (%s)", error, error.details.get("cause", error.code))
            await asyncio.sleep(RETRY_S)
        else:
            if told is not None:
                log.warning("MongoDB answers: the start goes on")
            return True
    return False
