"""What ``agentq doctor`` finds out about the running system.

Reads only, except for one majority write into MongoDB's collection ``doctor``. Each check says what it found and how to
mend it; none raises.
"""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from amqp.exceptions import NotFound
from celery import Celery
from kombu import Connection
from kombu.exceptions import KombuError
from pymongo import MongoClient, WriteConcern
from pymongo.errors import PyMongoError
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from agentq.cli.check_machine import Check
from agentq.embedded.plan import http_ok
from agentq.embedded.record import StackRecord
from agentq.protocol import INTAKE_QUEUE, POOLS
from agentq.store.documents import WORKER_ALIVE
from config.settings import Settings

_LONG_QUEUE = 10_000  # hints; backlog belongs in MongoDB
_SILENT_S = 30
_OVERDUE_S = 60
_DEFAULT_BASE = {"openai": "https://api.openai.com/v1", "anthropic": "https://api.anthropic.com"}


def system(settings: Settings, stack: StackRecord | None) -> Iterator[Check]:
    """What must hold while the system runs; ``settings`` completed from ``stack``."""
    yield _stack(settings, stack)
    if settings.broker_url is not None:
        url = settings.broker_url.get_secret_value()
        if url.startswith(("redis://", "rediss://", "unix://")):
            yield from _redis(url)
        elif url.startswith(("amqp://", "amqps://", "pyamqp://")):
            yield from _rabbitmq(url)
        yield from _pools(url)
    if settings.mongo_url is not None:
        yield from _mongo(settings.mongo_url.get_secret_value(), settings.mongo_database)
    yield from _provider(settings)
    if stack and "flower_url" in stack.settings:
        url = stack.settings["flower_url"]
        good = http_ok(f"{url}/healthcheck")
        yield Check("ok", "flower", url) if good else Check("warn", "flower", f"{url} does not answer", _logs(settings))


def _stack(settings: Settings, stack: StackRecord | None) -> Check:
    if stack:
        down = [str(part["name"]) for part in stack.components if part["state"] != "up"]
        found = f"process {stack.pid} on {settings.data_dir}, since {stack.started_at:%Y-%m-%d %H:%M} UTC"
        if down:
            return Check("fail", "stack", f"{found}; not running: {', '.join(down)}", _logs(settings))
        return Check("ok", "stack", found)
    if settings.broker_url is not None and settings.mongo_url is not None:
        return Check("ok", "stack", "none here; the settings name the servers")
    return Check("fail", "stack", f"none runs on {settings.data_dir}", "Start it with `agentq up`.")


def _logs(settings: Settings) -> str:
    return f"See {settings.data_dir}/logs."


# ------------------------------------------------------------------------------------------------------------- Redis


def _redis(url: str) -> Iterator[Check]:
    client = Redis.from_url(
        url, socket_timeout=3, socket_connect_timeout=3, retry=Retry(NoBackoff(), 0), decode_responses=True
    )
    try:
        began = time.monotonic()
        client.ping()
        info: dict[str, Any] = client.info()
        took = (time.monotonic() - began) * 1000
        yield Check("ok", "redis", f"version {info['redis_version']}, answers in {took:.0f} ms")
        yield _eviction(info)
        yield _persistence(info)
        yield _queues({queue: int(client.llen(queue)) for queue in (*POOLS, INTAKE_QUEUE)})
    except (RedisError, OSError, ValueError) as error:
        yield Check("fail", "redis", _said(error), "Is it running, and is AGENTQ_BROKER_URL right?")
    finally:
        client.close()


def _rabbitmq(url: str) -> Iterator[Check]:
    """Asks over AMQP alone; what only RabbitMQ's management interface tells is left out."""
    with Connection(url, connect_timeout=3, heartbeat=0) as connection:
        lost: Any = (*connection.connection_errors, *connection.channel_errors)
        try:
            began = time.monotonic()
            connection.connect()
            version = connection.connection.server_properties.get("version", "?")
            yield Check("ok", "rabbitmq", f"version {version}, answers in {(time.monotonic() - began) * 1000:.0f} ms")
            yield _queues({queue: _length(connection, queue) for queue in (*POOLS, INTAKE_QUEUE)})
            if dead := _length(connection, f"{INTAKE_QUEUE}.dead"):
                yield Check("warn", "dead letters", str(dead), f"A worker that serves {INTAKE_QUEUE} records them.")
        except (OSError, ValueError, *lost) as error:
            yield Check("fail", "rabbitmq", _said(error), "Is it running, and is AGENTQ_BROKER_URL right?")


