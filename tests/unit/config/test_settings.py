"""Settings: one tree, named sources in a fixed order, no unknown name, no secret shown."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import SecretStr

from agentq.errors import ConfigError
from config.masking import MASK, mask_url
from config.settings import Settings, explain, load_settings


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Settings]:
    """``load_settings`` in an empty working directory with exactly the given environment."""

    def load(environ: dict[str, str] | None = None, **overrides: Any) -> Settings:
        return load_settings(environ=environ or {}, cwd=tmp_path, **overrides)

    return load


Load = Callable[..., Settings]


def source(settings: Settings, name: str) -> str:
    return next(where for each, _, where in explain(settings) if each == name)


def faults(load: Callable[[], Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load()
    found: list[str] = caught.value.details["faults"]
    assert str(caught.value).startswith(found[0].split(". ")[0])
    return found


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Leaves the record of a stack; ``locked`` says that it lives."""
    open_locks: list[int] = []

    def publish(
        settings: dict[str, Any], *, pid: int | None = None, locked: bool = True, under: str = ".agentq"
    ) -> None:
        directory = tmp_path / under
        directory.mkdir(exist_ok=True)
        fd = os.open(directory / "stack.lock", os.O_RDWR | os.O_CREAT)
        open_locks.append(fd)
        if locked:
            fcntl.flock(fd, fcntl.LOCK_EX)
        (directory / "stack.json").write_text(json.dumps({"pid": pid or os.getpid(), "settings": settings}))

    yield publish
    for fd in open_locks:
        os.close(fd)


# -- the tree -------------------------------------------------------------------------------------------------------


def test_without_any_source_the_defaults_hold(load: Load, tmp_path: Path) -> None:
    settings = load()
    assert (settings.lease_s, settings.max_attempts, settings.steps_in_flight, settings.hint_batch) == (30, 5, 256, 64)
    assert settings.data_dir == tmp_path / ".agentq"
    assert settings.mongo_url is None
    assert {where for _, _, where in explain(settings)} == {"default"}
    assert [name for name, _, _ in explain(settings)] == list(Settings.model_fields)


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_described_in_one_sentence_with_its_default(name: str) -> None:
    field = Settings.model_fields[name]
    assert field.description is not None
    assert field.description.endswith(".")
    assert "\n" not in field.description
    said = field.description.lower()
    assert "default" in said
    if field.default is not None:
        default = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
        assert default.lower() in said


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGENTQ_LEASE_S", "7")
    assert load_settings().lease_s == 7
    assert load_settings(environ={}).lease_s == 30
    assert Settings().lease_s == 30  # the class itself reads nothing


# -- sources and their order ----------------------------------------------------------------------------------------

SOURCES = ["command line", "environment AGENTQ_MAX_ATTEMPTS", ".env:2", "agentq.yaml:3", "running stack", "default"]


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(present=st.sets(st.sampled_from(range(5))))
def test_the_first_source_that_speaks_wins(present: set[int], tmp_path: Path, stack: Callable[..., None]) -> None:
    """Command line, environment, .env, YAML, running stack, default: for every combination of sources."""
    for name in (".env", "agentq.yaml", ".agentq/stack.json"):
        (tmp_path / name).unlink(missing_ok=True)
    overrides = {"max_attempts": 10} if 0 in present else {}
    environ = {"AGENTQ_MAX_ATTEMPTS": "11"} if 1 in present else {}
    if 2 in present:
        (tmp_path / ".env").write_text("# attempts\nAGENTQ_MAX_ATTEMPTS=12\n")
    if 3 in present:
        (tmp_path / "agentq.yaml").write_text("# settings\n\nmax_attempts: 13\n")
    if 4 in present:
        directory = tmp_path / ".agentq"
        directory.mkdir(exist_ok=True)
        (directory / "stack.json").write_text(json.dumps({"pid": os.getpid(), "settings": {"max_attempts": 14}}))
    settings = load_settings(environ=environ, cwd=tmp_path, **overrides)
    winner = min(present, default=5)
    assert settings.max_attempts == (10 + winner if present else 5)
    assert source(settings, "max_attempts") == SOURCES[winner]


def test_an_option_that_was_not_given_is_none(load: Load) -> None:
    assert load({"AGENTQ_LEASE_S": "9"}, lease_s=None).lease_s == 9


def test_an_empty_variable_counts_as_not_set(load: Load) -> None:
    assert load({"AGENTQ_LEASE_S": "", "OPENAI_BASE_URL": ""}).openai_base_url is None


def test_a_null_in_yaml_counts_as_not_set(load: Load, tmp_path: Path) -> None:
    (tmp_path / "agentq.yaml").write_text("lease_s:\n")
    assert load().lease_s == 30


def test_agentq_config_names_another_file(load: Load, tmp_path: Path) -> None:
    (tmp_path / "agentq.yaml").write_text("lease_s: 8\n")
    (tmp_path / "prod.yaml").write_text("lease_s: 9\n")
    settings = load({"AGENTQ_CONFIG": "prod.yaml"})
    assert (settings.lease_s, source(settings, "lease_s")) == (9, "prod.yaml:1")
    (tmp_path / ".env").write_text("AGENTQ_CONFIG=prod.yaml")
    assert load().lease_s == 9


def test_a_named_file_that_is_missing_is_a_fault(load: Load) -> None:
    assert faults(lambda: load({"AGENTQ_CONFIG": "none.yaml"})) == [
        "AGENTQ_CONFIG: there is no file none.yaml. Correct it, or unset it."
    ]


def test_relative_paths_count_from_the_working_directory(load: Load, tmp_path: Path) -> None:
    settings = load({"AGENTQ_DATA_DIR": "d"}, app_dir=Path("a/b"))
    assert (settings.data_dir, settings.app_dir) == (tmp_path / "d", tmp_path / "a" / "b")
    assert load(app_dir="/x").app_dir == Path("/x")
    assert load(app_dir="~/x").app_dir == Path.home() / "x"


def test_the_standard_names_of_providers_are_read(load: Load, tmp_path: Path) -> None:
    settings = load({"OPENAI_API_KEY": "k1", "OPENAI_BASE_URL": "http://x/v1", "ANTHROPIC_API_KEY": "k2"})
    assert settings.openai_api_key == SecretStr("k1")
    assert settings.anthropic_api_key == SecretStr("k2")
    assert source(settings, "openai_base_url") == "environment OPENAI_BASE_URL"
    (tmp_path / ".env").write_text("ANTHROPIC_BASE_URL=http://y\n")
    assert source(load(), "anthropic_base_url") == ".env:1"


def test_an_agentq_name_wins_over_the_standard_one(load: Load) -> None:
    environ = {"OPENAI_API_KEY": "general", "AGENTQ_OPENAI_API_KEY": "ours"}
    assert load(environ).openai_api_key == SecretStr("ours")
    assert load(dict(reversed(environ.items()))).openai_api_key == SecretStr("ours")


def test_other_variables_are_none_of_ours(load: Load, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("export DATABASE_URL=x\nQUOTED='a b'\n")
    settings = load({"PATH": "/bin", "AGENTQ_READY_FILE": "x", "AGENTQ_SUPPORT_DESK_DB": "y", "AGENTQ_TEST_ANY": "z"})
    assert {where for _, _, where in explain(settings)} == {"default"}


def test_service_links_of_containers_are_none_of_ours(load: Load) -> None:
    """Kubernetes puts these into every pod beside a service named agentq or agentq-redis."""
    settings = load(
        {
            "AGENTQ_SERVICE_HOST": "10.0.0.1",
            "AGENTQ_SERVICE_PORT": "80",
            "AGENTQ_SERVICE_PORT_HTTP": "80",
            "AGENTQ_PORT": "tcp://10.0.0.1:80",
            "AGENTQ_PORT_80_TCP": "tcp://10.0.0.1:80",
            "AGENTQ_PORT_80_TCP_ADDR": "10.0.0.1",
            "AGENTQ_GATEWAY_PORT": "tcp://10.0.0.1:80",
        }
    )
    assert {where for _, _, where in explain(settings)} == {"default"}


# -- the running stack ----------------------------------------------------------------------------------------------


def test_a_running_stack_tells_its_addresses(load: Load, stack: Callable[..., None]) -> None:
    """What it says beyond the settings is ignored; relative to the data directory that the other sources name."""
    stack({"mongo_url": "mongodb://h:1", "flower_url": "http://h"}, under="elsewhere")
    assert load().mongo_url is None
    settings = load(data_dir="elsewhere")
    assert settings.mongo_url == SecretStr("mongodb://h:1")
    assert source(settings, "mongo_url") == "running stack"


def test_a_stack_whose_process_is_gone_says_nothing(load: Load, stack: Callable[..., None]) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    stack({"max_attempts": 9}, pid=gone.pid)
    assert load().max_attempts == 5


def test_a_process_id_given_to_another_program_is_no_stack(load: Load, stack: Callable[..., None]) -> None:
    """After a restart of a container the old process id lives again; only the stack itself holds the lock."""
    stack({"max_attempts": 9}, locked=False)
    assert load().max_attempts == 5


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"pid": "x", "settings": {}}', '{"pid": 1, "settings": 3}'])
def test_a_broken_record_is_no_stack(load: Load, tmp_path: Path, text: str) -> None:
    (tmp_path / ".agentq").mkdir()
    (tmp_path / ".agentq" / "stack.json").write_text(text)
    assert {where for _, _, where in explain(load())} == {"default"}


