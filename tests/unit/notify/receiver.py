"""A receiver of webhooks on loopback, with and without TLS."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web


@dataclass
class Receiver:
    """What came, and what is answered: ``status`` and ``headers``; or nothing at all while ``hang`` is set."""

    port: int = 0
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    hang: bool = False
    endless: bool = False
    got: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)  # by SNI
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def url(self, path: str = "/hooks", host: str = "127.0.0.1", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.got.append((request.path, {name.lower(): value for name, value in request.headers.items()}, body))
        self.arrived.set()
        if self.hang:
            await asyncio.Event().wait()
        if self.endless:
            response = web.StreamResponse(status=self.status)
            await response.prepare(request)
            while True:
                await response.write(b"x" * 65_536)
        return web.Response(status=self.status, headers=self.headers)


@asynccontextmanager
async def receiving(tls: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    receiver = Receiver()
    if tls is not None:
        tls.sni_callback = lambda _socket, name, _context: receiver.names.append(name)  # type: ignore[assignment]
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", receiver.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await site.start()
    receiver.port = runner.addresses[0][1]
    try:
        yield receiver
    finally:
        await runner.cleanup()


def certificate(folder: Path, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The server's and the client's side of a certificate for ``name`` that only this client trusts."""
    key, cert = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", str(key), "-out", str(cert), "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"],
        check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(cert, key)
    return server, ssl.create_default_context(cafile=cert)


def delivery(url: str, **fields: Any) -> Any:
    """A delivery of a run's end as its sender gets it."""
    from datetime import UTC, datetime

    at = datetime(2026, 1, 1, tzinfo=UTC)
    return {
        "_id": "r1:19b7:webhook", "kind": "webhook", "subject": "r1", "tenant": "default", "lane": "default|127.0.0.1",
        "to": {"url": url}, "type": "run.succeeded", "data": {"run_id": "r1", "status": "succeeded"},
        "status": "pending", "attempts": 1, "not_before": at, "token": "t", "created_at": at, "error": None,
        "ended_at": None, **fields,
    }  # fmt: skip
