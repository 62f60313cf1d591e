"""What ``agentq up`` starts, as data: which processes, with which settings, where they are reached.

A server or provider that the settings name is used as it is; only what they leave open is started here.
"""

from __future__ import annotations

import secrets
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from pydantic import SecretStr

from agentq.embedded.process import free_port
from agentq.embedded.record import write_private
from agentq.embedded.servers import (
    complaints,
    mongod_answers,
    mongod_argv,
    mongod_url,
    redis_answers,
    redis_argv,
    redis_url,
)
from agentq.embedded.supervisor import Component
from agentq.protocol import INTAKE_QUEUE, POOLS
from config.catalog import catalog_directories, load_catalog
from config.settings import Settings, explain

CHECKOUT = Path(__file__).resolve().parents[2]
WORKER_GRACE_S = 15.0  # for the steps in flight; what is cut off is done again after its lease runs out
_RECOVERY_S = 300.0  # after a crash a server reads its journal before it answers

# Stop order: nobody loses something it still needs.
_FLOWER, _WORKERS, _SCHEDULER, _MODEL, _REDIS, _MONGODB = range(6)


@dataclass(frozen=True)
class Plan:
    """``settings``: what others need to reach the stack, by the field names of ``Settings``."""

    components: list[Component]
    settings: dict[str, str] = field(repr=False)


def make_plan(settings: Settings, *, scenario: Path | None = None) -> Plan:
    """Decide what to start under ``settings.data_dir`` and on which ports. Writes the Redis password on first use.

    ``scenario`` is a fault and latency script for the offline model server. Raises ConfigError when a server's
    binary is missing or a file of the catalog is wrong.
    """
    load_catalog(catalog_directories(settings))  # a wrong file is refused here, before anything starts
    settings = _without_running_stack(settings)
    data_dir = settings.data_dir.resolve()
    servers: list[Component] = []
    urls: dict[str, str] = {"data_dir": str(data_dir), "mongo_database": settings.mongo_database}
    if settings.app_dir:
        urls["app_dir"] = str(settings.app_dir.resolve())
    ports = _ports(settings)
    for name, start, port in (("broker_url", _redis, ports["redis"]), ("mongo_url", _mongodb, ports["mongo"])):
        given: SecretStr | None = getattr(settings, name)
        if given is not None:
            urls[name] = given.get_secret_value()
        else:
            component, urls[name] = start(port, data_dir)
            servers.append(component)
    if settings.result_url is not None:
        urls["result_url"] = settings.result_url.get_secret_value()
    if not has_provider(settings):
        model, base = _model_server(ports["model"], data_dir, scenario)
        servers.append(model)
        urls |= {"openai_base_url": f"{base}/v1", "anthropic_base_url": base}
    env = _environment(settings, urls)
    make = partial(_python_process, data_dir=data_dir, env=env, needs=tuple(server.name for server in servers))
    components = [*servers, *(_worker(make, pool) for pool in POOLS), _scheduler(make)]
    if settings.flower:
        flower, urls["flower_url"] = _flower(make, ports["flower"])
        components.append(flower)
    return Plan(components, urls)


def _without_running_stack(settings: Settings) -> Settings:
    """Settings without what another stack lent them: it may end at any moment, and we are about to take its place."""
    sources = {name: source for name, _, source in explain(settings)}
    lent = {name for name, source in sources.items() if source == "running stack"}
    if "broker_url" in lent and sources["result_url"].startswith("default"):
        lent.add("result_url")
    return settings.model_copy(update={name: Settings.model_fields[name].default for name in lent})


def _ports(settings: Settings) -> dict[str, int]:
    """The port of each server, as set or else free, no two the same."""
    wanted = {name: getattr(settings, f"{name}_port") for name in ("redis", "mongo", "model", "flower")}
    for name, port in wanted.items():
        wanted[name] = port or free_port(wanted.values())
    return wanted


def _environment(settings: Settings, urls: dict[str, str]) -> dict[str, str]:
    """Everything set, as AGENTQ_* variables: our processes run in the checkout and read none of the user's files."""
    values = {name: getattr(settings, name) for name, _, source in explain(settings) if source != "default"}
    text = {
        name: value.get_secret_value() if isinstance(value, SecretStr) else str(value)
        for name, value in values.items()
        if value is not None
    }
    text["drain_s"] = str(min(settings.drain_s, WORKER_GRACE_S - 5))
    return {f"AGENTQ_{name.upper()}": value for name, value in {**text, **urls}.items()} | {"AGENTQ_CONFIG": ""}


def has_provider(settings: Settings) -> bool:
    """Do the settings name a real model provider? Then the offline model server is not needed."""
    return any(
        (
            settings.openai_api_key,
            settings.openai_base_url,
            settings.anthropic_api_key,
            settings.anthropic_base_url,
        )
    )


