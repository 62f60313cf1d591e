"""The settings: one flat tree, read once by an entry point and handed on as a value.

Sources in falling priority: command line, environment (``AGENTQ_LEASE_S``), ``.env`` in the working directory,
``agentq.yaml`` there (or the file that AGENTQ_CONFIG names), the stack that ``agentq up`` runs on the data directory,
defaults. The keys and addresses of model providers are also read from the providers' own variables
(``OPENAI_API_KEY``); within one source the AGENTQ_ name wins. A variable set to the empty string counts as not set.

Nothing unknown is accepted, no secret is ever shown, and every fault names its source.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PrivateAttr, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from config.faults import Fault, Faulty, refuse, suggest
from config.masking import MASK, mask_url
from config.sources import Layer, dotenv_layer, environment_layer, stack_layer, yaml_layer

if TYPE_CHECKING:
    from agentq.llm.endpoints import Provider

Port = Annotated[int, Field(ge=0, le=65_535)]
_ADDRESSES = ("mongo_url", "broker_url", "result_url", "sentry_dsn", "openai_base_url", "anthropic_base_url")
_SUBJECT = re.compile(r"^(Value error, |(Input|String) (?=should ))")
_KEYS = ("openai_api_key", "anthropic_api_key", "webhook_secrets")
_PATHS = ("data_dir", "app_dir", "webhook_secrets_file")
_PROVIDERS = {"openai": "https://api.openai.com/v1", "anthropic": "https://api.anthropic.com"}


class Settings(BaseSettings):
    """Everything an operator can set. Make it with ``load_settings``; built directly it takes arguments only."""

    model_config = SettingsConfigDict(env_prefix="AGENTQ_", extra="forbid", frozen=True, allow_inf_nan=False)

    data_dir: Path = Field(Path(".agentq"), description="Where `agentq up` keeps its servers' data; default .agentq.")
    app_dir: Path | None = Field(
        None,
        description="A directory whose models.yaml, agents.yaml, tools.yaml and workflows/ come on top of the default "
        "catalog; default none.",
    )

    mongo_url: SecretStr | None = Field(
        None, description="MongoDB, a mongodb:// or mongodb+srv:// address; default the running stack's."
    )
    mongo_database: str = Field(
        "agentq", pattern=r'^[^/\\. "$*<>:|?\x00]{1,63}$', description="The MongoDB database; default agentq."
    )
    broker_url: SecretStr | None = Field(
        None, description="Celery's broker, a redis:// or amqp:// address; default the running stack's."
    )
    result_url: SecretStr | None = Field(
        None, description="Where callers of agentq.ask find answers; default the broker (RabbitMQ: rpc://)."
    )

    openai_api_key: SecretStr | None = Field(None, description="The key for OpenAI; default OPENAI_API_KEY, else none.")
    openai_base_url: str | None = Field(
        None, description="An OpenAI-compatible API ending in /v1; default OPENAI_BASE_URL, else OpenAI's."
    )
    anthropic_api_key: SecretStr | None = Field(
        None, description="The key for Anthropic; default ANTHROPIC_API_KEY, else none."
    )
    anthropic_base_url: str | None = Field(
        None, description="An Anthropic-compatible API without /v1; default ANTHROPIC_BASE_URL, else Anthropic's."
    )

    redis_port: Port = Field(0, description="The embedded Redis's port; default 0, a free one.")
    mongo_port: Port = Field(0, description="The embedded MongoDB's port; default 0, a free one.")
    model_port: Port = Field(0, description="The offline model server's port; default 0, a free one.")
    flower_port: Port = Field(0, description="Flower's port; default 0, a free one.")
    flower: bool = Field(True, description="Whether `agentq up` starts Flower; default true.")

    lease_s: float = Field(30, ge=5, le=3600, description="A worker's right to a step, in seconds; default 30.")
    drain_s: float = Field(
        60, ge=0, le=3600, description="How long a worker that stops waits for its model calls, in seconds; default 60."
    )
    max_attempts: int = Field(5, ge=1, description="Tries at a step before it is quarantined; default 5.")
    scheduler_interval_s: float = Field(
        0.5, gt=0, le=60, description="How often the scheduler looks for overdue runs, in seconds; default 0.5."
    )
    steps_in_flight: int = Field(256, ge=1, description="Steps that one worker process performs at once; default 256.")
    worker_concurrency: int = Field(
        256, ge=1, description="Celery messages (batches of hints) at work in one process at once; default 256."
    )
    tool_threads: int = Field(32, ge=1, description="Threads for plain tool functions in one process; default 32.")
    hint_batch: int = Field(64, ge=1, description="Hints that one Celery message carries at most; default 64.")
    inline_steps: bool = Field(
        True, description="Whether a process goes on with a run in place if it serves the next pool; default true."
    )
    task_events: bool = Field(True, description="Whether workers send the events that Flower shows; default true.")

    webhook_secrets: SecretStr | None = Field(
        None, description='What signs webhooks, as {"default": "whsec_...", "tenant/name": "whsec_..."}; default none.'
    )
    webhook_secrets_file: Path | None = Field(None, description="A file with the same, in its place; default none.")
    webhook_networks: str = Field(
        "",
        description="Networks that webhooks may go to besides the public Internet, as 10.0.0.0/8,127.0.0.1; default "
        "none.",
    )

    sentry_dsn: SecretStr | None = Field(None, description="Where errors are reported; default none.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Default INFO.")
    failpoint: str | None = Field(
        None,
        pattern=r"^[a-z_]+:[1-9][0-9]*$",
        description="For tests: kill the process at the n-th passing of a crash point, as name:n; default none.",
    )

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments only. The library's own sources know neither lines nor unknown variables; ours do."""
        return (init_settings,)

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    @field_validator("mongo_url")
    @classmethod
    def _is_mongodb(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value().startswith(("mongodb://", "mongodb+srv://")):
            raise ValueError("should start with mongodb:// or mongodb+srv://")
        return value

    @field_validator("broker_url", "result_url", "sentry_dsn", "openai_base_url", "anthropic_base_url")
    @classmethod
    def _is_address(cls, value: SecretStr | str | None) -> SecretStr | str | None:
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        if text is not None and "://" not in text:
            raise ValueError("should be an address with a scheme, like scheme://host:port")
        return value

    @model_validator(mode="before")
    @classmethod
    def _answers_go_through_the_broker(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("result_url") is None:
            broker = data.get("broker_url")
            text = broker.get_secret_value() if isinstance(broker, SecretStr) else broker
            if isinstance(text, str) and text.startswith(("redis://", "rediss://", "redis+socket://")):
                return {**data, "result_url": text}
            if isinstance(text, str) and text.startswith(("amqp://", "amqps://", "pyamqp://")):
                return {**data, "result_url": "rpc://"}
        return data

    def providers(self) -> dict[str, Provider]:
        """Address and key of each model provider, for ``agentq.llm.http.HttpLlm``."""
        from agentq.llm.endpoints import Provider  # noqa: PLC0415  aiohttp takes a third of a second; few commands call models

        found = {}
        for name, address in _PROVIDERS.items():
            key: SecretStr | None = getattr(self, f"{name}_api_key")
            found[name] = Provider(
                base_url=getattr(self, f"{name}_base_url") or address, api_key=key.get_secret_value() if key else ""
            )
        return found

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        return [(name, _shown(name, getattr(self, name))) for name in type(self).model_fields]


def load_settings(*, environ: Mapping[str, str] | None = None, cwd: Path | None = None, **overrides: Any) -> Settings:
    """Read all sources; ``overrides`` (the command line) come first, those that are None count as not given.

    ``environ`` and ``cwd`` default to the process's own. Relative paths count from ``cwd`` and come back absolute.
    Raises ``ConfigError`` with every fault found: source, reason, mend.
    """
    environ = os.environ if environ is None else environ
    cwd = Path.cwd() if cwd is None else cwd.absolute()
    known = frozenset(Settings.model_fields)
    faults: list[Fault] = []
    given = {name: value for name, value in overrides.items() if value is not None}
    layers = [Layer(given, dict.fromkeys(given, "command line"), faults=_unknown_options(given, known))]
    layers.append(environment_layer(environ, known))
    try:
        layers.append(dotenv_layer(cwd, known))
        config = layers[1].variables.get("AGENTQ_CONFIG") or layers[2].variables.get("AGENTQ_CONFIG")
        layers.append(yaml_layer(cwd, config, known))
    except Faulty as faulty:
        faults.extend(faulty.faults)
    layers.append(stack_layer(_data_dir(layers, cwd), known))
    for layer in layers:
        faults.extend(layer.faults)
    values, origins = _merge(layers)
    for name in _PATHS:
        path = values.get(name, Settings.model_fields[name].default)
        if isinstance(path, str | Path):
            values[name] = _absolute(path, cwd)
    try:
        settings = Settings(**{name: value for name, value in values.items() if name in known})
    except ValidationError as error:
        faults.extend(_value_faults(error, origins))
    refuse(faults)
    settings._origins.update(origins)
    return settings


def explain(settings: Settings) -> list[tuple[str, str, str]]:
    """``(name, value as shown, source)`` of every setting in the order of the tree; secrets are masked."""
    rows = []
    for name in Settings.model_fields:
        value = getattr(settings, name)
        source = settings._origins.get(name, "default")
        if name == "result_url" and source == "default" and value is not None:
            source = "default: broker_url"
        rows.append((name, str(_shown(name, value)) if value is not None else "-", source))
    return rows


def _shown(name: str, value: Any) -> Any:
    secret = isinstance(value, SecretStr)
    text = value.get_secret_value() if secret else value
    if isinstance(text, str) and name in _ADDRESSES:
        return mask_url(text)
    return MASK if secret else value


def _unknown_options(given: Mapping[str, Any], known: frozenset[str]) -> list[Fault]:
    return [
        Fault(f"command line: {name}", "there is no such setting", suggest(name, known, what="settings"))
        for name in given
        if name not in known
    ]


def _merge(layers: list[Layer]) -> tuple[dict[str, Any], dict[str, str]]:
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer in reversed(layers):
        values.update(layer.values)
        origins.update(layer.origins)
    return values, origins


def _data_dir(layers: list[Layer], cwd: Path) -> Path:
    values, _ = _merge(layers)
    chosen = values.get("data_dir", Settings.model_fields["data_dir"].default)
    return _absolute(chosen if isinstance(chosen, str | Path) else ".agentq", cwd)


def _absolute(path: str | Path, cwd: Path) -> Path:
    return cwd / os.path.expanduser(path)  # noqa: PTH111  Path.expanduser raises where there is no such user


def _value_faults(error: ValidationError, origins: Mapping[str, str]) -> list[Fault]:
    faults = []
    for wrong in error.errors(include_url=False, include_context=False):
        name = str(wrong["loc"][0]) if wrong["loc"] else "settings"
        field = Settings.model_fields.get(name)
        reason = _SUBJECT.sub("", wrong["msg"])
        hidden = name in _ADDRESSES or name in _KEYS
        got = "" if hidden or isinstance(wrong["input"], dict | list) else f", got {wrong['input']!r}"
        about = f"{name}: {field.description}" if field else ""
        faults.append(Fault(origins.get(name, "default"), f"{name} {reason}{got}", about))
    return faults
