"""The HTTP server of the stand-in: its routes, both wire formats of a call, and the control endpoints."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from agentq.errors import ConfigError
from agentq.offline import batches_http, embeddings_http, files_http, wire
from agentq.offline.calls import Answered, Calls
from agentq.offline.faults import Scenario, parse_scenario
from agentq.offline.files import Files
from agentq.offline.jobs import Jobs
from agentq.offline.respond import (
    CLOSING,
    HEADERS,
    as_json,
    close,
    hold,
    read_body,
    refusals,
    refuse,
    send,
)
from agentq.offline.wire import MAX_BODY, Api

ABOUT = "agentq's offline stand-in: rules and word statistics, not a language model"
MODELS = ("offline-fast", "offline-strong")  # examples; any model name is answered

_CALLS = web.AppKey("calls", Calls)


def make_app(scenario: Scenario | None = None) -> web.Application:
    """The application; ``scenario`` says which calls fail and how, default none."""
    app = web.Application(client_max_size=MAX_BODY)
    app[_CALLS] = calls = Calls(scenario or Scenario())
    app[CLOSING] = asyncio.Event()
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
    files = Files()
    files_http.add_routes(app, files)
    batches_http.add_routes(app, Jobs(calls, files), calls.faults)
    embeddings_http.add_routes(app, calls)
    app.on_shutdown.append(_release)
    return app


async def _release(app: web.Application) -> None:
    """Let go of held connections, so that stopping does not wait for them."""
    app[CLOSING].set()


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


@refusals("openai")
async def _openai(request: web.Request) -> web.StreamResponse:
    return await _serve(request, "openai")


@refusals("anthropic")
async def _anthropic(request: web.Request) -> web.StreamResponse:
    return await _serve(request, "anthropic")


async def _serve(request: web.Request, api: Api) -> web.StreamResponse:
    """Read, meet a fault or not, answer; every call is in the journal when its answer goes out."""
    body = await read_body(request)
    prompt = wire.read(api, body)
    made = await request.app[_CALLS].answer(prompt, api, key=request.headers.get("Idempotency-Key", ""))
    action = made.action
    if action.time_out:
        return await hold(request, action)
    if action.status:
        return refuse(api, action.status, action.retry_after)
    if body.get("stream"):
        return await _stream(request, api, made, body)
    usage = not action.no_usage
    if api == "openai":
        content = wire.write_openai(prompt, made.reply, usage=usage)
    else:
        content = wire.write_anthropic(prompt, made.reply, forced=wire.forced_tool(body), usage=usage)
    return await send(request, json.dumps(content).encode(), action)


async def _stream(request: web.Request, api: Api, made: Answered, body: dict[str, Any]) -> web.StreamResponse:
    """Server-sent events; a cut ends them halfway, a malformed one sends a broken chunk."""
    prompt, reply, action = made.prompt, made.reply, made.action
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
        close(request)
        return response
    await response.write_eof()
    return response


# -- about itself, and control --------------------------------------------------------------------------------------


async def _models(_request: web.Request) -> web.Response:
    data = [
        {"id": name, "object": "model", "created": 0, "owned_by": "agentq-offline", "description": ABOUT}
        for name in MODELS
    ]
    return as_json({"object": "list", "data": data})


async def _health(request: web.Request) -> web.Response:
    return as_json(
        {"status": "ok", "about": ABOUT, "language_model": False, "calls": request.app[_CALLS].journal.total}
    )


async def _replace_scenario(request: web.Request) -> web.Response:
    """Other rules from now on, counted from zero; wrong ones are refused and change nothing."""
    try:
        scenario = parse_scenario(await request.json(), "the request body")
    except ConfigError as error:
        return as_json({"error": error.as_dict()}, status=400)
    except ValueError:
        return as_json({"error": {"code": "config_error", "message": "The body is no JSON."}}, status=400)
    request.app[_CALLS].faults.replace(scenario)
    return as_json({"rules": len(scenario.rules)})


async def _calls(request: web.Request) -> web.Response:
    """The journal, oldest first, and how many calls there were in all."""
    return as_json(request.app[_CALLS].journal.as_dict())


async def _forget_calls(request: web.Request) -> web.Response:
    """Start the journal over."""
    request.app[_CALLS].journal.forget()
    return as_json({"total": 0})
