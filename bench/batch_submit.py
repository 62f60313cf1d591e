"""How fast lines become durable runs, and what memory that takes: ``python -m bench.batch_submit [LINES ...]``.

For each number of lines (default: 10,000 and 100,000) a fresh process submits a file of that many requests of about 300
bytes to an embedded mongod of its own; prints seconds, lines a second, the CPU seconds of the submitter and of mongod,
and the submitter's greatest resident set.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from agentq.batch.submit import Order, submit_file
from agentq.embedded.servers import start_mongod
from agentq.store.mongo import MongoStore
from config.catalog import load_catalog

CHECKOUT = Path(__file__).resolve().parents[1]


def write_file(path: Path, lines: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number in range(lines):
            text = f"Where is my order LF-{number}? " + "It was promised for last week and nobody answers. " * 4
            file.write(json.dumps({"id": f"mail-{number}", "input": text, "user": f"c-{number % 997}"}) + "\n")


async def submit(url: str, path: Path) -> dict[str, Any]:
    store = MongoStore(url, "bench_batch")
    await store.open()
    await store.register(list(load_catalog([CHECKOUT / "config"]).bundles.values()))
    began, cpu_before = time.monotonic(), cpu_s(os.getpid())
    with path.open("rb") as file:
        done = await submit_file(store.batches, store.now, file, path.name, Order())
    seconds = time.monotonic() - began
    await store.close()
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "good": done.batch["submitted"]["good"],
        "seconds": seconds,
        "cpu_s": cpu_s(os.getpid()) - cpu_before,
        "rss_mb": used.ru_maxrss / 1024,
    }


def cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(asyncio.run(submit(sys.argv[2], Path(sys.argv[3])))))
        return 0
    sizes = [int(word.replace(",", "")) for word in sys.argv[1:]] or [10_000, 100_000]
    with tempfile.TemporaryDirectory() as folder, start_mongod(Path(folder) / "mongodb") as mongod:
        for size in sizes:
            path = Path(folder) / f"{size}.jsonl"
            write_file(path, size)
            argv = [sys.executable, "-m", "bench.batch_submit", "--child", mongod.url, str(path)]
            before = cpu_s(mongod.pid)
            said = subprocess.run(argv, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
            told = json.loads(said)
            assert told["good"] == size, told
            rate = size / told["seconds"]
            print(
                f"{size:>9,} lines  {told['seconds']:6.1f} s  {rate:7,.0f} lines/s  CPU {told['cpu_s']:5.1f} s here, "
                f"{cpu_s(mongod.pid) - before:5.1f} s in mongod  {told['rss_mb']:5.0f} MB RSS"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
