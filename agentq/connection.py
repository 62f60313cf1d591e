"""What belongs to one process of a client: a connection to MongoDB, its clock, a way to publish hints.

What pymongo raises becomes ours in one place, ``mongo_errors``.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from bson.codec_options import CodecOptions
from celery import Celery
from kombu.pools import ProducerPool
from kombu.utils.objects import cached_property
from pymongo import MongoClient, ReadPreference
from pymongo.errors import ConfigurationError, InvalidURI, OperationFailure, PyMongoError

from agentq.errors import AgentqError, Unavailable
from agentq.gate import Gate
from agentq.protocol import Hint, Pool, hint_message, task_name
from agentq.run import Registered
from agentq.turns import Turns

log = logging.getLogger(__name__)
Doc = dict[str, Any]
BROKER_TIMEOUT_S = 3.0
BROKER_QUIET_S = 5.0
_REDIS = ("redis", "rediss", "unix")  # how a broker's URL begins; any other is taken for RabbitMQ's
_NOT_ALLOWED = (13, 18)  # MongoDB: unauthorized, authentication failed
_HOME = os.getpid()  # the process that imported us


def _renew_locks() -> None:
    """In a forked child: kombu's cached properties have one lock a class before Python 3.12, and a thread of the parent
    that held one at the fork is not there to release it."""
    for name, module in sys.modules.copy().items():
        if name.partition(".")[0] in ("celery", "kombu"):
            classes = [value for value in vars(module).copy().values() if isinstance(value, type)]
            for value in [value for cls in classes for value in vars(cls).copy().values()]:
                if isinstance(value, cached_property):
                    value.lock = threading.RLock()  # type: ignore[attr-defined]  # inherited before Python 3.12


class Connection:
    """Thread-safe. Raises what pymongo raises, at the start as well; publishing raises nothing."""

    def __init__(self, mongo_url: str, broker_url: str | None, database: str) -> None:
        self.pid = os.getpid()
        if self.pid != _HOME and sys.version_info < (3, 12):
            _renew_locks()
        self.workflows: dict[str, tuple[float, Registered]] = {}
        self.mongo: MongoClient[Doc] = MongoClient(
            mongo_url, w="majority", journal=True, retryWrites=True, serverSelectionTimeoutMS=20_000,
            connectTimeoutMS=3_000, appname="agentq-client",
        )  # fmt: skip
        try:
            self.db = self.mongo.get_database(
                database, codec_options=CodecOptions(tz_aware=True, tzinfo=UTC), read_preference=ReadPreference.PRIMARY
            )
            self.gate, self.turns = Gate(self.db), Turns(self.db, self.now)
            self.offset: timedelta = self.db.command("hello")["localTime"].replace(tzinfo=UTC) - datetime.now(UTC)
        except BaseException:
            self.mongo.close()
            raise
        self._broker_url = broker_url
        self._celery = None if broker_url is None else _celery(broker_url)
        self._options = _publishing(broker_url or "")
        self._producers: ProducerPool | None = None
        self._quiet_until = 0.0

    def now(self) -> datetime:
        """MongoDB's time, by the measurement at the start."""
        return datetime.now(UTC) + self.offset

    def publishes(self) -> bool:
        """Is there a broker, and did it answer when we last asked?"""
        return self._celery is not None and time.monotonic() >= self._quiet_until

    def send(self, pool: Pool, hints: Sequence[Hint]) -> bool:
        """Publish hints; False if they did not get through. A broker that failed is left alone for a few seconds, so
        that one that hangs costs its time-out once and not once a request."""
        if self._celery is None or not self.publishes():
            return False
        try:
            producers = self._producers
            if producers is None:
                # The URL is given here as well because Celery prefers CELERY_BROKER_URL of the host's environment.
                connections = self._celery.connection_for_write(self._broker_url).Pool(10)
                producers = self._producers = ProducerPool(connections, limit=10)
            with producers.acquire(block=True, timeout=BROKER_TIMEOUT_S) as producer:
                self._celery.send_task(
                    task_name(pool), kwargs=hint_message(hints, self.now()), queue=pool, producer=producer, retry=False,
                    ignore_result=True, argsrepr="()", kwargsrepr=f"{{{len(hints)} hints}}", **self._options,
                )  # fmt: skip
        except Exception as error:  # noqa: BLE001 - whatever a broker's library raises, the requests are accepted
            self._quiet_until = time.monotonic() + BROKER_QUIET_S
            self._drop_producers()
            log.warning("%d hints for %s are left to the scheduler: %s", len(hints), pool, type(error).__name__)
            return False
        return True

    def _drop_producers(self) -> None:
        """Begin anew: on RabbitMQ a confirmation that comes late would be taken for that of the next message."""
        producers, self._producers = self._producers, None
        if producers is not None:
            producers.connections.force_close_all()

    def close(self) -> None:
        self.mongo.close()
        self._drop_producers()
        if self._celery is not None:
            self._celery.close()


