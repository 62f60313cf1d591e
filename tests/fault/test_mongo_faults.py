"""MongoDB hangs, dies, fails over and runs out of disk: what was acknowledged stays, the rest is refused."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agentq.client import Client
from agentq.errors import Unavailable
from tests.fault.conftest import judged
from tests.fault.load import Load
from tests.fault.plant import Plant
from tests.fault.system import eventually

pytestmark = [pytest.mark.servers, pytest.mark.timeout(240)]

KILLS = 5
DISK_MB = 420  # mongod keeps two journal files of 100 MB ready


def test_a_replica_set_whose_primary_is_killed_again_and_again_loses_nothing(make_plant: Callable[..., Plant]) -> None:
    """Five primaries die under load: no accepted run is lost, none is stored twice, all end well."""
    plant = make_plant(replica_set=True)
    assert plant.replicas is not None
    for number in range(2):
        plant.worker(f"worker-{number}")
    with plant.client() as client, Load(client, rate=30) as load:
        for _ in range(KILLS):
            before = len(load.accepted)
            eventually(lambda: len(load.accepted) > before + 30, "requests are accepted")  # noqa: B023 - awaited here
            primary = plant.replicas.primary()
            plant.replicas.kill(primary)
            plant.replicas.primary()
            plant.replicas.restart(primary)
            eventually(plant.replicas.healthy, "three members agree")
    verdict = judged(plant, load.accepted)
    assert verdict.accepted > KILLS * 30


def test_without_a_majority_nothing_is_accepted_and_with_it_everything_goes_on(
    make_plant: Callable[..., Plant],
) -> None:
    plant = make_plant(replica_set=True)
    assert plant.replicas is not None
    plant.worker("worker")
    with plant.client() as client:
        before = [client.submit("pay A").run_id for _ in range(20)]
        primary = plant.replicas.primary()
        others = [member for member in range(3) if member != primary]
        for member in others:
            plant.replicas.kill(member)
        with pytest.raises(Unavailable):
            client.submit("pay A", idempotency_key="refused")
        for member in others:
            plant.replicas.restart(member)
        again = client.submit("pay A", idempotency_key="refused")  # whether or not it was stored the first time
        judged(plant, [*before, again.run_id])


def test_workers_outlive_every_kind_of_broken_connection_to_mongodb(plant: Plant) -> None:
    """Reset, cut, slow, silent, refused, half-open, and mongod killed: leases may be lost, nothing else."""
    for number in range(2):
        plant.worker(f"worker-{number}")
    proxy, pause = plant.mongo_proxy, threading.Event()
    with plant.client() as client, Load(client, rate=15) as load:
        for fault in (
            proxy.reset, lambda: proxy.cut_after(3_000), lambda: proxy.latency(0.05), proxy.black_hole, proxy.refuse,
            proxy.half_open, plant.restart_mongod,
        ):  # fmt: skip
            fault()
            pause.wait(2)
            proxy.heal()
            pause.wait(0.5)
    judged(plant, load.accepted)


def test_a_broken_connection_to_a_model_costs_only_the_calls_that_were_on_it(plant: Plant) -> None:
    """Every extra call has its failed attempt in the audit, and no lease is lost."""
    for number in range(2):
        plant.worker(f"worker-{number}")
    proxy, pause = plant.model_proxy, threading.Event()
    with plant.client() as client, Load(client, rate=15) as load:
        for fault in (
            proxy.reset, lambda: proxy.cut_after(100), lambda: proxy.latency(0.05), proxy.black_hole, proxy.refuse,
            proxy.half_open,
        ):  # fmt: skip
            fault()
            pause.wait(1.5)
            proxy.heal()
            pause.wait(0.5)
    verdict = judged(plant, load.accepted, excused=lambda _worker, _at: False)
    assert verdict.failed_attempts > 0
    assert verdict.extra_calls <= verdict.failed_attempts


# ----------------------------------------------------------------------------------------------------------- disk full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, small enough to fill."""
    place = tmp_path / "small-disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"a full disk needs the right to mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def _fill(place: Path) -> Path:
    """A file that takes all the space there is."""
    ballast = place / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 65_536)
        except OSError:
            return ballast


def test_a_full_disk_refuses_requests_and_loses_none_that_was_accepted(
    small_disk: Path, make_plant: Callable[..., Plant]
) -> None:
    """When there is space again (and mongod, which gives up without, is started again) everything goes on."""
    plant = make_plant(mongo_directory=small_disk / "mongodb")
    plant.worker("worker")
    with plant.client() as client:
        accepted = [client.submit("pay A").run_id for _ in range(50)]
        ballast = _fill(small_disk)
        accepted += _until_refused(client)
        ballast.unlink()
        if not plant.mongod.alive():
            plant.restart_mongod()
        accepted.append(client.submit("pay A").run_id)
        stored = {run["_id"] for run in plant.mongo["agentq"]["runs"].find({}, {"_id": 1})}
        assert stored >= set(accepted), "an accepted run is gone"
        assert len(stored - set(accepted)) <= 1, "only the refused request may be stored all the same"
        judged(plant, stored)


def _until_refused(client: Client) -> list[str]:
    """Requests until one is refused; the ids of those that were not."""
    accepted, deadline = [], time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            accepted.append(client.submit("pay " + "A" * 5_000).run_id)
        except Unavailable:
            return accepted
    raise AssertionError(f"{len(accepted)} requests were accepted on a full disk")
