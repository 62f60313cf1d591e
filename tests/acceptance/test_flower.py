"""Flower beside the running system: it shows the queues, the workers and the tasks by their names."""

from __future__ import annotations

from agentq.client import Client
from agentq.protocol import INTAKE_QUEUE, POOLS
from tests.acceptance.running import Running, until
from workers.queues import DEAD_QUEUE


def test_flower_shows_a_worker_and_a_queue_for_each_pool(running: Running) -> None:
    def workers() -> dict[str, list[str]]:
        found = running.flower_json("/api/workers?refresh=1")
        return {name.split("@")[0]: [q["name"] for q in one.get("active_queues", [])] for name, one in found.items()}

    intake = [INTAKE_QUEUE] if running.on_redis else [INTAKE_QUEUE, DEAD_QUEUE]
    expected = {pool: [pool] for pool in POOLS} | {"router": sorted(["router", *intake])}
    until(lambda: {name: sorted(queues) for name, queues in workers().items()} == expected, "a worker for each pool")
    if running.on_redis:  # of RabbitMQ it asks the management plugin, which the embedded server does without
        lengths = {queue["name"] for queue in running.flower_json("/api/queues/length")["active_queues"]}
        assert set(POOLS) <= lengths


def test_flower_shows_the_tasks_of_a_run(running: Running, client: Client) -> None:
    client.submit("Do you ship to Canada, and what does that cost?", workflow="support_desk").wait(60)
    wanted = {f"agentq.{pool}" for pool in POOLS}

    def seen() -> set[str]:
        tasks = running.flower_json("/api/tasks?limit=10000").values()
        return {task["name"] for task in tasks if task["state"] == "SUCCESS"}

    until(lambda: wanted <= seen(), f"Flower shows {sorted(wanted)}")


def test_flower_listens_on_loopback_and_controls_nothing(running: Running) -> None:
    assert running.settings["flower_url"].startswith("http://127.0.0.1:")
