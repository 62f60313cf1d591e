"""What a scheduler process does for as long as it lives."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from agentq.errors import AgentqError
from agentq.place import place

log = logging.getLogger(__name__)


async def ever(who: str, act: Callable[[], Awaitable[float]], failed_s: float) -> None:
    """Act again and again until cancelled, after the pause in seconds that ``act`` gives (``failed_s`` where it fails).

    An outage is reported and waited out. So is any other error: whoever stopped here would do so in silence.
    """
    while True:
        pause = failed_s
        try:
            pause = await act()
        except AgentqError as error:
            log.warning("%s waits: %s", who, error)
        except Exception as error:  # noqa: BLE001 - reported by class and place; its words may quote a person
            log.error("%s waits: %s", who, place(error))
        await asyncio.sleep(pause)