class Connections:
    """One client's connections, each made at its first use; what was made before a fork is not used after it."""

    def __init__(self, mongo_url: str, broker_url: str | None, database: str) -> None:
        self._mongo_url = mongo_url
        self._broker_url = broker_url
        self._database = database
        self._of_process: dict[int, Connection] = {}

    def here(self) -> Connection:
        """This process's own. Raises ``Unavailable``; ``AgentqError`` where the URL or the credentials are wrong."""
        connected = self._of_process.get(os.getpid())
        if connected is None:
            with mongo_errors():
                made = Connection(self._mongo_url, self._broker_url, self._database)
            connected = self._of_process.setdefault(made.pid, made)
            if connected is not made:  # another thread was quicker
                made.close()
        return connected

    def close(self) -> None:
        """Close this process's; the next use makes a new one."""
        connected = self._of_process.pop(os.getpid(), None)
        if connected is not None:
            connected.close()


@contextmanager
def mongo_errors() -> Iterator[None]:
    """Within it, what pymongo raises becomes one of ours."""
    try:
        yield
    except (InvalidURI, ConfigurationError, ValueError) as error:
        raise AgentqError(  # the library's own words may quote a password
            "The MongoDB URL is not valid.",
            code="bad_mongo_url",
            hint="It reads mongodb://user:password@host:27017/.",
        ) from error
    except OperationFailure as error:
        if error.code in _NOT_ALLOWED:
            raise AgentqError(
                "MongoDB refuses these credentials.", code="mongo_refused", hint="Check user, password and roles."
            ) from error
        raise _unavailable(error) from error
    except PyMongoError as error:
        raise _unavailable(error) from error


def _unavailable(error: PyMongoError) -> Unavailable:
    return Unavailable(
        "MongoDB does not answer.",
        code="mongo_unavailable",
        hint="Check the URL and that it runs; repeat with the same idempotency key.",
        cause=type(error).__name__,
    )


def _publishing(broker_url: str) -> Doc:
    """On RabbitMQ: declare nothing (the workers do, and a client needs no right to), fail where no queue took the
    message or nobody confirmed it in time."""
    if broker_url.startswith(_REDIS):
        return {}
    return {"declare": [], "mandatory": True, "confirm_timeout": BROKER_TIMEOUT_S}


def _celery(broker_url: str) -> Celery:
    app = Celery("agentq-client", broker=broker_url, set_as_current=False)
    redis = broker_url.startswith(_REDIS)
    timeouts = {"socket_timeout": BROKER_TIMEOUT_S, "socket_connect_timeout": BROKER_TIMEOUT_S}
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        broker_connection_timeout=BROKER_TIMEOUT_S,
        broker_transport_options={"max_retries": 1, **(timeouts if redis else {"confirm_publish": True})},
    )
    return app