# -- what is derived ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broker", "result"),
    [
        ("redis://h/0", "redis://h/0"),
        ("rediss://h", "rediss://h"),
        ("redis+socket:///x", "redis+socket:///x"),
        ("amqp://h", "rpc://"),
        ("amqps://h", "rpc://"),
        ("sqs://h", None),
    ],
)
def test_answers_go_through_the_broker(load: Load, broker: str, result: str | None) -> None:
    settings = load(broker_url=broker)
    assert (settings.result_url and settings.result_url.get_secret_value()) == result
    assert source(settings, "result_url") == ("default: broker_url" if result else "default")
    assert load(broker_url=SecretStr(broker), result_url="redis://other").result_url == SecretStr("redis://other")


def test_providers_have_their_public_addresses_unless_told(load: Load) -> None:
    providers = load({"OPENAI_API_KEY": "k", "ANTHROPIC_BASE_URL": "http://127.0.0.1:1"}).providers()
    assert (providers["openai"].base_url, providers["openai"].api_key) == ("https://api.openai.com/v1", "k")
    assert (providers["anthropic"].base_url, providers["anthropic"].api_key) == ("http://127.0.0.1:1", "")


# -- faults ---------------------------------------------------------------------------------------------------------


def test_an_unknown_variable_names_the_closest_known_one(load: Load, tmp_path: Path) -> None:
    assert faults(lambda: load({"AGENTQ_LEASES": "3"})) == [
        "environment AGENTQ_LEASES: there is no such setting. Did you mean 'AGENTQ_LEASE_S'?"
    ]
    assert "'AGENTQ_LEASE_S'" in faults(lambda: load({"agentq_lease_s": "3"}))[0]
    assert "closest" in faults(lambda: load({"AGENTQ_XYZZY": "3"}))[0]
    (tmp_path / ".env").write_text("\n\nAGENTQ_MONGO=x\n")
    assert faults(load) == [".env:3: AGENTQ_MONGO: there is no such setting. Did you mean 'AGENTQ_MONGO_URL'?"]


def test_an_unknown_yaml_key_and_option_name_the_closest_known_one(load: Load, tmp_path: Path) -> None:
    (tmp_path / "agentq.yaml").write_text("lease_s: 30\nbroker: redis://h\n")
    assert faults(load) == ["agentq.yaml:2: there is no setting 'broker'. Did you mean 'broker_url'?"]
    (tmp_path / "agentq.yaml").unlink()
    assert faults(lambda: load(hint_batches=3)) == [
        "command line: hint_batches: there is no such setting. Did you mean 'hint_batch'?"
    ]


