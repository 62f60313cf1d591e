"""One whole system for all tests of this folder, on Redis and, for some, on RabbitMQ: real servers, the offline model
server, a real Celery worker for each pool, the scheduler and Flower, working on the support desk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from pydantic import SecretStr
from pymongo import MongoClient
from pymongo.database import Database

from agentq.client import Client
from agentq.embedded.rabbitmq import start_rabbitmq
from agentq.embedded.stack import Stack
from agentq.errors import ConfigError
from config.settings import load_settings
from examples.support_desk.desk import DEFAULT_DATABASE
from examples.support_desk.seed import seed
from tests.acceptance.running import CHECKOUT, INVENT, SLOWLY, Running

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of them need the servers."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.servers)


# What meets the broker itself runs on both; the rest of the system sees no difference.
ON_BOTH = {"test_celery_node", "test_client", "test_flower", "test_foreign_celery", "test_privacy"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One running system a broker."""
    if "running" in metafunc.fixturenames:
        both = metafunc.module.__name__.rpartition(".")[2] in ON_BOTH
        brokers = ["redis", "rabbitmq"] if both else ["redis"]
        metafunc.parametrize("running", brokers, indirect=True, scope="session")


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Running]:
    """The running system. Where a server's program is missing, skips locally and fails in CI."""
    home = tmp_path_factory.mktemp(request.param)
    invention = f"invented{uuid4().hex}"
    scenario = home / "scenario.yaml"
    scenario.write_text(yaml.safe_dump({"rules": _rules(invention)}), encoding="utf-8")
    given: dict[str, Any] = {"data_dir": home / "data", "app_dir": CHECKOUT / "examples" / "support_desk"}
    with ExitStack() as started:
        try:
            if request.param == "rabbitmq":
                given["broker_url"] = SecretStr(started.enter_context(start_rabbitmq(home / "rabbitmq")).url)
            stack = started.enter_context(Stack(load_settings(environ={}, cwd=home, **given), scenario=scenario))
        except ConfigError as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"needs the embedded servers: {error}")
        with MongoClient[dict[str, Any]](stack.settings["mongo_url"]) as mongo:
            seed(mongo[DEFAULT_DATABASE])
        yield Running(stack, invention)


def _rules(invention: str) -> list[dict[str, Any]]:
    return [
        {
            "name": "an agent that takes long enough to be looked at",
            "match": {"contains": SLOWLY, "purpose": "turn"},
            "action": {"latency_ms": 3000},
        },
        {
            "name": "an answer with something in it that the request did not say",
            "match": {"contains": INVENT, "purpose": "turn"},
            "action": {"invent": f"The secret word is {invention}."},
        },
    ]


@pytest.fixture(scope="session")
def client(running: Running) -> Iterator[Client]:
    with Client(running.mongo_url, running.broker_url, running.settings["mongo_database"]) as client:
        yield client


@pytest.fixture(scope="session")
def mongo(running: Running) -> Iterator[Database[dict[str, Any]]]:
    """The system's own database."""
    with MongoClient[dict[str, Any]](running.mongo_url) as mongo:
        yield mongo[running.settings["mongo_database"]]
