"""A large batch while the submitter, all workers, the broker and MongoDB are killed, each once.

5,000 lines, or FAULT_LINES of them; FAULT_SEED repeats a choice of moments. What the model server saw is the truth
about money, since no fault reaches it: each call that it was asked for costs the same.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from pymongo.errors import PyMongoError

from agentq.embedded.process import kill_process
from agentq.engine.tally import lost_estimate
from schemas.batch import run_id
from tests.fault.model import ScriptedServer
from tests.fault.system import CHECKOUT, System, eventually
from tests.fault.verdict import CALLS_OF_A_RUN, COST_OF_A_CALL

LINES = int(os.environ.get("FAULT_LINES", "5000"))
SEED = int(os.environ.get("FAULT_SEED") or random.randrange(1_000_000))
pytestmark = [pytest.mark.servers, pytest.mark.timeout(300 + LINES // 2)]
WORKERS = ("worker-1", "worker-2")
# The real submitter, but a chunk is a fiftieth of the file: so there is a half-way at any size.
SUBMIT = (
    f"import agentq.batch.submit; agentq.batch.submit.CHUNK_LINES = {max(1, LINES // 50)}\n"
    "from agentq.cli.main import cli; cli(prog_name='agentq')"
)


class Small(System):
    """Its workers hold a tenth of the batch at most, so that it lasts beyond each kill."""

    def _env(self, name: str, failpoint: str | None) -> dict[str, str]:
        return super()._env(name, failpoint) | {"AGENTQ_STEPS_IN_FLIGHT": str(min(256, max(4, LINES // 20)))}


@pytest.fixture
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with ScriptedServer(0.05) as model:
        system = Small(tmp_path_factory.mktemp("batch"), model)
        system.start()
        yield system
        system.stop()


class Batch:
    """The batch as MongoDB has it. While that is away, nothing is known."""

    def __init__(self, system: System) -> None:
        self.db = system.mongo["agentq"]

    def now(self) -> dict[str, Any]:
        try:
            return self.db["batches"].find_one({}) or {}
        except PyMongoError:
            return {}

    def submitted(self) -> int:
        return int(self.now().get("submitted", {}).get("line", 0))

    def entries(self) -> int:
        return int(self.now().get("entries", 0))

    def settled(self) -> bool:
        """It has ended, and no worker has anything to add to what its lines cost."""
        runs = self.db["runs"]
        return (
            self.now().get("status") == "completed"
            and runs.count_documents({"tally": True}) == 0
            and runs.count_documents({"next_due": {"$type": "date"}}) == 0
        )


class Reader:
    """``with Reader(system, batch_id) as reader``: reads results from where it stands, over and over, through every
    outage; ``had`` are the lines in the order in which they came."""

    def __init__(self, system: System, batch_id: str) -> None:
        self._system, self._id = system, batch_id
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read, name="reader")
        self.had: list[dict[str, Any]] = []
        self.failures = 0

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(100)

    def _read(self) -> None:
        while not self._over.wait(2):
            self.read()
        self.read()

    def read(self) -> None:
        done = agentq(self._system, "results", self._id, "--cursor", str(len(self.had)))
        self.failures += done.returncode != 0
        self.had += map(json.loads, done.stdout.splitlines())


def agentq(system: System, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agentq.cli", "batch", *words], cwd=CHECKOUT, env=system._env("cli", None),
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip


def killed_half_way(system: System, batch: Batch, file: str) -> int:
    """SIGKILL to a submitter when half of the lines are on disk; how many were then."""
    with subprocess.Popen(
        [sys.executable, "-c", SUBMIT, "batch", "submit", file], cwd=CHECKOUT, env=system._env("submitter", None),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as submitter:  # fmt: skip
        eventually(lambda: batch.submitted() >= LINES // 2, "half of the lines are on disk")
        submitter.kill()
        assert submitter.wait(10) == -signal.SIGKILL, "it was still at it"
    assert (batch.now()["status"], batch.entries()) == ("validating", 0), "nothing runs before all is on disk"
    return batch.submitted()


def kill_each_once(system: System, batch: Batch, rng: random.Random) -> list[str]:
    """All workers at once, the broker and MongoDB, at moments spread over the batch and in any order; what was done."""

    def workers() -> None:
        dying = [system.processes.pop(name) for name in WORKERS]
        for process in dying:  # all of them before anybody waits for one
            process.kill()
        for process in dying:
            kill_process(process)
        for name in WORKERS:
            system.worker(name)

    acts = [("workers", workers), ("mongod", system.restart_mongod)]
    acts.append(rng.choice([("broker, kept", system.restart_broker), ("broker, empty", system.lose_broker)]))
    rng.shuffle(acts)
    done = []
    for place, (name, act) in enumerate(acts):
        moment = round(LINES * (0.1 + 0.25 * place + rng.uniform(0.0, 0.15)))
        eventually(lambda moment=moment: batch.entries() >= moment, f"{moment} lines are counted", 60 + LINES / 5)  # type: ignore[misc]
        done.append(f"{name} at {batch.entries()}")
        assert batch.entries() < LINES, "it is not over before all have been killed"
        act()
    return done


def test_whatever_is_killed_each_line_has_one_result_and_the_cost_is_exact(system: System) -> None:
    rng, batch = random.Random(SEED), Batch(system)
    file = system.directory / "requests.jsonl"
    file.write_text("".join(json.dumps({"id": f"m-{n}", "input": "pay A"}) + "\n" for n in range(1, LINES + 1)))
    for name in WORKERS:
        system.worker(name)
    half = killed_half_way(system, batch, str(file))
    assert 0 < half < LINES
    batch_id = agentq(system, "submit", str(file)).stdout.strip()
    assert (batch_id, batch.submitted()) == (batch.now()["_id"], LINES), "the same batch, gone on with"
    with Reader(system, batch_id) as reader:
        done = kill_each_once(system, batch, rng)
        eventually(batch.settled, "the batch has ended", 120 + LINES / 5)
    assert [line["n"] for line in reader.had] == list(range(1, LINES + 1))
    assert sorted(line["line"] for line in reader.had) == list(range(1, LINES + 1)), "each line once"
    results = list(map(json.loads, agentq(system, "results", batch_id).stdout.splitlines()))
    assert [line["line"] for line in results] == list(range(1, LINES + 1))
    assert Counter(line["status"] for line in results) == {"succeeded": LINES}
    assert batch.now()["counts"] == {"succeeded": LINES, "failed": 0, "cancelled": 0, "expired": 0, "bad": 0}
    assert system.mongo["agentq"]["batches"].count_documents({}) == 1
    paid_once(system, batch_id)
    money = exact_to_the_nano_dollar(system, batch.now(), results)
    print(f"\nseed {SEED}: submitter at {half}, {', '.join(done)}; reader failed {reader.failures} times; {money}")


def paid_once(system: System, batch_id: str) -> None:
    """No side effect is doubled, and none is missing."""
    payments = Counter(key.split(":")[0] for key in system.model.bank.payments)
    assert payments == {run_id(batch_id, line): 1 for line in range(1, LINES + 1)}


def exact_to_the_nano_dollar(system: System, batch: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """Every call whose answer reached a process of ours is in the cost, each once. Those that died with their worker
    nobody can know of: each is on record as lost, and together they may have cost what the batch says."""
    db = system.mongo["agentq"]
    calls: Counter[str] = Counter()
    for key, count in system.model.calls.items():
        calls[key.split(":")[0]] += count
    unheard = 0
    for run in db["runs"].find({}, {"usage": 1, "waste": 1}):
        usage, waste = run["usage"], run["waste"]
        assert (usage["llm_calls"], usage["cost_nano_usd"]) == (CALLS_OF_A_RUN, CALLS_OF_A_RUN * COST_OF_A_CALL)
        late = waste.get("llm_calls", 0)
        assert waste.get("cost_nano_usd", 0) == late * COST_OF_A_CALL
        missing = calls[run["_id"]] - CALLS_OF_A_RUN - late
        assert 0 <= missing <= waste.get("lost_llm_calls", 0), (run, calls[run["_id"]])
        unheard += missing
    lost = Counter(f"{event['run']}:{event['step']}" for event in db["audit"].find({"type": "step.lost"}))
    repeated = {key: count - 1 for key, count in system.model.calls.items() if count > 1}
    assert {key: more for key, more in repeated.items() if more > lost[key]} == {}, (
        "each call beyond the first has a loss"
    )
    paid = sum(system.model.calls.values()) * COST_OF_A_CALL
    cost = batch["cost_nano_usd"]
    assert cost == sum(line["cost_nano_usd"] for line in results) == paid - unheard * COST_OF_A_CALL
    assert cost <= paid <= cost + lost_estimate(batch)
    return (
        f"{sum(system.model.calls.values())} calls paid, ${paid / 1e9:.6f}; booked ${cost / 1e9:.6f}, of which "
        f"${batch['waste_nano_usd'] / 1e9:.6f} came late; {unheard} calls unheard of, "
        f"{batch['usage'].get('lost_llm_calls', 0)} on record as lost, at most ${lost_estimate(batch) / 1e9:.6f}"
    )
