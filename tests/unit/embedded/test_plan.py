"""What is started under which settings. The servers' binaries are stand-ins on PATH; nothing is run."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from agentq.embedded import binaries
from agentq.embedded.plan import Plan, make_plan
from agentq.embedded.record import StackLock
from agentq.embedded.servers import complaints
from agentq.embedded.supervisor import Component
from agentq.errors import ConfigError
from config.settings import load_settings

POOLS = ["router", "specialist", "critic", "tools"]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH on which redis-server and mongod are found."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("redis-server", "mongod"):
        (folder / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(folder))
    return folder


def plan_for(folder: Path, **settings: object) -> Plan:
    return make_plan(load_settings(data_dir=folder / "data", **settings))


def names(plan: Plan) -> list[str]:
    return [component.name for component in plan.components]


def named(plan: Plan, name: str) -> Component:
    return next(component for component in plan.components if component.name == name)


def test_by_default_everything_is_started_here(tmp_path: Path, path: Path) -> None:
    plan = plan_for(tmp_path)
    assert names(plan) == ["redis", "mongodb", "model", *POOLS, "scheduler", "flower"]
    assert named(plan, "redis").argv[0] == str(path / "redis-server"), "a binary on PATH comes first"
    assert plan.settings["openai_base_url"] == plan.settings["anthropic_base_url"] + "/v1"
    for pool in POOLS:
        assert named(plan, pool).needs == ("redis", "mongodb", "model")


def test_the_router_serves_the_intake_of_foreign_applications(tmp_path: Path, path: Path) -> None:
    plan = plan_for(tmp_path)
    argv = list(named(plan, "router").argv)
    assert argv[argv.index("-Q") + 1] == "router,agentq"
    argv = list(named(plan, "critic").argv)
    assert argv[argv.index("-Q") + 1] == "critic"


def test_workers_learn_the_addresses_from_their_environment(tmp_path: Path, path: Path) -> None:
    app_dir = tmp_path / "app"
    app_dir.mkdir()
    (app_dir / "models.yaml").write_text("models: {}\n")
    plan = plan_for(tmp_path, app_dir=app_dir, mongo_database="other")
    env = named(plan, "specialist").env
    assert env["AGENTQ_BROKER_URL"] == plan.settings["broker_url"]
    assert env["AGENTQ_MONGO_URL"] == plan.settings["mongo_url"]
    assert env["AGENTQ_MONGO_DATABASE"] == "other"
    assert env["AGENTQ_APP_DIR"] == str(app_dir)
    assert env["AGENTQ_READY_FILE"] == str(named(plan, "specialist").ready_file)
    assert env["AGENTQ_READY_FILE"] != named(plan, "critic").env["AGENTQ_READY_FILE"]


def test_named_servers_take_the_place_of_embedded_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(binaries.importlib.util, "find_spec", lambda _name: None)  # type: ignore[attr-defined]
    plan = plan_for(tmp_path, mongo_url="mongodb://far/?replicaSet=x", broker_url="redis://:pw@far:6379/0")
    assert names(plan) == ["model", *POOLS, "scheduler", "flower"]
    assert plan.settings["mongo_url"] == "mongodb://far/?replicaSet=x"
    assert named(plan, "router").env["AGENTQ_BROKER_URL"] == "redis://:pw@far:6379/0"


@pytest.mark.parametrize(
    "provider",
    [
        {"openai_api_key": "sk-x"},
        {"openai_base_url": "http://127.0.0.1:9/v1"},
        {"anthropic_api_key": "sk-x"},
        {"anthropic_base_url": "http://127.0.0.1:9"},
    ],
)
def test_a_real_provider_takes_the_place_of_the_model_server(
    tmp_path: Path, path: Path, provider: dict[str, str]
) -> None:
    plan = plan_for(tmp_path, **provider)
    assert "model" not in names(plan)
    assert "openai_base_url" not in plan.settings


def test_ports_are_kept_where_given(tmp_path: Path, path: Path) -> None:
    plan = plan_for(tmp_path, redis_port=7001, mongo_port=7002, model_port=7003, flower_port=7004)
    addresses = {component.name: component.address for component in plan.components if component.address}
    assert addresses == {
        "redis": "127.0.0.1:7001",
        "mongodb": "127.0.0.1:7002",
        "model": "http://127.0.0.1:7003",
        "flower": "http://127.0.0.1:7004",
    }


def test_flower_listens_on_loopback_controls_nothing_and_may_fail(tmp_path: Path, path: Path) -> None:
    flower = named(plan_for(tmp_path), "flower")
    assert {"--address=127.0.0.1", "--read_only=True", "--persistent=False"} <= set(flower.argv)
    assert flower.env["FLOWER_UNAUTHENTICATED_API"] == "true"
    assert not flower.essential
    assert "flower" not in names(plan_for(tmp_path, flower=False))


def test_the_redis_password_is_random_kept_and_on_no_command_line(tmp_path: Path, path: Path) -> None:
    plan = plan_for(tmp_path)
    file = tmp_path / "data" / "redis.password"
    password = file.read_text().strip()
    assert len(password) >= 32
    assert file.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "data" / "redis" / "redis.conf").stat().st_mode & 0o777 == 0o600
    assert f":{password}@" in plan.settings["broker_url"]
    for component in plan.components:
        assert not any(password in word for word in component.argv), component.name
        assert password not in component.address
    assert plan_for(tmp_path).settings["broker_url"].split("@")[0] == plan.settings["broker_url"].split("@")[0]


def test_the_servers_are_hardened(tmp_path: Path, path: Path) -> None:
    plan = plan_for(tmp_path)
    conf = (tmp_path / "data" / "redis" / "redis.conf").read_text().splitlines()
    assert {"bind 127.0.0.1", "appendonly yes", "maxmemory-policy noeviction", 'save ""'} <= set(conf)
    argv = " ".join(named(plan, "mongodb").argv)
    assert "--bind_ip 127.0.0.1" in argv
    assert "--networkMessageCompressors disabled" in argv
    assert "--replSet agentq" in argv


def test_they_stop_in_an_order_in_which_nobody_loses_what_it_needs(tmp_path: Path, path: Path) -> None:
    order = {component.name: component.stop_order for component in plan_for(tmp_path).components}
    assert order["flower"] < order["router"] == order["tools"] < order["scheduler"]
    assert order["scheduler"] < order["model"] < order["redis"] < order["mongodb"]


@pytest.mark.parametrize(
    ("find", "setting"),
    [(binaries.find_redis_server, "AGENTQ_BROKER_URL"), (binaries.find_mongod, "AGENTQ_MONGO_URL")],
)
def test_without_a_binary_one_sentence_says_what_to_do(
    find: object, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(binaries.importlib.util, "find_spec", lambda _name: None)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError) as caught:
        find()  # type: ignore[operator]
    said = str(caught.value)
    assert "agentq[embedded]" in said
    assert "docker/compose.yaml" in said
    assert setting in said


def test_a_mongod_log_is_told_in_plain_words(tmp_path: Path) -> None:
    log = tmp_path / "mongodb.log"
    entries = [
        {"t": {"$date": "x"}, "s": "I", "msg": "Listening"},
        {"t": {"$date": "x"}, "s": "E", "msg": "terminating", "attr": {"error": "DBPathInUse"}},
        {"t": {"$date": "x"}, "s": "I", "msg": "Now exiting"},
    ]
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"t": cut')
    assert complaints(log) == "terminating: DBPathInUse"


def test_what_another_stack_lends_is_not_taken_for_a_setting(tmp_path: Path, path: Path) -> None:
    """Else `agentq up`, typed while an earlier one is stopping, would use servers that are about to be gone."""
    lock = StackLock(tmp_path / "data")
    lent = {"mongo_url": "mongodb://old", "broker_url": "redis://old", "openai_base_url": "http://old/v1"}
    lock.publish(lent, [], datetime(2026, 11, 21, tzinfo=UTC))
    settings = load_settings(data_dir=tmp_path / "data")
    assert settings.mongo_url is not None, "commands see the running stack"
    lock.release()
    plan = make_plan(settings)
    assert names(plan)[:3] == ["redis", "mongodb", "model"]
    assert not any("old" in value for value in named(plan, "router").env.values())


def test_every_setting_that_is_set_reaches_the_workers(tmp_path: Path, path: Path) -> None:
    """They run in the checkout and see neither the command line nor the files in the user's directory."""
    env = named(plan_for(tmp_path, lease_s=7, task_events=False, log_level="DEBUG", openai_api_key="sk-1"), "tools").env
    assert env["AGENTQ_LEASE_S"] == "7.0"
    assert env["AGENTQ_TASK_EVENTS"] == "False"
    assert env["AGENTQ_OPENAI_API_KEY"] == "sk-1"
    again = load_settings(environ=dict(env), cwd=tmp_path)
    assert (again.lease_s, again.task_events, again.log_level) == (7.0, False, "DEBUG")
    assert "AGENTQ_MAX_ATTEMPTS" not in env, "defaults are the workers' own"
