"""A real Redis and a real MongoDB on this machine: find the binary, start it, wait until it answers.

Plain functions, no settings: ``start_redis`` and ``start_mongod`` serve tests and benchmarks; ``agentq up`` uses the
same command lines and probes and restarts what dies. Both servers listen on 127.0.0.1 only and recover from SIGKILL
when they are started again on the same directory.

    with start_redis(tmp_path / "redis") as redis, start_mongod(tmp_path / "mongodb") as mongod:
        ...  # redis.url, mongod.url
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, urlsplit

# pymongo belongs to the store; here it speaks only the administration commands that turn an empty mongod into the
# database that the store may then use.
from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from agentq.embedded.binaries import find_mongod, find_redis_server
from agentq.embedded.process import (
    Process,
    describe_exit,
    free_port,
    kill_process,
    log_tail,
    spawn,
    stop_process,
)
from agentq.embedded.record import write_private
from agentq.errors import Unavailable

REPLICA_SET = "agentq"
START_TIMEOUT_S = 60.0
_PORT_TRIES = 5


@dataclass(frozen=True)
class Server:
    """A running server of ours. ``url`` may hold a password, so it stays out of ``repr``."""

    name: str
    port: int
    process: Process = field(repr=False)
    log_file: Path
    url: str = field(repr=False)

    @property
    def pid(self) -> int:
        return self.process.pid

    def alive(self) -> bool:
        return self.process.poll() is None

    def stop(self, timeout_s: float = 20.0) -> int:
        """Clean stop: SIGTERM, then SIGKILL after ``timeout_s``; returns the exit code. Safe to repeat."""
        return stop_process(self.process, timeout_s)

    def kill(self) -> int:
        """The crash: SIGKILL now. Start it again with the same directory and port to recover."""
        return kill_process(self.process)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()


# ------------------------------------------------------------------------------------------------------------- Redis


def redis_url(port: int, password: str | None = None) -> str:
    return f"redis://:{quote(password, safe='')}@127.0.0.1:{port}/0" if password else f"redis://127.0.0.1:{port}/0"


def redis_argv(directory: Path, port: int, password: str | None = None, appendonly: bool = True) -> list[str]:
    """The command line of a Redis with its data in ``directory``; writes its configuration there.

    A file of mode 0600 rather than options, because every local user can read a command line.
    """
    directory.mkdir(parents=True, exist_ok=True)
    options = {
        "bind": "127.0.0.1",
        "port": str(port),
        "dir": _redis_quote(str(directory.resolve())),
        "daemonize": "no",
        "save": '""',  # no RDB snapshots: the append-only file is the persistence
        "appendonly": "yes" if appendonly else "no",
        "appendfsync": "everysec",  # the broker carries hints; a lost second is published again from MongoDB
        "maxmemory-policy": "noeviction",  # a full Redis must refuse a message, never drop another one
        "tcp-keepalive": "60",
    }
    if password:
        options["requirepass"] = _redis_quote(password)
    text = "".join(f"{name} {value}\n" for name, value in options.items())
    file = directory / "redis.conf"
    write_private(file, text)
    return [str(find_redis_server()), str(file)]


def redis_answers(url: str, pid: int) -> bool:
    """Does the Redis at ``url`` serve commands, and is it the process ``pid`` (not a stranger on a port we lost)?"""
    client = Redis.from_url(url, socket_timeout=2, socket_connect_timeout=2, retry=Retry(NoBackoff(), 0))
    try:
        info: dict[str, Any] = client.info("server")  # refused with LOADING until the data is read
        return bool(info["process_id"] == pid)
    except (RedisError, OSError):
        return False
    finally:
        client.close()


def start_redis(
    directory: Path,
    port: int = 0,
    password: str | None = None,
    appendonly: bool = True,
    *,
    log_file: Path | None = None,
    timeout_s: float = START_TIMEOUT_S,
) -> Server:
    """Start Redis on ``directory`` (made if missing) and wait until it answers; port 0 picks a free one.

    Raises ConfigError without a binary, Unavailable (quoting the log) when it ends or does not answer in time.
    """
    return start_server(
        "redis",
        port,
        log_file or directory / "redis.log",
        timeout_s,
        argv=lambda chosen: redis_argv(directory, chosen, password, appendonly),
        url=lambda chosen: redis_url(chosen, password),
        answers=redis_answers,
    )


def _redis_quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


# ----------------------------------------------------------------------------------------------------------- MongoDB


def mongod_url(port: int) -> str:
    # Direct: with one member there is nobody to discover, and the member's configured port may be an old one.
    return f"mongodb://127.0.0.1:{port}/?directConnection=true"


def mongod_argv(directory: Path, port: int, cache_gb: float = 0.25) -> list[str]:
    """The command line of a one-member replica set with its data in ``directory``; ``cache_gb`` >= 0.25."""
    directory.mkdir(parents=True, exist_ok=True)
    return [
        *(str(find_mongod()), "--dbpath", str(directory.resolve()), "--port", str(port)),
        *("--bind_ip", "127.0.0.1", "--nounixsocket", "--quiet"),
        # 6.0.5 leaks memory to anybody who can connect through its zlib code (CVE-2025-14847).
        *("--networkMessageCompressors", "disabled"),
        # A replica set even alone: majority writes, transactions and change streams exist only in one.
        *("--replSet", REPLICA_SET, "--oplogSize", "990"),
        *("--wiredTigerCacheSizeGB", str(cache_gb)),
        # A slow command is logged with its values, and those are what people wrote.
        *("--slowms", "2147483647"),
        # Every commit is a journal write of a few kilobytes; compressing them, and sampling diagnostics that nobody of
        # an embedded server reads, is a tenth of its work.
        *("--wiredTigerJournalCompressor", "none"),
        *("--setParameter", "diagnosticDataCollectionEnabled=false"),
        # Nobody to hand over to, so do not wait 15 s for clients to leave.
        *("--setParameter", "shutdownTimeoutMillisForSignaledShutdown=100"),
        # Nobody reads the past. Kept for five minutes, entries of runs that have ended stand in the way of each look at
        # the runs in flight (docs/adr/0008-admission.md).
        *("--setParameter", "minSnapshotHistoryWindowInSeconds=5"),
        # What a killed submitter had begun keeps others from its batch until it is undone: by default for a minute.
        *("--setParameter", "transactionLifetimeLimitSeconds=20"),
    ]


def mongod_answers(url: str, pid: int) -> bool:
    """Is the mongod at ``url`` process ``pid``, and a primary that takes writes?

    Initiates the replica set on first start, and after a start on another port tells the member its new address.
    """
    if not port_open(urlsplit(url).port):
        return False  # at once: pymongo would wait for its selection timeout
    try:
        with MongoClient[dict[str, Any]](url, serverSelectionTimeoutMS=1000, connectTimeoutMS=1000) as client:
            if client.admin.command("serverStatus")["pid"] != pid:
                return False
            if client.admin.command("hello").get("isWritablePrimary"):
                return True
            host, port = next(iter(client.nodes))
            _make_member(client.admin, f"{host}:{port}")
            return False
    except PyMongoError:  # not up yet, or in the middle of an election: the caller asks again
        return False


def _make_member(admin: Any, address: str) -> None:
    """Give a member without a valid configuration one; does nothing to a member that is on its way to primary."""
    not_yet_initialized, invalid_replica_set_config = 94, 93
    try:
        admin.command("replSetGetStatus")
    except OperationFailure as error:
        if error.code == not_yet_initialized:
            admin.command("replSetInitiate", {"_id": REPLICA_SET, "members": [{"_id": 0, "host": address}]})
        elif error.code == invalid_replica_set_config:  # its own configuration names the port of an earlier start
            config = admin.command("replSetGetConfig")["config"]
            config["members"][0]["host"] = address
            config["version"] += 1
            admin.command("replSetReconfig", config, force=True)
        else:
            raise


def start_mongod(
    directory: Path,
    port: int = 0,
    cache_gb: float = 0.25,
    *,
    log_file: Path | None = None,
    timeout_s: float = START_TIMEOUT_S,
) -> Server:
    """Start mongod on ``directory`` (made if missing) and wait until it is primary; port 0 picks a free one.

    Raises ConfigError without a binary, Unavailable (quoting the log) when it ends or is not primary in time.
    """
    return start_server(
        "mongodb",
        port,
        log_file or directory.with_name(directory.name + ".log"),
        timeout_s,
        argv=lambda chosen: mongod_argv(directory, chosen, cache_gb),
        url=mongod_url,
        answers=mongod_answers,
    )


# ------------------------------------------------------------------------------------------------------------ common


def port_open(port: int | None) -> bool:
    """Does anything listen on 127.0.0.1:port?"""
    try:
        socket.create_connection(("127.0.0.1", port or 0), timeout=1).close()
        return True
    except OSError:
        return False


def complaints(log_file: Path, start: int = 0) -> str:
    """What a person needs from a server's log after a failure: mongod's errors in plain words, else the last lines."""
    lines = log_tail(log_file, lines=400, start=start).splitlines()
    found = [text for line in lines if line.startswith('{"t":') and (text := _mongod_complaint(line))]
    return "\n".join(found[-4:] or lines[-8:])


def _mongod_complaint(line: str) -> str:
    """``message: error`` of a mongod log line of severity error or fatal, else nothing."""
    try:
        entry = json.loads(line)
    except ValueError:
        return ""
    return f"{entry['msg']}: {entry.get('attr', {}).get('error', '')}".strip(": ") if entry.get("s") in "EF" else ""


def start_server(
    name: str,
    port: int,
    log_file: Path,
    timeout_s: float,
    *,
    argv: Callable[[int], list[str]],
    url: Callable[[int], str],
    answers: Callable[[str, int], bool],
) -> Server:
    """Start a server and wait until ``answers(url, pid)``; port 0 tries free ones. Raises ``Unavailable``."""
    for tries_left in reversed(range(_PORT_TRIES)):
        chosen = port or free_port()
        log_start = log_file.stat().st_size if log_file.exists() else 0
        server = Server(name, chosen, spawn(argv(chosen), log_file=log_file), log_file, url(chosen))
        failure = _wait(server, answers, timeout_s)
        if failure is None:
            return server
        server.kill()
        tail = complaints(log_file, log_start)
        lost_the_port = "ddress already in use" in tail or "eaddrinuse" in tail
        if not (lost_the_port and port == 0 and tries_left):
            break
    raise Unavailable(
        f"{name} on port {chosen} {failure}.",
        code="server_start_failed",
        hint=f"Another program uses port {chosen}; choose another."
        if lost_the_port
        else f"Its log {log_file}:\n{tail}",
    )


def _wait(server: Server, answers: Callable[[str, int], bool], timeout_s: float) -> str | None:
    """Wait until the server answers; what went wrong, or None."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if answers(server.url, server.pid):
            return None
        try:
            return f"ended with {describe_exit(server.process.wait(0.1))} before it answered"
        except subprocess.TimeoutExpired:
            continue
    return f"did not answer within {timeout_s:g} s"
