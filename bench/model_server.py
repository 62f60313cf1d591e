"""An OpenAI chat-completions server that is not to blame: its answers are canned and picked by a byte search.

    python -m bench.model_server 18080    serves on that port of 127.0.0.1 until it is killed

About 10 us of CPU a call. It plays the one dialogue of ``bench/app``: a request for a structured ``route`` or
``verdict`` gets one, a conversation that holds a tool result gets the final answer, any other gets a tool call.

    POST /v1/chat/completions    answered after the delay; calls, calls in flight and repeated Idempotency-Keys count
    POST /reset?delay_ms=1000    sets the delay and the counters back
    GET  /calls                  {"calls", "repeated", "in_flight", "max_in_flight"}
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from dataclasses import dataclass, field
from typing import Any, cast

import uvloop

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_KEY = re.compile(rb"\r\nidempotency-key: *([^\r]*)", re.IGNORECASE)
_DELAY = re.compile(rb"delay_ms=(\d+)")


def _response(body: dict[str, Any], status: bytes = b"200 OK") -> bytes:
    data = json.dumps(body).encode()
    return b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (status, len(data), data)


def _completion(message: dict[str, Any], finish: str, tokens: tuple[int, int]) -> bytes:
    return _response(
        {
            "id": "chatcmpl-bench",
            "object": "chat.completion",
            "created": 1_790_000_000,
            "model": "bench",
            "choices": [{"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}],
            "usage": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)},
        }
    )


_NO_KEY = _response({"error": {"message": "Send an Idempotency-Key: it tells calls apart."}}, b"400 Bad Request")
_CALL = {"name": "order_status", "arguments": '{"order_id": "A-10017"}'}
ROUTE = _completion(
    {"content": '{"route": "orders", "reason": "The customer asks where a parcel is."}'}, "stop", (180, 20)
)
VERDICT = _completion({"content": '{"verdict": "accept", "problems": []}'}, "stop", (250, 12))
TOOL_CALL = _completion(
    {"content": None, "tool_calls": [{"id": "call_1", "type": "function", "function": _CALL}]}, "tool_calls", (160, 22)
)
FINAL = _completion(
    {"content": "Your order A-10017 was shipped with DHL and should arrive on 24 November 2026."}, "stop", (230, 24)
)


def answer_to(body: bytes) -> bytes:
    """The response to a chat completion. In a text its quotes would be escaped, so no pattern is found there."""
    if b'"json_schema":{"name":"route"' in body:
        return ROUTE
    if b'"json_schema":{"name":"verdict"' in body:
        return VERDICT
    return FINAL if b'"role":"tool"' in body else TOOL_CALL


@dataclass
class Counters:
    """Calls since the last reset, and the delay they are answered after."""

    delay_s: float = 0.0
    calls: int = 0
    repeated: int = 0
    in_flight: int = 0
    max_in_flight: int = 0
    keys: set[bytes] = field(default_factory=set)

    def begin(self, key: bytes) -> None:
        self.calls += 1
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        if key in self.keys:
            self.repeated += 1
        self.keys.add(key)

    def response(self) -> bytes:
        return _response({name: getattr(self, name) for name in ("calls", "repeated", "in_flight", "max_in_flight")})


class Service:
    """What the connections share."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.counters = Counters()


class Connection(asyncio.Protocol):
    """One keep-alive connection; a request at a time, as every HTTP client without pipelining sends them."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's has the methods, not the class

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self._buffer[:end]
        length = _LENGTH.search(head)
        total = end + 4 + (int(length[1]) if length else 0)
        if len(self._buffer) < total:
            return
        body, self._buffer = self._buffer[end + 4 : total], self._buffer[total:]
        self._serve(head, body)

    def _serve(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"POST /v1/chat/completions"):
            self._complete(head, body)
            return
        if head.startswith(b"POST /reset"):
            delay = _DELAY.search(head)
            self._service.counters = Counters(int(delay[1]) / 1000 if delay else 0.0)
        self._transport.write(self._service.counters.response())

    def _complete(self, head: bytes, body: bytes) -> None:
        counters, key, response = self._service.counters, _KEY.search(head), answer_to(body)
        if key is None:
            self._transport.write(_NO_KEY)
            return
        counters.begin(key[1])
        if counters.delay_s:
            self._service.loop.call_later(counters.delay_s, self._answer, counters, response)
        else:
            self._answer(counters, response)

    def _answer(self, counters: Counters, response: bytes) -> None:
        counters.in_flight -= 1
        if not self._transport.is_closing():
            self._transport.write(response)


async def _serve(port: int) -> None:
    loop = asyncio.get_running_loop()
    service = Service(loop)
    server = await loop.create_server(lambda: Connection(service), "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))
