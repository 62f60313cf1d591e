"""OpenAI's Embeddings endpoint."""

from __future__ import annotations

import asyncio

from aiohttp import web

from agentq.offline import embeddings
from agentq.offline.calls import Calls
from agentq.offline.respond import hold, read_body, refusals, refuse, send

_CALLS = web.AppKey("calls of embeddings", Calls)


def add_routes(app: web.Application, calls: Calls) -> None:
    app[_CALLS] = calls
    app.add_routes([web.post("/v1/embeddings", _embed)])


@refusals("openai")
async def _embed(request: web.Request) -> web.StreamResponse:
    """One call in the journal, however many texts it has. It gives way to others after each text."""
    wanted = embeddings.read(await read_body(request))
    calls, key = request.app[_CALLS], request.headers.get("Idempotency-Key", "")
    action = calls.faults.meet(wanted)
    await calls.wait(action)
    calls.note(wanted, action, "openai", key=key, inputs=len(wanted.texts))
    if action.time_out:
        return await hold(request, action)
    if action.status:
        return refuse("openai", action.status, action.retry_after)
    vectors = []
    for index in range(len(wanted.texts)):
        vectors.append(embeddings.write_one(wanted, index))
        await asyncio.sleep(0)
    return await send(request, embeddings.write(wanted, vectors, usage=not action.no_usage), action)
