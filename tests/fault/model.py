"""A scripted model behind real HTTP that runs in the test's process: it counts calls by idempotency key and can hold
them, so that a test knows that a call is under way when it kills something."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from typing import Any

from aiohttp import web


class ScriptedServer:
    """``with ScriptedServer() as model``: route, two look-ups in parallel, a payment, a draft, accept."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.hold: set[str] = set()  # purposes to hold: route, turn, critique
        self._held = threading.Event()
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._release = asyncio.Event()
        self.url = ""

    def __enter__(self) -> ScriptedServer:
        started = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def wait_held(self, timeout_s: float = 60) -> None:
        """Until a call is under way that is held."""
        assert self._held.wait(timeout_s), "no call was held"

    def release(self) -> None:
        """Let held calls, and those to come, be answered."""
        self.hold = set()
        self._loop.call_soon_threadsafe(self._release.set)

    def reset(self) -> None:
        """For the next test: nothing is held, nothing was."""
        self.release()
        asyncio.run_coroutine_threadsafe(self._clear(), self._loop).result(10)

    async def _clear(self) -> None:
        self._release.clear()
        self._held.clear()

    def of_run(self, run_id: str) -> dict[str, int]:
        """How often each step of a run called: step id -> calls."""
        with self._lock:
            found = {key: count for key, count in self.calls.items() if key.startswith(f"{run_id}:")}
        return {key.split(":")[1]: count for key, count in found.items()}

    def _serve(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)

        async def start() -> None:
            app = web.Application()
            app.router.add_post("/v1/chat/completions", self._answer)
            self._runner = web.AppRunner(app, shutdown_timeout=0.1)
            await self._runner.setup()
            site = web.TCPSite(self._runner, "127.0.0.1", 0)
            await site.start()
            port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
            self.url = f"http://127.0.0.1:{port}/v1"
            started.set()

        self._loop.run_until_complete(start())
        self._loop.run_forever()

    async def _answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        with self._lock:
            self.calls[request.headers["Idempotency-Key"]] += 1
        purpose, message = _reply(body)
        if purpose in self.hold:
            self._held.set()
            await self._release.wait()
        return web.json_response(
            {
                "id": "x", "model": "scripted-1",
                "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", **message}}],
                "usage": {"prompt_tokens": 10, "completion_tokens": 5},
            }
        )  # fmt: skip


def _reply(body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    schema = body.get("response_format", {}).get("json_schema", {}).get("name")
    if schema == "route":
        return "route", {"content": '{"route": "teller", "reason": "only choice"}'}
    if schema == "verdict":
        return "critique", {"content": '{"verdict": "accept", "problems": []}'}
    results = [message for message in body["messages"] if message["role"] == "tool"]
    if not results:
        return "turn", {"content": None, "tool_calls": [_call("a", "look_up", "A"), _call("b", "look_up", "B")]}
    if len(results) == 2:
        return "turn", {"content": None, "tool_calls": [_call("c", "pay", "A")]}
    return "turn", {"content": "I paid A; the balance was 12."}


def _call(call_id: str, name: str, account: str) -> dict[str, Any]:
    arguments = json.dumps({"account": account})
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
