"""OpenAI's Batch endpoints."""

from __future__ import annotations

from aiohttp import web

from agentq.offline.batches import page, read_order
from agentq.offline.faults import Faults
from agentq.offline.jobs import Jobs
from agentq.offline.respond import as_json, cut_off, read_body, refusals, refuse

_JOBS = web.AppKey("jobs", Jobs)
_FAULTS = web.AppKey("faults", Faults)


def add_routes(app: web.Application, jobs: Jobs, faults: Faults) -> None:
    """The batches end with the server."""
    app[_JOBS], app[_FAULTS] = jobs, faults
    app.add_routes(
        [
            web.post("/v1/batches", _create),
            web.get("/v1/batches", _list),
            web.get("/v1/batches/{id}", _show),
            web.post("/v1/batches/{id}/cancel", _cancel),
        ]
    )
    app.on_cleanup.append(_stop)


async def _stop(app: web.Application) -> None:
    await app[_JOBS].stop()


@refusals("openai")
async def _create(request: web.Request) -> web.StreamResponse:
    order = read_order(await read_body(request))
    plan = request.app[_FAULTS].meet_creation()
    if plan.refuse is not None:
        return refuse("openai", plan.refuse, plan.retry_after)
    batch = request.app[_JOBS].create(order, plan)
    return cut_off(request) if plan.lose_answer else as_json(batch.as_openai())


@refusals("openai")
async def _list(request: web.Request) -> web.StreamResponse:
    batches = request.app[_JOBS].newest_first()
    return as_json(page(batches, request.query.get("after"), request.query.get("limit")))


@refusals("openai")
async def _show(request: web.Request) -> web.StreamResponse:
    return as_json(request.app[_JOBS].find(request.match_info["id"]).as_openai())


@refusals("openai")
async def _cancel(request: web.Request) -> web.StreamResponse:
    return as_json(request.app[_JOBS].cancel(request.match_info["id"]).as_openai())
