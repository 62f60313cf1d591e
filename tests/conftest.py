"""Fixtures for all tests: a scrubbed environment, and the real embedded servers for those that ask for them.

A server that cannot be started skips its tests locally and fails them in CI.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from agentq.embedded.servers import Server, start_mongod, start_redis
from agentq.errors import AgentqError

for name in [name for name in os.environ if name.startswith(("AGENTQ_", "OPENAI_", "ANTHROPIC_"))]:
    del os.environ[name]


@pytest.fixture(scope="session")
def mongod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real mongod, a single-node replica set."""
    yield from _served(lambda: start_mongod(tmp_path_factory.mktemp("mongodb")))


@pytest.fixture(scope="session")
def mongo_url(mongod: Server) -> str:
    return mongod.url


@pytest.fixture
def database() -> str:
    """A database name of the test's own."""
    return f"test_{uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real redis-server."""
    yield from _served(lambda: start_redis(tmp_path_factory.mktemp("redis")))


def _served(start: object) -> Iterator[Server]:
    try:
        server = start()  # type: ignore[operator]
    except AgentqError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"needs a server: {error}")
    with server:
        yield server


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The folder the system runs from."""
    return Path(__file__).resolve().parent.parent
