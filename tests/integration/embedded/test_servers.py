"""The real Redis and the real MongoDB of the embedded stack: start, crash, recover, refuse."""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest
from pymongo import MongoClient
from pymongo.errors import PyMongoError
from redis import Redis
from redis.exceptions import AuthenticationError

from agentq.embedded.servers import Server, start_mongod, start_redis
from agentq.errors import Unavailable

pytestmark = pytest.mark.servers


def mongo(server: Server) -> MongoClient[dict[str, Any]]:
    return MongoClient(server.url, w="majority", journal=True, serverSelectionTimeoutMS=5000)


def test_redis_keeps_its_data_over_a_kill(tmp_path: Path) -> None:
    server = start_redis(tmp_path / "redis", password='pa"ss w\\ord')
    with Redis.from_url(server.url) as client:
        client.rpush("router", "hint")
    assert server.kill() == -signal.SIGKILL
    assert not server.alive()
    with start_redis(tmp_path / "redis", server.port, password='pa"ss w\\ord') as again:
        assert again.url == server.url
        with Redis.from_url(again.url) as client:
            assert client.lrange("router", 0, -1) == [b"hint"]


def test_redis_without_persistence_comes_back_empty(tmp_path: Path) -> None:
    server = start_redis(tmp_path / "redis", appendonly=False)
    with Redis.from_url(server.url) as client:
        client.set("key", "value")
    server.kill()
    with start_redis(tmp_path / "redis", server.port, appendonly=False) as again, Redis.from_url(again.url) as client:
        assert client.get("key") is None


def test_redis_is_as_a_broker_must_be(tmp_path: Path) -> None:
    with start_redis(tmp_path / "redis", password="secret") as server:
        assert "secret" not in repr(server)
        with Redis.from_url(server.url) as client:
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            assert client.config_get("bind") == {"bind": "127.0.0.1"}
        with Redis(port=server.port) as stranger, pytest.raises(AuthenticationError):
            stranger.get("key")
        assert server.stop() == 0
    assert not psutil.pid_exists(server.pid)


def test_mongodb_keeps_its_data_over_a_kill_and_takes_transactions(tmp_path: Path) -> None:
    server = start_mongod(tmp_path / "mongodb")
    with mongo(server) as client, client.start_session() as session, session.start_transaction():
        client.agentq.runs.insert_one({"_id": "r1"}, session=session)
    assert server.kill() == -signal.SIGKILL
    with start_mongod(tmp_path / "mongodb", server.port) as again:
        assert again.url == server.url
        with mongo(again) as client:
            assert [doc["_id"] for doc in client.agentq.runs.find()] == ["r1"]
        assert again.stop() == 0
    assert not psutil.pid_exists(again.pid)


def test_mongodb_moves_to_another_port_with_its_data(tmp_path: Path) -> None:
    with start_mongod(tmp_path / "mongodb") as server, mongo(server) as client:
        client.agentq.runs.insert_one({"_id": "r1"})
    with start_mongod(tmp_path / "mongodb") as moved, mongo(moved) as client:
        assert moved.port != server.port
        assert client.agentq.runs.count_documents({}) == 1
        client.agentq.runs.insert_one({"_id": "r2"})
        config = client.admin.command("replSetGetConfig")["config"]
        assert config["members"][0]["host"] == f"127.0.0.1:{moved.port}"


def test_a_second_mongod_on_the_same_data_is_refused_in_plain_words(tmp_path: Path) -> None:
    with start_mongod(tmp_path / "mongodb") as server:
        with pytest.raises(Unavailable, match=r"exit code 100 before it answered[\s\S]*Another mongod instance"):
            start_mongod(tmp_path / "mongodb")
        with mongo(server) as client:
            assert client.admin.command("ping")["ok"] == 1


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Unavailable, match=f"redis on port {port} ended .* Another program uses port {port}"):
            start_redis(tmp_path / "redis", port)
        with pytest.raises(Unavailable, match=f"Another program uses port {port}"):
            start_mongod(tmp_path / "mongodb", port)


def test_mongod_offers_no_compression_and_listens_on_loopback_only(tmp_path: Path) -> None:
    """zlib in 6.0.5 leaks memory to anybody who can connect."""
    with start_mongod(tmp_path / "mongodb") as server:
        with mongo(server) as client:
            options = client.admin.command("getCmdLineOpts")["parsed"]["net"]
            assert options["bindIp"] == "127.0.0.1"
            assert "zlib" not in client.admin.command({"hello": 1, "compression": ["zlib", "snappy"]}).get(
                "compression", []
            )
        own = [one.laddr for one in psutil.Process(server.pid).net_connections() if one.status == psutil.CONN_LISTEN]
        assert {address.ip for address in own} == {"127.0.0.1"}
        server.kill()
        with pytest.raises(PyMongoError), mongo(server) as client:
            client.admin.command("ping")
