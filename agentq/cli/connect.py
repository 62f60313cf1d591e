"""From a command's options to what it talks to: the settings in force, the running stack, the client, the store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agentq.embedded.record import StackRecord, find_stack
from agentq.errors import ConfigError
from config.settings import Settings, load_settings

if TYPE_CHECKING:  # imported when a command runs, so that --help stays quick
    from agentq.client import Client
    from agentq.store.mongo import MongoStore


data_dir_option = click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where `agentq up` keeps its data [AGENTQ_DATA_DIR, else .agentq].",
)


def settings_for(data_dir: Path | None = None, **given: Any) -> Settings:
    """The settings in force; options that were not given (None) leave the other sources their say."""
    return load_settings(
        **{name: value for name, value in {"data_dir": data_dir, **given}.items() if value is not None}
    )


def attached(settings: Settings) -> tuple[Settings, StackRecord | None]:
    """The settings with the stack that runs on their data directory, None if there is none."""
    return settings, find_stack(settings.data_dir)


def open_client(data_dir: Path | None = None) -> Client:
    """A client for the running system."""
    from agentq.client import Client  # noqa: PLC0415

    settings = settings_for(data_dir)
    broker = settings.broker_url.get_secret_value() if settings.broker_url else None
    return Client(mongo_url(settings), broker, settings.mongo_database)


@asynccontextmanager
async def open_store(data_dir: Path | None = None) -> AsyncIterator[MongoStore]:
    """The store of the running system."""
    from agentq.store.mongo import MongoStore  # noqa: PLC0415

    settings = settings_for(data_dir)
    store = MongoStore(mongo_url(settings), settings.mongo_database)
    try:
        await store.open()
        yield store
    finally:
        await store.close()


def mongo_url(settings: Settings) -> str:
    """Raises ``ConfigError`` where no system is running and none is configured."""
    if settings.mongo_url is None:
        raise ConfigError(
            f"No agentq is running here: none on the data directory {settings.data_dir.resolve()}.",
            code="not_running",
            hint="Start it with 'agentq up', name another directory with --data-dir or AGENTQ_DATA_DIR, "
            "or set AGENTQ_MONGO_URL.",
        )
    return settings.mongo_url.get_secret_value()
