"""A server on loopback, and the two ways to call it: plain HTTP, and the official client."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest
from openai import AsyncOpenAI

from agentq.offline.server import Running, offline_server


@pytest.fixture
async def server() -> AsyncIterator[Running]:
    async with offline_server() as running:
        yield running


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
async def client(server: Running) -> AsyncIterator[AsyncOpenAI]:
    """It does not retry: what a test is answered is what one call was answered."""
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened
