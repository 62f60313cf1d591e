"""How long a step is left alone when the process that worked on it dies or freezes.

Recovery time: from the SIGKILL or SIGSTOP to the moment at which the step is leased again under another token, or is
closed. Every step is measured that the process held a lease on when it happened; who holds what is read from the runs
themselves, four times a second. Steps that wait for a person afterwards, and those of runs that were cancelled, are
left out.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from pymongo.errors import PyMongoError

Doc = dict[str, Any]
POLL_S = 0.2
Key = tuple[str, str]


class Recovery:
    """``with Recovery(runs) as recovery``: tell it of every death and freeze with ``happened``; ``times`` grows."""

    def __init__(self, runs: Any) -> None:
        self._runs = runs
        self._happened: list[tuple[int, float]] = []
        self._open: dict[Key, tuple[str, float]] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.times: list[float] = []

    def __enter__(self) -> Recovery:
        self._thread = threading.Thread(target=self._watch, name="recovery", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(20)

    def happened(self, pid: int, at: float | None = None) -> None:
        """The process ``pid`` was killed or frozen at ``at`` (epoch seconds; now if not given)."""
        with self._lock:
            self._happened.append((pid, time.time() if at is None else at))

    def outstanding(self) -> int:
        with self._lock:
            return len(self._open) + len(self._happened)

    def _watch(self) -> None:
        while not self._stop.wait(POLL_S):
            try:
                self._note_affected()
                self._note_recovered()
            except PyMongoError:
                continue  # MongoDB is away, so nobody can take a step either

    def _note_affected(self) -> None:
        with self._lock:
            new = list(self._happened)
        if not new:
            return
        live = list(self._runs.find({"next_due": {"$type": "date"}}, {"leases": 1}).hint("due"))
        with self._lock:
            for pid, at in new:
                for run in live:
                    for step_id, lease in run["leases"].items():
                        if lease["worker"].endswith(f":{pid}"):
                            self._open.setdefault((run["_id"], step_id), (lease["token"], at))
            self._happened = self._happened[len(new) :]

    def _note_recovered(self) -> None:
        with self._lock:
            open_ = dict(self._open)
        if not open_:
            return
        ids = list({run_id for run_id, _ in open_})
        fields = {"leases": 1, "steps": 1, "status": 1}
        runs = {run["_id"]: run for run in self._runs.find({"_id": {"$in": ids}}, fields)}
        now = time.time()
        with self._lock:
            for key, (token, since) in open_.items():
                state = _state(runs[key[0]], key[1], token)
                if state != "waits":
                    del self._open[key]
                if state == "recovered":
                    self.times.append(now - since)


def _state(run: Doc, step_id: str, token: str) -> str:
    if run["status"] == "cancelled":
        return "left out"
    step, lease = run["steps"].get(step_id), run["leases"].get(step_id)
    if step is not None and "held" in step:
        return "left out"
    if step is None or (lease is not None and lease["token"] != token):
        return "recovered"
    return "waits"


def percentile(values: list[float], share: float) -> float:
    """The value below which ``share`` of the values lie; 0 without any."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
