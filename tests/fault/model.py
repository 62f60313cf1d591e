"""A scripted model and a bank behind real HTTP that run in the test's process, where no fault reaches them.

The model counts calls by idempotency key and can hold them, so that a test knows that a call is under way when it
kills something. The bank counts what the tools did (``tests.fault.tools``).
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from typing import Any

from aiohttp import web


class Bank:
    """What the tools did: ``calls`` by tool and key, and the keys under which a payment was made."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()
        self.payments: set[str] = set()
        self._lock = threading.Lock()

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        with self._lock:
            self.calls[body["tool"], body["key"]] += 1
            if body["tool"] == "pay":
                self.payments.add(body["key"])
        return web.json_response({"account": body["account"], "balance": "12"})

    def payments_of(self, run_id: str) -> int:
        with self._lock:
            return sum(key.startswith(f"{run_id}:") for key in self.payments)

    def calls_of(self, tool: str, run_id: str) -> int:
        with self._lock:
            return sum(
                count for (name, key), count in self.calls.items() if name == tool and key.startswith(f"{run_id}:")
            )


class ScriptedServer:
    """``with ScriptedServer() as model``: route, two look-ups in parallel, a payment, a draft, accept.

    What a run asks for decides: ``wire A`` pays with the irreversible tool instead, ``die A`` with one that kills its
    worker; calls of a run that asks to ``fail`` are answered with status 500.
    """

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s  # how long every answer takes
        self.calls: Counter[str] = Counter()
        self.instructions: dict[str, set[str]] = {}  # what each run's agents were told, by run
        self.bank = Bank()
        self.hold: set[str] = set()  # purposes to hold: route, turn, critique
        self.cut = threading.Event()  # a caller went away while its call was held
        self._held = threading.Event()
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._release = asyncio.Event()
        self.url = self.bank_url = ""

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
        self.cut.clear()

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
            app.router.add_post("/bank", self.bank.answer)
            self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
            await self._runner.setup()
            site = web.TCPSite(self._runner, "127.0.0.1", 0)
            await site.start()
            port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
            self.url, self.bank_url = f"http://127.0.0.1:{port}/v1", f"http://127.0.0.1:{port}/bank"
            started.set()

        self._loop.run_until_complete(start())
        self._loop.run_forever()

    async def _answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        with self._lock:
            self.calls[request.headers["Idempotency-Key"]] += 1
        purpose, message = _reply(body)
        if purpose == "turn":
            run_id = request.headers["Idempotency-Key"].split(":")[0]
            self.instructions.setdefault(run_id, set()).add(body["messages"][0]["content"])
        if purpose in self.hold:
            self._held.set()
            try:
                await self._release.wait()
            except asyncio.CancelledError:
                self.cut.set()
                raise
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if _wish(body) == "fail":
            return web.json_response({"error": {"message": "scripted failure"}}, status=500)
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
        tool = {"wire": "wire", "die": "die"}.get(_wish(body), "pay")
        return "turn", {"content": None, "tool_calls": [_call("c", tool, "A")]}
    return "turn", {"content": "I paid A; the balance was 12."}


def _wish(body: dict[str, Any]) -> str:
    """The first word of what the run asks for."""
    asked = next(message["content"] for message in body["messages"] if message["role"] == "user")
    return str(asked.removeprefix("## Request\n").split()[0])


def _call(call_id: str, name: str, account: str) -> dict[str, Any]:
    arguments = json.dumps({"account": account})
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
