"""The lines of an ended batch that did not succeed, as lines to hand in again."""

from __future__ import annotations

import json
from typing import Any, BinaryIO

from agentq.errors import Conflict
from agentq.store.batches import Batches
from schemas.batch import ENDED, BatchDoc
from schemas.run import RunDoc


async def write_failed(batches: Batches, batch: BatchDoc, file: BinaryIO) -> int:
    """Write a line for each that failed, was cancelled or expired, in our format and with its old id; how many.

    The same batch gives the same bytes, so submitting them again goes on with the same retry. Lines that could not be
    read are not among them: they have to be mended in the file. Raises ``Conflict`` where the batch has not ended or
    there is nothing to retry.
    """
    if batch["status"] not in ENDED:
        raise Conflict(
            f"Batch {batch['_id']} is {batch['status']}.", hint="Retry it when it has ended, or cancel it first."
        )
    count = 0
    async for run in batches.runs_of(batch["_id"]):
        if run["status"] in ("failed", "cancelled", "rejected"):
            file.write(json.dumps(line_of(run)).encode() + b"\n")
            count += 1
    if count == 0:
        bad = batch["counts"]["bad"]
        hint = f"{bad} of its lines could not be read: mend the file and submit it." if bad else "Every line succeeded."
        raise Conflict(f"Batch {batch['_id']} has no line to retry.", hint=hint)
    return count


def line_of(run: RunDoc) -> dict[str, Any]:
    """The request of a run as a line of our format. Times relative to its acceptance are not kept."""
    budget = run["budget_nano_usd"]
    asked = {
        "id": run["batch"]["custom_id"],
        "input": run["input"],
        "workflow": run["workflow"]["name"],
        "user": run["user"],
        "priority": run["priority"],
        "budget_usd": None if budget is None else budget / 1e9,
        "metadata": run["metadata"] or None,
    }
    return {name: value for name, value in asked.items() if value is not None}
