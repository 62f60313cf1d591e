"""What handing in many requests costs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import psutil
import pytest
from pymongo import MongoClient

from agentq.client import Client, Handle
from agentq.embedded.servers import Server
from agentq.store.mongo import MongoStore
from tests.integration.batch.conftest import BUNDLE

pytestmark = pytest.mark.servers
COUNT = 2_000
LIMIT_MS = 1.0


@pytest.fixture
async def registered(mongo_url: str, database: str) -> str:
    """A database with a workflow, as a worker leaves it at its start."""
    store = MongoStore(mongo_url, database)
    await store.open()
    await store.register([BUNDLE])
    await store.close()
    return database


@pytest.fixture
def client(registered: str, mongo_url: str, redis: Server) -> Iterator[Client]:
    with Client(mongo_url, redis.url, registered) as client:
        yield client
    with MongoClient(mongo_url) as mongo:  # type: ignore[var-annotated]
        mongo.drop_database(registered)


def test_submit_many_costs_less_than_a_millisecond_a_request(client: Client, mongod: Server, redis: Server) -> None:
    """CPU of the client and both servers together, durable and published: unlike the time that passes, it says the same
    on a machine that is busy with other tests. The quickest of three rounds; the time is printed, too."""
    requests = [{"input": f"question {n}", "workflow": "default", "metadata": {"n": n}} for n in range(COUNT)]
    list(client.submit_many(requests[:10]))  # the first one connects
    watched = [psutil.Process(pid) for pid in (os.getpid(), mongod.pid, redis.pid)]
    rounds: list[tuple[float, float]] = []
    for _ in range(3):
        began, used = time.perf_counter(), _cpu_s(watched)
        accepted = list(client.submit_many(requests))
        rounds.append(((_cpu_s(watched) - used) * 1000 / COUNT, (time.perf_counter() - began) * 1000 / COUNT))
        assert all(isinstance(one, Handle) for one in accepted)
    cpu, passed = min(rounds)
    print(f"submit_many: {cpu:.3f} ms of CPU, {passed:.3f} ms of time a request")
    assert cpu < LIMIT_MS, rounds


def _cpu_s(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)
