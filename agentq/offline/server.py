"""The HTTP server of the stand-in: both wire formats, faults, a journal without texts, and the control endpoints."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from aiohttp import web

from agentq.errors import ConfigError, InvalidRequest
from agentq.offline import brain, wire
from agentq.offline.faults import Action, Faults, Scenario, parse_scenario, spoil
from agentq.offline.prompt import Prompt, Reply
from agentq.offline.wire import Api

HEADERS = {"X-Agentq-Offline": "stand-in; not a language model"}
ABOUT = "agentq's offline stand-in: rules and word statistics, not a language model"
MODELS = ("offline-fast", "offline-strong")  # examples; any model name is answered
JOURNAL_LENGTH = 100_000
MAX_BODY = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Entry:
    """One call in the journal. Holds no text. ``status`` is what the client was sent, 0 if nothing."""

    n: int
    api: str
    purpose: str
    model: str
    key: str
    status: int
    fault: str | None
    latency_ms: int
    tools: list[str]


class _State:
    def __init__(self, scenario: Scenario) -> None:
        self.faults = Faults(scenario)
        self.journal: deque[Entry] = deque(maxlen=JOURNAL_LENGTH)
        self.count = 0
        self.closing = asyncio.Event()

    def record(self, entry: Entry) -> None:
        self.count += 1
        self.journal.append(replace(entry, n=self.count))


_STATE = web.AppKey("state", _State)


def make_app(scenario: Scenario | None = None) -> web.Application:
    """The application; ``scenario`` says which calls fail and how, default none."""
    app = web.Application(client_max_size=MAX_BODY)
    app[_STATE] = _State(scenario or Scenario())
    app.add_routes(
        [
            web.post("/v1/chat/completions", _openai),
            web.post("/v1/messages", _anthropic),
            web.get("/v1/models", _models),
            web.get("/health", _health),
            web.post("/_scenario", _replace_scenario),
            web.get("/_calls", _calls),
            web.delete("/_calls", _forget_calls),
        ]
    )
    app.on_shutdown.append(_release)
    return app


async def _release(app: web.Application) -> None:
    """Let go of held connections, so that stopping does not wait for them."""
    app[_STATE].closing.set()


@dataclass(slots=True)
class Running:
    """A server that listens. ``stop`` ends it; calling it twice is harmless."""

    host: str
    port: int
    app: web.Application
    _runner: web.AppRunner

    @property
    def url(self) -> str:
        """Without a path; OpenAI clients want ``{url}/v1``, Anthropic clients the URL itself."""
        return f"http://{self.host}:{self.port}"

    async def stop(self) -> None:
        await self._runner.cleanup()


async def start_server(*, host: str = "127.0.0.1", port: int = 0, scenario: Scenario | None = None) -> Running:
    """Listen on loopback; port 0 takes a free one. Raises ``OSError`` if the port is taken."""
    app = make_app(scenario)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, backlog=4096).start()
    except OSError:
        await runner.cleanup()
        raise
    return Running(host, runner.addresses[0][1], app, runner)


@asynccontextmanager
async def offline_server(*, scenario: Scenario | None = None) -> AsyncIterator[Running]:
    """A server for as long as the block lasts."""
    running = await start_server(scenario=scenario)
    try:
        yield running
    finally:
        await running.stop()


# -- the two APIs ---------------------------------------------------------------------------------------------------


async def _openai(request: web.Request) -> web.StreamResponse:
    return await _serve(request, "openai")


async def _anthropic(request: web.Request) -> web.StreamResponse:
    return await _serve(request, "anthropic")


async def _serve(request: web.Request, api: Api) -> web.StreamResponse:
    """Read, meet a fault or not, answer; every call is in the journal when its answer goes out."""
    try:
        body = await request.json()
        if not isinstance(body, dict):
            raise InvalidRequest("The body is a JSON object.", hint="Send an object.")
        prompt = wire.read_openai(body) if api == "openai" else wire.read_anthropic(body)
    except (ValueError, KeyError, TypeError, AttributeError, InvalidRequest) as error:
        return _json(wire.write_error(api, 400, f"The request could not be read: {error}"), status=400)
    state = request.app[_STATE]
    action = state.faults.meet(prompt)
    if action.latency_ms:
        await asyncio.sleep(action.latency_ms / 1000)
    reply = Reply() if action.status or action.time_out else spoil(brain.answer(prompt), action)
    status = 0 if action.time_out else action.status or 200
    state.record(
        Entry(0, api, prompt.purpose, prompt.model, request.headers.get("Idempotency-Key", ""), status,
              action.fault, action.latency_ms, [call["name"] for call in reply.tool_calls])
    )  # fmt: skip
    if action.time_out:
        return await _hold(request, action)
    if action.status:
        return _refuse(api, action)
    if body.get("stream"):
        return await _stream(request, api, prompt, reply, body, action)
    usage = not action.no_usage
    if api == "openai":
        content = wire.write_openai(prompt, reply, usage=usage)
    else:
        content = wire.write_anthropic(prompt, reply, forced=wire.forced_tool(body), usage=usage)
    return await _send(request, content, action)


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    body = json.dumps(content).encode()
    return web.Response(
        body=body, status=status, content_type="application/json", headers={**HEADERS, **(headers or {})}
    )


def _refuse(api: Api, action: Action) -> web.Response:
    status = action.status or 500
    wait = {} if action.retry_after is None else {"Retry-After": f"{action.retry_after:g}"}
    return _json(wire.write_error(api, status, f"Injected failure {status}."), status, wait)


async def _hold(request: web.Request, action: Action) -> web.StreamResponse:
    """Say nothing until the hold ends, the client goes away (aiohttp cancels us) or the server stops."""
    try:
        async with asyncio.timeout(action.hold_s):
            await request.app[_STATE].closing.wait()
    except TimeoutError:
        pass  # the hold is over; the connection is closed without a word
    _abort(request)
    return web.Response()


def _abort(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


async def _send(request: web.Request, content: dict[str, Any], action: Action) -> web.StreamResponse:
    if not (action.cut or action.malformed):
        return _json(content)
    body = json.dumps(content).encode()
    half = body[: len(body) // 2]
    if action.malformed:
        return web.Response(body=half, content_type="application/json", headers=HEADERS)
    response = web.StreamResponse(
        headers={**HEADERS, "Content-Type": "application/json", "Content-Length": str(len(body))}
    )
    await response.prepare(request)
    await response.write(half)
    _abort_gently(request)
    return response


def _abort_gently(request: web.Request) -> None:
    """Close after what was written has gone out, in the middle of the promised body."""
    if request.transport is not None:
        request.transport.close()


async def _stream(
    request: web.Request, api: Api, prompt: Prompt, reply: Reply, body: dict[str, Any], action: Action
) -> web.StreamResponse:
    """Server-sent events; a cut ends them halfway, a malformed one sends a broken chunk."""
    if api == "anthropic":
        events = wire.stream_anthropic(prompt, reply, forced=wire.forced_tool(body), usage=not action.no_usage)
    else:
        wished = bool((body.get("stream_options") or {}).get("include_usage"))
        chunks = wire.stream_openai(prompt, reply, usage=wished and not action.no_usage)
        events = [*(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks), "data: [DONE]\n\n"]
    if action.malformed:
        events[len(events) // 2] = 'data: {"broken\n\n'
    if action.cut:
        events = events[: len(events) // 2]
    response = web.StreamResponse(headers={**HEADERS, "Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    for event in events:
        await response.write(event.encode())
    if action.cut:
        _abort_gently(request)
        return response
    await response.write_eof()
    return response


# -- about itself, and control --------------------------------------------------------------------------------------


async def _models(_request: web.Request) -> web.Response:
    data = [
        {"id": name, "object": "model", "created": 0, "owned_by": "agentq-offline", "description": ABOUT}
        for name in MODELS
    ]
    return _json({"object": "list", "data": data})


async def _health(request: web.Request) -> web.Response:
    return _json({"status": "ok", "about": ABOUT, "language_model": False, "calls": request.app[_STATE].count})


async def _replace_scenario(request: web.Request) -> web.Response:
    """Other rules from now on, counted from zero; wrong ones are refused and change nothing."""
    try:
        scenario = parse_scenario(await request.json(), "the request body")
    except ConfigError as error:
        return _json({"error": error.as_dict()}, status=400)
    except ValueError:
        return _json({"error": {"code": "config_error", "message": "The body is no JSON."}}, status=400)
    request.app[_STATE].faults.replace(scenario)
    return _json({"rules": len(scenario.rules)})


async def _calls(request: web.Request) -> web.Response:
    """The journal, oldest first, and how many calls there were in all."""
    state = request.app[_STATE]
    return _json({"total": state.count, "calls": [asdict(entry) for entry in state.journal]})


async def _forget_calls(request: web.Request) -> web.Response:
    """Start the journal over."""
    state = request.app[_STATE]
    state.journal.clear()
    state.count = 0
    return _json({"total": 0})
