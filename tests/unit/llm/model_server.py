"""A model server on loopback that does exactly what a test tells it to, byte by byte."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

Behave = Callable[["Exchange"], Awaitable[None]]

OPENAI_OK: dict[str, Any] = {
    "id": "chatcmpl-1",
    "model": "m-1",
    "choices": [{"message": {"role": "assistant", "content": "Hi."}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2},
}
ANTHROPIC_OK: dict[str, Any] = {
    "id": "msg_1",
    "model": "m-1",
    "content": [{"type": "text", "text": "Hi."}],
    "stop_reason": "end_turn",
    "usage": {"input_tokens": 3, "output_tokens": 2},
}


class Exchange:
    """One request and the means to answer it."""

    def __init__(
        self,
        path: str,
        headers: dict[str, str],
        body: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.path, self.headers, self.body = path, headers, body
        self.reader, self.writer = reader, writer

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    async def send(self, raw: bytes) -> None:
        self.writer.write(raw)
        await self.writer.drain()

    async def answer(self, body: Any, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = [f"HTTP/1.1 {status} X", f"Content-Length: {len(data)}", "Content-Type: application/json"]
        head += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self.send("\r\n".join(head).encode() + b"\r\n\r\n" + data)

    async def client_gone(self) -> None:
        """Returns once the other side has closed the connection."""
        await self.reader.read()
        self.writer.close()


class ModelServer:
    """``async with ModelServer(behave) as server``; requests and connections are counted."""

    def __init__(self, behave: Behave) -> None:
        self.behave = behave
        self.connections = 0
        self.requests: list[Exchange] = []
        self.arrived = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> ModelServer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def all_gone(self) -> None:
        """Returns once every connection has ended."""
        while self._tasks:
            await asyncio.wait(self._tasks, timeout=5)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while exchange := await self._next(reader, writer):
                self.requests.append(exchange)
                self.arrived.set()
                await self.behave(exchange)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            return  # the client went away, or the test is over
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _next(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Exchange | None:
        if writer.is_closing():
            return None
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        return Exchange(head[0].split(" ")[1], headers, body, reader, writer)


async def ok(exchange: Exchange) -> None:
    await exchange.answer(ANTHROPIC_OK if exchange.path.endswith("/messages") else OPENAI_OK)