def _length(connection: Connection, queue: str) -> int:
    """How many messages wait in a queue; none where there is no queue yet."""
    try:
        with connection.channel() as channel:
            declared: Any = channel
            return int(declared.queue_declare(queue, passive=True).message_count)
    except NotFound:
        return 0


def _eviction(info: dict[str, Any]) -> Check:
    policy = str(info.get("maxmemory_policy", "unknown"))
    if policy == "noeviction":
        return Check("ok", "redis memory", f"maxmemory-policy {policy}, {info['used_memory_human']} used")
    return Check("warn", "redis memory", f"maxmemory-policy {policy}", "Set it to noeviction, or messages get dropped.")


def _persistence(info: dict[str, Any]) -> Check:
    if info.get("aof_enabled"):
        if info.get("aof_last_write_status") == "ok":
            return Check("ok", "redis persistence", "append-only file")
        return Check("fail", "redis persistence", "the append-only file cannot be written", "Is Redis's disk full?")
    return Check(
        "warn", "redis persistence", "none", "Set appendonly yes; without it a restart delays every hint until repair."
    )


def _queues(lengths: dict[str, int]) -> Check:
    found = ", ".join(f"{queue} {length}" for queue, length in lengths.items())
    if max(lengths.values()) > _LONG_QUEUE:
        return Check("warn", "queues", found, "The workers do not keep up or do not run: see `pools`.")
    return Check("ok", "queues", found)


def _pools(url: str) -> Iterator[Check]:
    app = Celery(broker=url, set_as_current=False)
    app.conf.broker_connection_timeout = 3
    try:
        replies: Any = app.control.inspect(timeout=1.5).active_queues() or {}
    except (KombuError, OSError, RedisError) as error:
        yield Check("fail", "pools", _said(error), "The broker must answer first.")
        return
    finally:
        app.close()
    serving: dict[str, list[str]] = {}
    for worker, queues in replies.items():
        for queue in queues:
            serving.setdefault(queue["name"], []).append(worker)
    for queue in (*POOLS, INTAKE_QUEUE):
        if workers := serving.get(queue):
            yield Check("ok", f"pool {queue}", ", ".join(sorted(workers)))
        else:
            command = f"celery -A workers.app worker -Q {queue}"
            yield Check("fail", f"pool {queue}", "no worker serves this queue", f"Run `agentq up` or `{command}`.")


# ----------------------------------------------------------------------------------------------------------- MongoDB


def _mongo(url: str, database: str) -> Iterator[Check]:
    try:
        with MongoClient[dict[str, Any]](url, serverSelectionTimeoutMS=3000, socketTimeoutMS=5000) as client:
            hello = client.admin.command("hello")
            version = client.admin.command("buildInfo")["version"]
            yield Check("ok", "mongodb", f"version {version}")
            yield _replica_set(hello)
            yield _write(client, database)
            now = hello["localTime"].replace(tzinfo=UTC)
            yield _scheduler(client, database, now)
            yield from _workers(client, database, now)
            yield _overdue(client, database, now)
    except PyMongoError as error:
        yield Check("fail", "mongodb", _said(error), "Is it running, and is AGENTQ_MONGO_URL right?")


def _replica_set(hello: dict[str, Any]) -> Check:
    if "setName" not in hello:
        return Check(
            "fail", "mongodb replica set", "none", "Start mongod with --replSet and run rs.initiate(): runs need it."
        )
    members = len(hello.get("hosts", []))
    if not hello.get("isWritablePrimary") and "primary" not in hello:
        return Check("fail", "mongodb replica set", f"{hello['setName']} has no primary", "Look at rs.status().")
    return Check(
        "ok", "mongodb replica set", f"{hello['setName']}, {members} member{'s' * (members != 1)}, has a primary"
    )


