"""CPU per model call of the HTTP clients a worker could use. Run: ``python -m bench.http_clients``.

A minimal asyncio server in another process answers a chat completion; its CPU is not counted. Each client runs in a
fresh process, posts the same body, reads and parses the answer. Printed: CPU milliseconds per call (user + system, all
threads) and calls per second. ``in flight`` is how many calls are open at a time; the last block's server takes 1 s.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import requests
import requests.adapters
import urllib3
import uvloop

from agentq.llm.endpoints import Provider
from agentq.llm.http import HttpLlm
from agentq.llm.types import LlmCall
from schemas.catalog import ModelSpec

PROMPT = "You answer questions about orders. " * 40
ANSWER = {
    "id": "chatcmpl-1",
    "model": "bench",
    "choices": [{"message": {"role": "assistant", "content": "It left on Monday. " * 10}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 400, "completion_tokens": 60},
}
BODY = {
    "model": "bench",
    "messages": [{"role": "system", "content": PROMPT}, {"role": "user", "content": "Where is A-17?"}],
}
HEADERS = {"Content-Type": "application/json", "Authorization": "Bearer k"}


# -- the server ------------------------------------------------------------------------------------------------------


class _Server(asyncio.Protocol):
    """Just enough HTTP: a head that names a length, a body, one canned answer."""

    def __init__(self, delay_s: float) -> None:
        self.delay_s, self.buffer = delay_s, b""
        data = json.dumps(ANSWER).encode()
        self.answer = (
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data
        )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        if not found or len(rest) < int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]):
            return
        self.buffer = b""
        asyncio.get_running_loop().call_later(self.delay_s, self.transport.write, self.answer)


async def _serve(delay_s: float) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: _Server(delay_s), "127.0.0.1", 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextlib.contextmanager
def _server(delay_s: float) -> Iterator[str]:
    with subprocess.Popen(
        [sys.executable, "-m", "bench.http_clients", "serve", str(delay_s)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
        finally:
            process.kill()


# -- the clients -----------------------------------------------------------------------------------------------------

Measure = tuple[float, float]  # CPU seconds, wall seconds


async def _many(one: Callable[[], Any], calls: int, in_flight: int) -> Measure:
    async def lane(count: int) -> None:
        for _ in range(count):
            await one()

    await asyncio.gather(*(lane(1) for _ in range(in_flight)))  # opens the connections
    cpu, wall = time.process_time(), time.perf_counter()
    await asyncio.gather(*(lane(calls // in_flight) for _ in range(in_flight)))
    return time.process_time() - cpu, time.perf_counter() - wall


async def _aiohttp(url: str, calls: int, in_flight: int) -> Measure:
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), cookie_jar=aiohttp.DummyCookieJar()
    ) as session:

        async def one() -> None:
            async with session.post(
                f"{url}/chat/completions", data=json.dumps(BODY).encode(), headers=HEADERS
            ) as response:
                json.loads(await response.read())

        return await _many(one, calls, in_flight)


async def _http_llm(url: str, calls: int, in_flight: int) -> Measure:
    llm = HttpLlm({"openai": Provider(url, "k")})
    call = LlmCall(
        model=ModelSpec(provider="openai", model="bench"),
        messages=BODY["messages"],  # type: ignore[arg-type]
        key="run:s1",
    )
    try:
        return await _many(lambda: llm.complete(call), calls, in_flight)
    finally:
        await llm.close()


def _threads(one: Callable[[], object], calls: int, in_flight: int) -> Measure:
    together = threading.Barrier(in_flight)

    def opened() -> None:
        together.wait()
        one()

    with concurrent.futures.ThreadPoolExecutor(in_flight) as pool:
        concurrent.futures.wait([pool.submit(opened) for _ in range(in_flight)])
        cpu, wall = time.process_time(), time.perf_counter()
        done = [pool.submit(lambda: [one() for _ in range(calls // in_flight)]) for _ in range(in_flight)]
        concurrent.futures.wait(done)
        for lane in done:
            lane.result()
        return time.process_time() - cpu, time.perf_counter() - wall


def _urllib3(url: str, calls: int, in_flight: int) -> Measure:
    pool = urllib3.PoolManager(maxsize=in_flight, block=True, retries=False)

    def one() -> None:
        json.loads(
            pool.request("POST", f"{url}/chat/completions", body=json.dumps(BODY).encode(), headers=HEADERS).data
        )

    return _threads(one, calls, in_flight)


def _requests(url: str, calls: int, in_flight: int) -> Measure:
    local = threading.local()  # a session is not safe to share: one a thread, as its documentation advises

    def one() -> None:
        if not hasattr(local, "session"):
            local.session = requests.Session()
        local.session.post(f"{url}/chat/completions", json=BODY, headers=HEADERS, timeout=60).json()

    return _threads(one, calls, in_flight)


CLIENTS: dict[str, Callable[[str, int, int], Measure]] = {
    "aiohttp + uvloop": lambda *given: uvloop.run(_aiohttp(*given)),
    "aiohttp": lambda *given: asyncio.run(_aiohttp(*given)),
    "HttpLlm + uvloop": lambda *given: uvloop.run(_http_llm(*given)),
    "HttpLlm": lambda *given: asyncio.run(_http_llm(*given)),
    "urllib3, threads": _urllib3,
    "requests, threads": _requests,
}
# Server's delay in s, in flight, calls. A thousand threads of requests fight for the GIL for minutes: left out there.
ROUNDS = [(0.0, 1, 1000), (0.0, 200, 3000), (1.0, 1000, 2000)]


def main() -> None:
    print(f"{'client':<20}{'in flight':>10}{'server':>9}{'CPU ms/call':>13}{'calls/s':>10}")
    for delay_s, in_flight, calls in ROUNDS:
        with _server(delay_s) as url:
            for name in CLIENTS:
                if in_flight == 1000 and name.startswith("requests"):
                    continue
                arguments = ["-m", "bench.http_clients", "client", name, url, str(calls), str(in_flight)]
                cpu, wall = json.loads(subprocess.check_output([sys.executable, *arguments]))
                print(
                    f"{name:<20}{in_flight:>10}{delay_s:>7.0f} s{cpu / calls * 1000:>13.3f}{calls / wall:>10.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", delay]:
            asyncio.run(_serve(float(delay)))
        case ["client", client, address, count, open_calls]:
            print(json.dumps(CLIENTS[client](address, int(count), int(open_calls))))
        case _:
            main()
