"""A real RabbitMQ on this machine, like the Redis and the MongoDB of ``agentq.embedded.servers``.

    with start_rabbitmq(tmp_path / "rabbitmq") as rabbitmq:
        ...  # rabbitmq.url

One node with everything of its own under one directory: data, configuration, cookie. It listens on 127.0.0.1 only, on
two ports: AMQP, and Erlang's distribution, whose port stands in the node's command line so that it needs no port mapper
daemon (epmd) and leaves none behind. Runs as whoever starts it, root or not.
"""

from __future__ import annotations

import secrets
from functools import partial
from pathlib import Path
from typing import Any

from kombu import Connection

from agentq.embedded.binaries import find_rabbitmq_server
from agentq.embedded.process import free_port
from agentq.embedded.record import write_private
from agentq.embedded.servers import START_TIMEOUT_S, Server, port_open, start_server

_NODE = "agentq@localhost"  # the data of a directory belongs to a node of this name, so it never changes


def rabbitmq_url(port: int) -> str:
    """RabbitMQ lets its user ``guest`` in over loopback only, and loopback is all that this server listens on."""
    return f"amqp://guest:guest@127.0.0.1:{port}//"


def rabbitmq_argv(directory: Path, port: int) -> list[str]:
    """The command line of a node with its data in ``directory``; writes its configuration there."""
    directory = directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    config, plugins = directory / "rabbitmq.conf", directory / "enabled_plugins"
    options = {
        "listeners.tcp.1": f"127.0.0.1:{port}",
        "cluster_name": _cluster_name(directory),
        "log.console": "true",
        "log.console.level": "info",
        "log.connection.level": "warning",
        "log.file": "false",
        "disk_free_limit.absolute": "50MB",  # below it every publisher is blocked, in silence
    }
    write_private(config, "".join(f"{name} = {value}\n" for name, value in options.items()))
    write_private(plugins, "[].\n")
    cookie = directory / ".erlang.cookie"
    if not cookie.exists():  # Erlang would make one from the time of day, and whoever has it may run code in the node
        write_private(cookie, secrets.token_hex(24))
    environment = {
        "HOME": directory,  # where Erlang looks for its cookie
        "ERL_CRASH_DUMP_SECONDS": "0",
        # Every minute RabbitMQ starts a helper that is to start epmd if there is none. With these flags it does not.
        "ERL_FLAGS": "-start_epmd false -dist_listen false",
        "RABBITMQ_CONF_ENV_FILE": "/dev/null",  # nothing of /etc/rabbitmq
        "RABBITMQ_CONFIG_FILE": config,
        "RABBITMQ_ENABLED_PLUGINS_FILE": plugins,
        "RABBITMQ_MNESIA_BASE": directory / "mnesia",
        "RABBITMQ_LOG_BASE": directory / "log",
        "RABBITMQ_LOGS": "-",
        "RABBITMQ_NODENAME": _NODE,
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": _erlang(free_port((port,))),
        "RABBITMQ_ALLOW_INPUT": "1",  # the script turns into the node instead of staying its parent
    }
    return ["env", *(f"{name}={value}" for name, value in environment.items()), str(find_rabbitmq_server()), "-noinput"]


def _erlang(port: int) -> str:
    """One scheduler thread that sleeps when it has nothing to do, and a distribution without epmd on ``port``."""
    return (
        "+S 1:1 +SDcpu 1:1 +sbwt none +sbwtdcpu none +sbwtdio none "
        f"-sname {_NODE} -dist_listen true -erl_epmd_port {port} -kernel inet_dist_use_interface {{127,0,0,1}}"
    )


def _cluster_name(directory: Path) -> str:
    return f"agentq:{directory.resolve()}"


def rabbitmq_answers(name: str, url: str, _pid: int) -> bool:
    """Does the RabbitMQ of that cluster name let us in at ``url``? AMQP tells no process id, but this name."""
    with Connection(url, connect_timeout=3, heartbeat=0) as connection:
        if not port_open(connection.port):
            return False
        lost: Any = connection.connection_errors
        try:
            connection.connect()
            return bool(connection.connection.server_properties.get("cluster_name") == name)
        except (OSError, *lost):  # on its way up it accepts, and hangs up
            return False


def start_rabbitmq(
    directory: Path, port: int = 0, *, log_file: Path | None = None, timeout_s: float = START_TIMEOUT_S
) -> Server:
    """Start RabbitMQ on ``directory`` (made if missing) and wait until it answers; port 0 picks a free one.

    Raises ConfigError without a binary, Unavailable (quoting the log) when it ends or does not answer in time.
    """
    return start_server(
        "rabbitmq",
        port,
        log_file or directory.with_name(directory.name + ".log"),
        timeout_s,
        argv=partial(rabbitmq_argv, directory),
        url=rabbitmq_url,
        answers=partial(rabbitmq_answers, _cluster_name(directory)),
    )
