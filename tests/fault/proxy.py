"""A TCP proxy that fails on command: put between our processes and a server, its faults are switched while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
CHUNK = 65_536


class Proxy:
    """``with Proxy(server_port) as proxy``: connect to ``127.0.0.1:proxy.port`` instead of the server.

    All methods may be called from any thread and return when the fault is in force. A connection that a fault has
    cost bytes is reset sooner or later, never healed: no peer ever reads a stream with a hole in it.
    """

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.port = 0
        self.accepted = 0
        self._latency_s = 0.0
        self._refusing = False
        self._cut_after: int | None = None
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._open = asyncio.Event()  # cleared: a black hole

    def __enter__(self) -> Proxy:
        self._open.set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def leading_to(self, url: str) -> str:
        """The server's URL with the proxy's port in place of its own."""
        return url.replace(f":{self.upstream}", f":{self.port}")

    # -- faults -----------------------------------------------------------------------------------------------------

    def heal(self) -> None:
        """No faults from here on. What a black hole held back flows on, as after a partition that TCP outlived."""
        self._do(self._heal)

    def latency(self, seconds: float) -> None:
        """Every piece of data waits so long, in each direction."""
        self._do(lambda: self._delay(seconds))

    def black_hole(self) -> None:
        """Connections stay and new ones are accepted; nothing gets through in either direction."""
        self._do(self._open.clear)

    def reset(self) -> int:
        """Every connection gets a TCP reset on both sides, at once; how many there were."""
        return self._do(self._reset)

    def refuse(self) -> None:
        """Connections are reset, and so is every new one."""
        self._do(self._refuse)

    def half_open(self) -> int:
        """The server's side of every connection is gone and the client's side does not know: what it sends is
        swallowed, nothing comes. New connections work. How many there were."""
        return self._do(self._halve)

    def cut_after(self, size: int | None) -> None:
        """Each connection is reset once the server has sent so many bytes through it from now on."""
        self._do(lambda: self._cut(size))

    # -- inside -----------------------------------------------------------------------------------------------------

    def _do(self, act: Callable[[], T]) -> T:
        async def run() -> T:
            return act()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)

    def _heal(self) -> None:
        self._latency_s, self._refusing, self._cut_after = 0.0, False, None
        for link in [link for link in self._links if link.halved]:
            link.reset()
        self._open.set()

    def _delay(self, seconds: float) -> None:
        self._latency_s = seconds

    def _refuse(self) -> None:
        self._refusing = True
        self._reset()

    def _reset(self) -> int:
        links = list(self._links)
        for link in links:
            link.reset()
        return len(links)

    def _halve(self) -> int:
        links = [link for link in self._links if not link.halved]
        for link in links:
            link.halve()
        return len(links)

    def _cut(self, size: int | None) -> None:
        self._cut_after = size
        for link in self._links:
            link.left = size

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        self._server.close()
        self._reset()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        if self._refusing:
            _abort(writer)
            return
        link = _Link(writer, self._cut_after)
        self._links.add(link)
        task = asyncio.create_task(self._carry(link, reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry(self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._open.wait()
            upstream, link.server = await asyncio.open_connection("127.0.0.1", self.upstream)
            ways = (self._pump(link, reader, link.server, False), self._pump(link, upstream, writer, True))
            await asyncio.gather(*ways)
        except OSError:
            pass  # a peer is gone: so is the other
        finally:
            self._links.discard(link)
            link.reset()

    async def _pump(self, link: _Link, source: asyncio.StreamReader, sink: asyncio.StreamWriter, back: bool) -> None:
        while data := await source.read(CHUNK):
            if self._latency_s:
                await asyncio.sleep(self._latency_s)
            await self._open.wait()
            if link.halved:
                if back:
                    return
                continue
            if back and link.left is not None:
                data, link.left = data[: link.left], link.left - len(data)
            sink.write(data)
            await sink.drain()
            if back and link.left is not None and link.left <= 0:
                raise ConnectionResetError
        if not link.halved:
            with contextlib.suppress(OSError):
                sink.write_eof()


class _Link:
    """One connection through the proxy: its two sides and what was done to it."""

    def __init__(self, client: asyncio.StreamWriter, left: int | None) -> None:
        self.client = client
        self.server: asyncio.StreamWriter | None = None
        self.halved = False
        self.left = left

    def reset(self) -> None:
        for writer in (self.client, self.server):
            if writer is not None:
                _abort(writer)

    def halve(self) -> None:
        self.halved = True
        if self.server is not None:
            _abort(self.server)


def _abort(writer: asyncio.StreamWriter) -> None:
    """Close with a reset rather than an orderly end."""
    known: Any = writer.get_extra_info("socket")
    if known is not None and known.fileno() >= 0:
        with contextlib.suppress(OSError):
            known.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
