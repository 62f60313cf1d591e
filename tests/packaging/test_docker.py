"""The container set-up, as far as it can be checked without a container: its file, secrets, signs of life."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentq.protocol import POOLS
from config.settings import Settings
from workers.health import MAX_AGE_S, complaint

CHECKOUT = Path(__file__).resolve().parents[2]
DOCKER = CHECKOUT / "docker"
SECRETS = ("REDIS_PASSWORD", "MONGO_PASSWORD", "MONGO_KEY", "FLOWER_PASSWORD")
OURS = (*POOLS, "scheduler", "flower", "model")


def compose(*words: str, **values: str) -> subprocess.CompletedProcess[str]:
    """docker-compose on our file with the settings of env.example and ``values``."""
    binary = shutil.which("docker-compose")
    if binary is None:
        pytest.skip("docker-compose is not installed: apt-get install docker-compose")
    argv = [binary, "--env-file", str(DOCKER / "env.example"), "-f", str(DOCKER / "compose.yaml"), *words]
    env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **values}
    return subprocess.run(argv, env=env, cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return dict(yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))["services"])


def test_compose_accepts_the_file_once_the_secrets_are_given() -> None:
    done = compose("config", "-q", **dict.fromkeys(SECRETS, "0123456789abcdef"))
    assert done.returncode == 0, done.stderr


def test_with_its_profile_rabbitmq_is_the_broker() -> None:
    """And without it there is none, and Redis is the broker."""
    secrets = dict.fromkeys(SECRETS, "0123456789abcdef")
    chosen = {"BROKER_USER": "amqp://agentq", "BROKER_HOST": "rabbitmq:5672//"}
    done = compose("--profile", "rabbitmq", "config", **secrets, **chosen)
    assert done.returncode == 0, done.stderr
    with_it = yaml.safe_load(done.stdout)["services"]
    assert with_it["rabbitmq"]["environment"]["RABBITMQ_DEFAULT_PASS"] == "0123456789abcdef"
    without = yaml.safe_load(compose("config", **secrets).stdout)["services"]
    for name in (*POOLS, "scheduler", "flower"):
        with_rabbitmq = with_it[name]["environment"]["AGENTQ_BROKER_URL"]
        assert with_rabbitmq == "amqp://agentq:0123456789abcdef@rabbitmq:5672//"
        assert without[name]["environment"]["AGENTQ_BROKER_URL"] == "redis://:0123456789abcdef@redis:6379/0"


@pytest.mark.parametrize("missing", SECRETS)
def test_compose_refuses_to_start_without_a_secret(missing: str) -> None:
    """No default password can reach production: what is not set is named."""
    given = {name: "0123456789abcdef" for name in SECRETS if name != missing}
    done = compose("config", "-q", **given)
    assert done.returncode != 0
    assert f"{missing} is not set" in done.stderr


def test_every_pool_scheduler_flower_and_server_is_there_and_restarts(services: dict[str, Any]) -> None:
    assert {*OURS, "redis", "mongodb"} <= set(services)
    for name, service in services.items():
        if name != "mongodb-init":
            assert service["restart"] == "unless-stopped", name
            assert "stop_grace_period" in service, name
    for pool in POOLS:
        assert f"-Q {pool}" in services[pool]["command"]


def test_only_flower_is_published_and_on_loopback_only(services: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert set(published) == {"flower"}
    assert all(port.startswith("127.0.0.1:") for port in published["flower"])
    assert "FLOWER_PASSWORD:?" in services["flower"]["environment"]["FLOWER_BASIC_AUTH"]


def test_every_variable_that_compose_sets_is_a_setting(services: dict[str, Any]) -> None:
    """A mistyped one would stop the container at its start."""
    for name in OURS:
        for variable in services[name].get("environment", {}):
            if variable.startswith("AGENTQ_"):
                assert variable == "AGENTQ_READY_FILE" or variable[7:].lower() in Settings.model_fields, variable


def test_every_secret_of_compose_is_explained_in_the_example_and_empty_there() -> None:
    lines = (DOCKER / "env.example").read_text(encoding="utf-8").splitlines()
    values = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert {values[name] for name in SECRETS} == {""}
    assert {values["OPENAI_API_KEY"], values["ANTHROPIC_API_KEY"]} == {""}


def test_the_image_runs_as_nobody_special_and_copies_only_what_exists() -> None:
    lines = (DOCKER / "Dockerfile").read_text(encoding="utf-8").splitlines()
    assert "USER 10001" in lines
    for line in lines:
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (CHECKOUT / source).exists(), source


def test_a_sign_of_life_is_young_old_or_missing(tmp_path: Path) -> None:
    file = tmp_path / "ready"
    missing = complaint(str(file), 0)
    assert missing is not None
    assert "not become ready" in missing
    file.touch()
    touched = file.stat().st_mtime
    assert complaint(str(file), touched + MAX_AGE_S) is None
    late = complaint(str(file), touched + MAX_AGE_S + 1)
    assert late is not None
    assert "31 s old" in late
    assert complaint(None, 0) is not None


def test_the_health_command_says_so_by_its_exit_code(tmp_path: Path) -> None:
    file = tmp_path / "ready"
    argv = [sys.executable, "-m", "workers.health"]
    env = {**os.environ, "AGENTQ_READY_FILE": str(file)}
    ill = subprocess.run(argv, cwd=CHECKOUT, env=env, capture_output=True, text=True, timeout=30, check=False)
    assert (ill.returncode, ill.stdout) == (1, "")
    assert ill.stderr.startswith("unhealthy: ")
    file.touch()
    assert subprocess.run(argv, cwd=CHECKOUT, env=env, timeout=30, check=False).returncode == 0