# ----------------------------------------------------------------------------------------------------------- servers


def _redis(port: int, data_dir: Path) -> tuple[Component, str]:
    password = kept_secret(data_dir / "redis.password")
    url = redis_url(port, password)
    component = Component(
        name="redis",
        argv=redis_argv(data_dir / "redis", port, password),
        ready=partial(redis_answers, url),
        address=f"127.0.0.1:{port}",
        start_timeout_s=_RECOVERY_S,
        stop_order=_REDIS,
    )
    return component, url


def _mongodb(port: int, data_dir: Path) -> tuple[Component, str]:
    url = mongod_url(port)
    component = Component(
        name="mongodb",
        argv=mongod_argv(data_dir / "mongodb", port),
        ready=partial(mongod_answers, url),
        address=f"127.0.0.1:{port}",
        start_timeout_s=_RECOVERY_S,
        stop_order=_MONGODB,
        explain=complaints,
    )
    return component, url


def kept_secret(file: Path) -> str:
    """The secret in ``file`` (mode 0600), made at random the first time."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private(file, secrets.token_urlsafe(24) + "\n")
    return file.read_text(encoding="utf-8").strip()


def _model_server(port: int, data_dir: Path, scenario: Path | None) -> tuple[Component, str]:
    base = f"http://127.0.0.1:{port}"
    argv = [sys.executable, "-m", "agentq.offline", "--host", "127.0.0.1", "--port", str(port)]
    argv += ["--port-file", str(data_dir / "run" / "model.port")]
    if scenario:
        argv += ["--scenario", str(scenario.resolve())]
    component = Component(
        name="model",
        argv=argv,
        ready=partial(http_ok, f"{base}/health"),
        cwd=CHECKOUT,
        address=base,
        ready_file=data_dir / "run" / "model.port",
        stop_order=_MODEL,
    )
    return component, base


# ----------------------------------------------------------------------------------------- processes of this checkout


def _python_process(
    name: str,
    *argv: str,
    data_dir: Path,
    env: dict[str, str],
    needs: tuple[str, ...],
    stop_order: int,
    stop_timeout_s: float = WORKER_GRACE_S,
) -> Component:
    """A process of ours; it creates the file AGENTQ_READY_FILE when it serves."""
    ready_file = data_dir / "run" / f"{name}.ready"
    return Component(
        name=name,
        argv=[sys.executable, "-m", *argv],
        ready=partial(_exists, ready_file),
        env={**env, "AGENTQ_READY_FILE": str(ready_file)},
        cwd=CHECKOUT,  # `workers` and `config` are found here and nowhere else
        needs=needs,
        ready_file=ready_file,
        stop_order=stop_order,
        stop_timeout_s=stop_timeout_s,
    )


def _worker(make: Callable[..., Component], pool: str) -> Component:
    # Foreign applications send to the intake queue; accepting a request is the router's first act.
    queues = f"{pool},{INTAKE_QUEUE}" if pool == "router" else pool
    return make(
        pool,
        *("celery", "-A", "workers.app", "worker", "-Q", queues, "-n", f"{pool}@%h"),
        *("--without-gossip", "--without-mingle"),  # neighbours' chatter that leaves keys behind in Redis
        stop_order=_WORKERS,
    )


def _scheduler(make: Callable[..., Component]) -> Component:
    return make("scheduler", "workers.scheduler", stop_order=_SCHEDULER)


def _flower(make: Callable[..., Component], port: int) -> tuple[Component, str]:
    url = f"http://127.0.0.1:{port}"
    base = make(
        "flower",
        *("celery", "-A", "workers.app", "flower", "--address=127.0.0.1", f"--port={port}"),
        # It keeps no history of its own: the runs are in MongoDB.
        *("--read_only=True", "--persistent=False"),
        stop_order=_FLOWER,
        stop_timeout_s=5.0,
    )
    component = replace(
        base,
        # Its API answers 401 without a password unless told otherwise. Only because it listens on loopback and cannot
        # control anything.
        env={**base.env, "FLOWER_UNAUTHENTICATED_API": "true"},
        ready=partial(http_ok, f"{url}/healthcheck"),
        ready_file=None,
        address=url,
        essential=False,
    )
    return component, url


# ------------------------------------------------------------------------------------------------------------ probes


def _exists(file: Path, _pid: int) -> bool:
    return file.exists()


def http_ok(url: str, _pid: int = 0) -> bool:
    """Does ``url`` (on loopback) answer 200 within a second?"""
    try:
        with _DIRECT.open(url, timeout=1) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):
        return False


# Not through a proxy that the environment may name.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
