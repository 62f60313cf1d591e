"""Group commit: calls that become ready while a call is under way share the next one.

Nobody waits for company: a lone item goes out at once. There is no timer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from agentq.errors import Unavailable

T = TypeVar("T")
R = TypeVar("R")


class Group(Generic[T, R]):
    """Turns ``write(items) -> results`` into ``await group(item) -> result``.

    ``write`` gives one result an item, in order; a result that is an exception is raised to that item's caller alone.
    If ``write`` itself raises ``Unavailable``, every item of that call gets it; on any other exception the items are
    written again one by one, so ``write`` must bear repeating. At most ``lanes`` calls are under way.
    """

    def __init__(
        self, write: Callable[[list[T]], Awaitable[Sequence[R | Exception]]], *, limit: int = 256, lanes: int = 1
    ) -> None:
        self._write = write
        self._limit = limit
        self._idle_lanes = lanes
        self._waiting: list[tuple[T, asyncio.Future[R]]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def __call__(self, item: T) -> asyncio.Future[R]:
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._idle_lanes:
            self._idle_lanes -= 1
            task = asyncio.create_task(self._drain())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return future

    async def _drain(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[: self._limit], self._waiting[self._limit :]
                await self._write_batch(batch)
        finally:
            self._idle_lanes += 1

    async def _write_batch(self, batch: list[tuple[T, asyncio.Future[R]]]) -> None:
        results: Sequence[R | Exception]
        try:
            results = await self._write([item for item, _ in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"the write answered for {len(results)} of {len(batch)} items")
        except Exception as error:  # noqa: BLE001 - not swallowed: every waiting caller gets it
            if len(batch) > 1 and not isinstance(error, Unavailable):
                for one in batch:  # one bad item must not spoil the others
                    await self._write_batch([one])
                return
            results = [error] * len(batch)
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