def _write(client: MongoClient[dict[str, Any]], database: str) -> Check:
    began = time.monotonic()
    concern = WriteConcern(w="majority", j=True, wtimeout=3000)
    collection = client[database].get_collection("doctor", write_concern=concern)
    try:
        collection.replace_one({"_id": "probe"}, {"at": datetime.now(UTC)}, upsert=True)
    except PyMongoError as error:
        return Check(
            "fail", "mongodb writes", _said(error), "No majority of the replica set takes writes: rs.status()."
        )
    return Check("ok", "mongodb writes", f"majority and journaled in {(time.monotonic() - began) * 1000:.0f} ms")


def _scheduler(client: MongoClient[dict[str, Any]], database: str, now: datetime) -> Check:
    beats = list(client[database]["heartbeats"].find({"_id": {"$regex": "^scheduler:"}}).sort("at", -1).limit(1))
    mend = "Run `agentq up` or `python -m workers.scheduler`."
    if not beats:
        return Check("fail", "scheduler", "has never run on this database", mend)
    age = (now - beats[0]["at"].replace(tzinfo=UTC)).total_seconds()
    found = f"{beats[0]['_id'].removeprefix('scheduler:')}, last sign of life {max(0.0, age):.0f} s ago"
    return Check("ok", "scheduler", found) if age < _SILENT_S else Check("fail", "scheduler", found, mend)


def _workers(client: MongoClient[dict[str, Any]], database: str, now: datetime) -> Iterator[Check]:
    """What every worker that shows signs of life tells of itself."""
    alive = {"kind": "worker", "at": {"$gte": now - WORKER_ALIVE}}
    for beat in client[database]["heartbeats"].find(alive).sort("_id", 1):
        told = [f"{beat['in_flight']} steps in flight", f"{beat['waiting']} hints waiting"]
        told += [f"{count} {what.replace('_', ' ')}" for what, count in sorted(beat["counts"].items())]
        yield Check("ok", beat["_id"].replace(":", " ", 1), f"{'+'.join(beat['pools'])}: {', '.join(told)}")


def _overdue(client: MongoClient[dict[str, Any]], database: str, now: datetime) -> Check:
    late = client[database]["runs"].count_documents(
        {"next_due": {"$lt": now - timedelta(seconds=_OVERDUE_S), "$type": "date"}}, limit=1000
    )
    if late:
        return Check("warn", "overdue runs", f"{late}, by more than {_OVERDUE_S} s", "Does the scheduler keep up?")
    return Check("ok", "overdue runs", "none")


# ---------------------------------------------------------------------------------------------------------- provider


def _provider(settings: Settings) -> Iterator[Check]:
    for name, key, base in (
        ("openai", settings.openai_api_key, settings.openai_base_url),
        ("anthropic", settings.anthropic_api_key, settings.anthropic_base_url),
    ):
        if key or base:
            yield _reachable(name, str(base or _DEFAULT_BASE[name]))


def _reachable(name: str, base: str) -> Check:
    """Any HTTP answer will do: without a key most addresses of a provider answer 401."""
    host = urlsplit(base).netloc.rpartition("@")[2]
    if urlsplit(base).scheme not in ("http", "https"):
        return Check("fail", f"provider {name}", f"{base} is no http(s) address", "Correct the base URL.")
    try:
        urllib.request.urlopen(base, timeout=5).close()  # noqa: S310  the scheme was just checked
    except urllib.error.HTTPError:
        pass
    except (OSError, ValueError) as error:
        return Check("fail", f"provider {name}", f"{host}: {_said(error)}", "Check the base URL and the network.")
    return Check("ok", f"provider {name}", f"{host} answers")


def _said(error: Exception) -> str:
    """The first line of a library's message; addresses stay, passwords are not in these messages."""
    return (str(error).splitlines() or [type(error).__name__])[0].split(", Timeout:")[0][:300]
