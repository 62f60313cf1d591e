"""From the end of a line to the line of an output file, in either format; and a batch as OpenAI describes one. Pure.

Every line that ended gives exactly one of both: a result (``is_error`` False) or an error.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, cast

from agentq.batch.lines import URL
from agentq.engine.tally import line_end, line_error, spent
from schemas.batch import BadLine, BatchDoc, BatchStatus, LineFormat
from schemas.run import RunDoc

Record = dict[str, Any]
_TIMES: tuple[BatchStatus, ...] = (
    "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled",
)  # fmt: skip


def of_line(line: RunDoc | BadLine, form: LineFormat) -> tuple[bool, Record]:
    """Is it an error, and the output line of a line that has ended."""
    if "status" in line:
        return of_run(cast("RunDoc", line), form)
    return of_bad_line(line, form)


def of_run(run: RunDoc, form: LineFormat) -> tuple[bool, Record]:
    """The output line of a run that has ended, and whether it is an error."""
    is_error = run["status"] != "succeeded"
    return is_error, _openai_run(run, is_error) if form == "openai" else _our_run(run, is_error)


def of_bad_line(bad: BadLine, form: LineFormat) -> tuple[bool, Record]:
    """The output line of a line that could not become a run."""
    if form == "openai":
        return True, _openai_record(bad["_id"], bad["custom_id"], None, bad["error"])
    return True, {
        "id": bad["custom_id"],
        "line": bad["line"],
        "run_id": None,
        "status": "refused",
        "cost_nano_usd": 0,
        "cost_usd": 0.0,
        "error": bad["error"],
    }


def _our_run(run: RunDoc, is_error: bool) -> Record:
    result = run["result"]
    answer: Record = {} if result is None or is_error else {
        name: result[name]
        for name in ("answer", "agent", "acceptance", "citations", "tools", "problems")
    }  # fmt: skip
    return {
        "id": run["batch"]["custom_id"],
        "line": run["batch"]["line"],
        "run_id": run["_id"],
        "status": line_end(run),
        **answer,
        "usage": {name: amount for name, amount in run["usage"].items() if name != "cost_nano_usd"},
        "cost_nano_usd": spent(run),
        "cost_usd": spent(run) / 1e9,
        "error": {**line_error(run), "line": run["batch"]["line"]} if is_error else None,
    }


def _openai_run(run: RunDoc, is_error: bool) -> Record:
    custom_id = run["batch"]["custom_id"]
    if is_error:
        error = {**line_error(run), "line": run["batch"]["line"]}
        return _openai_record(run["_id"], custom_id, None, error, _extra(run))
    return _openai_record(run["_id"], custom_id, completion(run), None)


def _openai_record(
    record_id: str, custom_id: str | None, body: Record | None, error: Record | None, extra: Record | None = None
) -> Record:
    answered = {"status_code": 200, "request_id": record_id, "body": body}
    return {
        "id": f"batch_req_{record_id}",
        "custom_id": custom_id,
        "response": None if body is None else answered,
        "error": None if error is None else {name: error.get(name) for name in ("code", "message", "hint", "line")},
        **({"agentq": extra} if extra else {}),
    }


def completion(run: RunDoc) -> Record:
    """A succeeded run as an OpenAI chat completion; what that has no room for stands under ``agentq``."""
    result = run["result"]
    assert result is not None, "a succeeded run has a result"
    asked, made = run["usage"].get("input_tokens", 0), run["usage"].get("output_tokens", 0)
    return {
        "id": f"chatcmpl-{run['_id']}",
        "object": "chat.completion",
        "created": _epoch(run["ended_at"] or run["created_at"]),
        "model": f"agentq/{run['workflow']['name']}",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": result["answer"], "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made},
        "agentq": {**_extra(run), "acceptance": result["acceptance"], "citations": result["citations"]},
    }


def _extra(run: RunDoc) -> Record:
    return {"run_id": run["_id"], "cost_nano_usd": spent(run), "cost_usd": spent(run) / 1e9}


def _epoch(moment: datetime) -> int:
    return int(moment.timestamp())


def _batch_error(error: Record) -> Record:
    return {"code": error["code"], "message": error["message"], "line": None, "param": None}


def paused_by(batch: BatchDoc) -> str | None:
    """Who keeps a batch from starting lines; None where nobody does. One that is being ended has nothing to start."""
    if batch["paused"] is None or batch["status"] not in ("validating", "in_progress"):
        return None
    return batch["paused"]["by"]


def of_batch(batch: BatchDoc) -> Record:
    """A batch as OpenAI's API describes one. The files are named for their batch."""
    counts, usage = batch["counts"], batch["usage"]
    asked, made = usage.get("input_tokens", 0), usage.get("output_tokens", 0)
    window, failed = batch["complete_by"], batch["error"]
    submitted = batch["submitted"]
    return {
        "id": batch["_id"],
        "object": "batch",
        "endpoint": URL,
        "model": f"agentq/{batch['workflow']}",
        "errors": None if failed is None else {"object": "list", "data": [_batch_error(failed)]},
        "input_file_id": f"{batch['_id']}_input",
        "output_file_id": f"{batch['_id']}_output" if counts["succeeded"] else None,
        "error_file_id": f"{batch['_id']}_errors" if batch["entries"] > counts["succeeded"] else None,
        "completion_window": "none" if window is None else f"{round((window - batch['created_at']).total_seconds())}s",
        "status": batch["status"],
        "created_at": _epoch(batch["created_at"]),
        "expires_at": None if window is None else _epoch(window),
        **{f"{name}_at": _epoch(batch["at"][name]) if name in batch["at"] else None for name in _TIMES},
        "request_counts": {
            "total": submitted["good"] + submitted["bad"] if batch["total"] is None else batch["total"],
            "completed": counts["succeeded"],
            "failed": batch["entries"] - counts["succeeded"],
        },
        "usage": {
            "input_tokens": asked,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": made,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": asked + made,
        },
        "metadata": None,
        "agentq": {
            "cost_nano_usd": batch["cost_nano_usd"],
            "cost_usd": batch["cost_nano_usd"] / 1e9,
            "counts": dict(counts),
            "paused": paused_by(batch),
            "retry_of": batch["retry_of"],
        },
    }  # fmt: skip
