"""Answers as they go out over HTTP: whole, refused, held back or cut off. Every one says that it is from no model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any

from aiohttp import web

from agentq.offline import wire
from agentq.offline.faults import Action
from agentq.offline.wire import MAX_BODY, Api, Refusal

HEADERS = {"X-Agentq-Offline": "stand-in; not a language model"}
CLOSING = web.AppKey("closing", asyncio.Event)  # set when the server stops: held connections are let go

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def refusals(api: Api) -> Callable[[Handler], Handler]:
    """A handler's ``Refusal`` goes out as an error of the provider of ``api``."""

    def decorate(handler: Handler) -> Handler:
        @wraps(handler)
        async def answer(request: web.Request) -> web.StreamResponse:
            try:
                return await handler(request)
            except Refusal as refusal:
                error = wire.write_error(api, refusal.status, refusal.message, param=refusal.param, code=refusal.code)
                return as_json(error, refusal.status)

        return answer

    return decorate


async def read_body(request: web.Request) -> dict[str, Any]:
    """The JSON object that was sent. Raises ``Refusal``."""
    try:
        return wire.read_object(await request.read())
    except web.HTTPRequestEntityTooLarge:
        raise Refusal(413, f"The body may have at most {MAX_BODY} bytes.") from None
    except ValueError as error:
        raise Refusal(400, f"The request could not be read: {error}") from None


def as_json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        body=json.dumps(content).encode(),
        status=status,
        content_type="application/json",
        headers={**HEADERS, **(headers or {})},
    )


def refuse(api: Api, status: int, retry_after: float | None) -> web.Response:
    """The failure that the scenario wants."""
    wait = {} if retry_after is None else {"Retry-After": f"{retry_after:g}"}
    return as_json(wire.write_error(api, status, f"Injected failure {status}."), status, wait)


async def hold(request: web.Request, action: Action) -> web.Response:
    """Say nothing until the hold ends, the client goes away (aiohttp cancels us) or the server stops."""
    try:
        async with asyncio.timeout(action.hold_s):
            await request.app[CLOSING].wait()
    except TimeoutError:
        pass  # the hold is over; the connection is closed without a word
    return cut_off(request)


def cut_off(request: web.Request) -> web.Response:
    """End the connection without a word. What is returned is never seen."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


async def send(request: web.Request, body: bytes, action: Action) -> web.StreamResponse:
    """A JSON body, whole or as ``action`` spoils it."""
    if not (action.cut or action.malformed):
        return web.Response(body=body, content_type="application/json", headers=HEADERS)
    half = body[: len(body) // 2]
    if action.malformed:
        return web.Response(body=half, content_type="application/json", headers=HEADERS)
    response = web.StreamResponse(
        headers={**HEADERS, "Content-Type": "application/json", "Content-Length": str(len(body))}
    )
    await response.prepare(request)
    await response.write(half)
    close(request)
    return response


def close(request: web.Request) -> None:
    """End the connection after what was written has gone out, in the middle of the promised body."""
    if request.transport is not None:
        request.transport.close()