def test_every_wrong_value_is_told_with_its_source(load: Load, tmp_path: Path) -> None:
    (tmp_path / "agentq.yaml").write_text("flower: maybe\nredis_port: 99999\nlog_level: [loud]\n")
    (tmp_path / ".env").write_text("AGENTQ_HINT_BATCH=0\n")
    found = faults(lambda: load({"AGENTQ_LEASE_S": "nan"}, max_attempts=0))
    text = "\n".join(found)
    assert len(found) == 6
    for part in (
        "agentq.yaml:1: flower should be a valid boolean",
        "agentq.yaml:2: redis_port should be less than or equal to 65535, got 99999",
        "agentq.yaml:3: log_level should be 'DEBUG', 'INFO'",
        ".env:1: hint_batch should be greater than or equal to 1, got '0'",
        "environment AGENTQ_LEASE_S: lease_s should be",
        "command line: max_attempts should be",
        "A worker's right to a step, in seconds; default 30.",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("agentq.yaml", b"lease_s: [1", "agentq.yaml:1: the YAML is broken"),
        ("agentq.yaml", b"lease_s: 6\nlease_s: 7", "agentq.yaml:2: the key 'lease_s' is already on line 1"),
        ("agentq.yaml", b"- lease_s", "agentq.yaml:1: settings are 'name: value' lines"),
        ("agentq.yaml", b"lease_s: \xff", "agentq.yaml:1: it is not UTF-8"),
        ("agentq.yaml", b"lease_s: .inf", "agentq.yaml:1: '.inf' is not a finite number"),
        (".env", b"AGENTQ_LEASE_S=1\n='x\n", ".env:2: it is not NAME=value"),
        (".env", b"\xff", ".env: it cannot be read: it is not UTF-8"),
    ],
)
def test_a_broken_file_is_told_with_its_line(
    load: Load, tmp_path: Path, file: str, content: bytes, reason: str
) -> None:
    (tmp_path / file).write_bytes(content)
    assert faults(load)[0].startswith(reason)


@pytest.mark.parametrize("name", ["mongo_url", "broker_url", "result_url", "sentry_dsn", "openai_base_url"])
def test_a_wrong_address_is_not_repeated(load: Load, name: str) -> None:
    """It may hold a password."""
    found = faults(lambda: load(**{name: "pa55word@host"}))
    assert found[0].startswith(f"command line: {name} should")
    assert "pa55" not in str(found)


# -- secrets --------------------------------------------------------------------------------------------------------

PASSWORD = st.text("abcXYZ019-_.~!$()*+,:@/%", min_size=6, max_size=20)


@given(password=PASSWORD, user=st.text("mnop", max_size=5), place=st.sampled_from(["h", "h:1/db", "a,b:2/?x=1", ""]))
def test_a_password_in_an_address_is_masked(password: str, user: str, place: str) -> None:
    """Even one with unescaped @, : and /; the user and the place stay."""
    assume(not any(password in part for part in (user, place, MASK)))
    shown = mask_url(f"mongodb://{user}:{password}@{place}")
    assert shown == f"mongodb://{user}:{MASK}@{place}"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:6379/0", "redis://h:6379/0"),
        ("redis://:pw@h/0", "redis://:***@h/0"),
        ("https://dsnkey@sentry.test/1", "https://***@sentry.test/1"),
        ("redis://h/0?password=a&db=1", "redis://h/0?password=***&db=1"),
        ("redis://h/0?password=a@b", "redis://***"),
        (
            "mongodb://h/?authMechanismProperties=AWS_SESSION_TOKEN:x&tls=true",
            "mongodb://h/?authMechanismProperties=***&tls=true",
        ),
        ("no address", "***"),
        ("", "***"),
    ],
)
def test_addresses_are_shown_without_credentials(url: str, shown: str) -> None:
    assert mask_url(url) == shown


def test_no_secret_is_ever_shown(load: Load, tmp_path: Path) -> None:
    """Neither by repr, str, explain, a dump to JSON nor an error."""
    environ = {
        "AGENTQ_MONGO_URL": "mongodb://u:hush1@h/db",
        "AGENTQ_BROKER_URL": "redis://:hush2@h",
        "AGENTQ_SENTRY_DSN": "https://hush3@s/1",
        "OPENAI_API_KEY": "hush4",
        "AGENTQ_OPENAI_BASE_URL": "http://u:hush5@h/v1",
        "ANTHROPIC_API_KEY": "hush6",
    }
    settings = load(environ)
    rows = {name: value for name, value, _ in explain(settings)}
    assert rows["mongo_url"] == "mongodb://u:***@h/db"
    assert rows["broker_url"] == rows["result_url"] == "redis://:***@h"
    assert rows["openai_api_key"] == MASK
    with pytest.raises(ConfigError) as caught:
        load({**environ, "AGENTQ_LEASE_S": "1"})
    for text in (repr(settings), str(settings), str(rows), f"{caught.value} {caught.value.as_dict()}"):
        assert "hush" not in text
    assert caught.value.__cause__ is None
    assert settings.mongo_url is not None
    assert settings.mongo_url.get_secret_value() == "mongodb://u:hush1@h/db"
