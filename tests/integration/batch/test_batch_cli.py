"""``agentq batch`` as a person uses it, on the real MongoDB; lines end as the test wishes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from openai.types import Batch

from agentq.cli.main import cli
from schemas.batch import run_id
from tests.integration.batch.conftest import Yard, lines, until

CHECKOUT = Path(__file__).resolve().parents[3]
AGENTQ_BATCH = (sys.executable, "-m", "agentq.cli", "batch")
Agentq = Callable[..., Awaitable[Result]]


@pytest.fixture
def env(mongo_url: str, database: str, tmp_path: Path) -> dict[str, str]:
    return {"AGENTQ_MONGO_URL": mongo_url, "AGENTQ_MONGO_DATABASE": database, "AGENTQ_DATA_DIR": str(tmp_path / "data")}


@pytest.fixture
def agentq(yard: Yard, env: dict[str, str]) -> Agentq:
    """Run a command in a thread of its own, so that the yard can work meanwhile; one at a time, since it takes over
    the process's environment and output."""

    async def run(*words: str, code: int = 0, text: bytes | None = None) -> Result:
        done = await asyncio.to_thread(CliRunner(env=env).invoke, cli, ["batch", *words], input=text)
        assert done.exit_code == code, f"{words}: {done.exit_code}\n{done.output}\n{done.exception!r}"
        assert "Traceback" not in done.output
        return done

    return run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "requests.jsonl"
    path.write_bytes(lines(6) + b"{broken\n")
    return path


async def runs_on_disk(yard: Yard) -> bool:
    found = await yard.batches.latest({}, 1)
    return bool(found) and found[0]["status"] == "in_progress"


async def latest(yard: Yard) -> Any:
    return (await yard.batches.latest({}, 1))[0]


def records(done: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


async def test_submit_status_list_watch_and_results(yard: Yard, agentq: Agentq, file: Path) -> None:
    done = await agentq("submit", str(file), "--complete-by", "24h", "--budget", "5")
    batch_id = done.stdout.strip()
    assert "6 requests and 1 bad line," in done.stderr
    again = await agentq("submit", str(file))
    assert again.stdout.strip() == batch_id
    assert "submitted before" in again.stderr
    watching = asyncio.create_task(agentq("watch", batch_id))
    batch = await yard.batch(batch_id)
    for _ in range(2):  # nothing is known of the cost: one line goes first
        await yard.all_through(batch, cost=2_000_000)
    watched = (await watching).stdout
    assert "7 of 7 lines, 1 failed" in watched
    assert "$0.012000 so far" in watched
    shown = (await agentq("status", batch_id)).stdout
    for word in ("completed", "requests.jsonl", "6 succeeded, 1 bad", "budget", "window"):
        assert word in shown, shown
    as_json = json.loads((await agentq("status", batch_id, "--json")).stdout)
    assert (as_json["cost_nano_usd"], as_json["counts"]["succeeded"]) == (12_000_000, 6)
    Batch.model_validate(json.loads((await agentq("status", batch_id, "--openai")).stdout), strict=True)
    assert batch_id in (await agentq("list")).stdout
    assert [one["batch_id"] for one in records(await agentq("list", "--json"))] == [batch_id]
    printed = records(await agentq("results", batch_id))
    assert [one["line"] for one in printed] == list(range(1, 8))
    assert [one["error"] and one["error"]["code"] for one in printed] == [None] * 6 + ["invalid_json"]
    assert sum(one["cost_nano_usd"] for one in printed) == 12_000_000


async def test_results_and_errors_go_to_files_of_their_own(
    yard: Yard, agentq: Agentq, file: Path, tmp_path: Path
) -> None:
    batch_id = (await agentq("submit", str(file))).stdout.strip()
    await yard.all_through(await yard.batch(batch_id))
    good, bad = tmp_path / "out.jsonl", tmp_path / "errors.jsonl"
    for _ in range(2):  # the second time replaces the first
        await agentq("results", batch_id, "--format", "openai", "--output", str(good), "--errors", str(bad))
        assert len(good.read_text().splitlines()) == 6
        (error,) = map(json.loads, bad.read_text().splitlines())
        assert error["error"]["line"] == 7
    assert len(records(await agentq("results", batch_id, "--only", "errors"))) == 1
    assert len(records(await agentq("results", batch_id, "--only", "results"))) == 6


async def test_a_cursor_gives_each_line_once_and_follow_waits_for_the_end(
    yard: Yard, agentq: Agentq, file: Path, env: dict[str, str]
) -> None:
    batch_id = (await agentq("submit", str(file))).stdout.strip()
    batch = await yard.batch(batch_id)
    following = await asyncio.create_subprocess_exec(
        *AGENTQ_BATCH, "results", batch_id, "--follow", cwd=CHECKOUT, env={**os.environ, **env}, stdout=PIPE
    )
    had: list[int] = []
    for some in (2, 1, 3):
        await yard.end(batch, await yard.admit(batch, some))
        await yard.keeper.tick()
        had += [one["line"] for one in records(await agentq("results", batch_id, "--cursor", "ann"))]
    assert sorted(had) == list(range(1, 8))
    assert records(await agentq("results", batch_id, "--cursor", "ann")) == []
    followed = [json.loads(line) for line in (await following.communicate())[0].splitlines()]
    assert following.returncode == 0
    assert [one["line"] for one in followed] == had
    assert [one["n"] for one in followed] == list(range(1, 8))
    rest = await agentq("results", batch_id, "--cursor", "5")
    assert [one["line"] for one in records(rest)] == had[5:]
    assert "--cursor 7" in rest.stderr


async def test_what_a_cursor_gives_is_added_to_the_files(
    yard: Yard, agentq: Agentq, file: Path, tmp_path: Path
) -> None:
    batch_id = (await agentq("submit", str(file))).stdout.strip()
    batch = await yard.batch(batch_id)
    good, bad = tmp_path / "out.jsonl", tmp_path / "errors.jsonl"
    for some in (2, 4, 0):
        await yard.end(batch, await yard.admit(batch, some))
        await yard.keeper.tick()
        await agentq("results", batch_id, "--cursor", "ann", "--output", str(good), "--errors", str(bad))
    had = [json.loads(line)["line"] for path in (good, bad) for line in path.read_text().splitlines()]
    assert sorted(had) == list(range(1, 8))
    await agentq("results", batch_id, "--cursor", "5", "--output", str(good), "--errors", str(good))
    assert len(good.read_text().splitlines()) == 6 + 2


async def test_wishes_for_results_that_make_no_sense_are_refused_and_touch_no_file(
    yard: Yard, agentq: Agentq, file: Path, tmp_path: Path
) -> None:
    batch_id = (await agentq("submit", str(file))).stdout.strip()
    await yard.all_through(await yard.batch(batch_id))
    kept = tmp_path / "kept.jsonl"
    kept.write_text("kept")
    for words, said in (
        (("--output", str(kept), "--only", "errors"), "--errors FILE"),
        (("--errors", str(kept), "--only", "results"), "--output FILE"),
        (("--output", str(kept), "--errors", str(tmp_path / "no" / "e.jsonl")), "No such file or directory"),
        (("--output", str(kept), "--cursor", "999"), "from 0 to 7"),
        (("--output", str(kept), "--cursor", "-5"), "from 0 to 7"),
        (("--output", str(kept), "--cursor", ""), "1 to 100"),
    ):
        assert said in (await agentq("results", batch_id, *words, code=2)).stderr, words
    assert kept.read_text() == "kept"
    assert "7 lines have been read" in (await agentq("results", batch_id, "--cursor", "7")).stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
async def test_a_full_disk_is_said_in_a_sentence_and_the_reader_has_had_nothing(
    yard: Yard, agentq: Agentq, file: Path, env: dict[str, str]
) -> None:
    batch_id = (await agentq("submit", str(file))).stdout.strip()
    await yard.all_through(await yard.batch(batch_id))
    for words in ((), ("--cursor", "ann"), ("--cursor", "ann", "--output", "/dev/full", "--errors", "/dev/null")):
        full = os.open("/dev/full", os.O_WRONLY)
        process = await asyncio.create_subprocess_exec(
            *AGENTQ_BATCH, "results", batch_id, *words, cwd=CHECKOUT, env={**os.environ, **env}, stdout=full,
            stderr=PIPE,
        )  # fmt: skip
        os.close(full)
        said = (await process.communicate())[1].decode()
        assert process.returncode == 1, said
        assert "could not be written: No space left on device" in said
        assert len(said.splitlines()) == 2, said
    assert len(records(await agentq("results", batch_id, "--cursor", "ann"))) == 7


async def test_lines_that_wait_for_a_time_of_their_own_are_no_part_of_the_forecast(
    yard: Yard, agentq: Agentq, tmp_path: Path
) -> None:
    path = tmp_path / "later.jsonl"
    path.write_bytes(lines(2) + lines(1, at="2099-01-01T00:00:00Z").replace(b"m-1", b"later"))
    batch_id = (await agentq("submit", str(path))).stdout.strip()
    await yard.end(await yard.batch(batch_id), await yard.admit(await yard.batch(batch_id), 2))
    await yard.keeper.tick()
    shown = (await agentq("status", batch_id)).stdout
    assert "1 not before its time" in shown
    assert "done in" not in shown


async def test_pause_resume_and_cancel(yard: Yard, agentq: Agentq, file: Path) -> None:
    batch_id = (await agentq("submit", str(file))).stdout.strip()
    batch = await yard.batch(batch_id)
    for _ in range(2):
        await agentq("pause", batch_id)
    assert "paused (person)" in (await agentq("list")).stdout
    assert "agentq batch resume" in (await agentq("status", batch_id)).stdout
    assert await yard.admit(batch) == []
    await agentq("resume", batch_id)
    assert await yard.admit(batch, 1) == [1]
    await agentq("pause", batch_id)
    for _ in range(2):
        await agentq("cancel", batch_id)
    for shown in (await agentq("status", batch_id), await agentq("list")):
        assert "cancelling" in shown.stdout
        assert "paused" not in shown.stdout
        assert "resume" not in shown.stdout
    await yard.keeper.tick()
    await yard.schedule()
    await yard.keeper.tick()
    await yard.keeper.tick()
    assert "6 cancelled, 1 bad" in (await agentq("status", batch_id)).stdout
    for act in ("pause", "resume"):
        assert "is cancelled" in (await agentq(act, batch_id, code=2)).stderr
    assert (await agentq("watch", batch_id, code=1)).stdout.count("\n") <= 4


async def test_a_batch_that_its_budget_stopped_says_so_and_a_higher_one_goes_on(
    yard: Yard, agentq: Agentq, file: Path
) -> None:
    batch_id = (await agentq("submit", str(file), "--budget", "0.000000020")).stdout.strip()
    batch = await yard.batch(batch_id)
    for _ in range(3):
        await yard.end(batch, await yard.admit(batch), cost=9)
        await yard.keeper.tick()
    stopped = (await agentq("watch", batch_id, code=1)).stdout
    assert "paused (budget)" in stopped
    assert f"agentq batch budget {batch_id}" in stopped
    assert "no room" in (await agentq("resume", batch_id, code=2)).stderr
    await agentq("budget", batch_id, "20")
    await yard.all_through(batch, cost=9)
    assert (await yard.batch(batch_id))["status"] == "completed"
    assert (await yard.batch(batch_id))["cost_nano_usd"] == 54


async def test_a_batch_that_a_person_paused_too_goes_on_when_the_person_says_so(
    yard: Yard, agentq: Agentq, file: Path
) -> None:
    batch_id = (await agentq("submit", str(file), "--budget", "0.000000001")).stdout.strip()
    await yard.batches.pause(batch_id, {"by": "budget", "at": yard.store.now()})
    await agentq("pause", batch_id)
    assert f"agentq batch resume {batch_id}" in (await agentq("budget", batch_id, "20")).stdout
    assert await yard.admit(await yard.batch(batch_id)) == []
    await agentq("resume", batch_id)
    assert await yard.admit(await yard.batch(batch_id), 1) == [1]


async def test_watching_a_paused_batch_says_once_how_it_goes_on(
    yard: Yard, agentq: Agentq, file: Path, env: dict[str, str]
) -> None:
    batch_id = (await agentq("submit", str(file))).stdout.strip()
    await agentq("pause", batch_id)
    watching = await asyncio.create_subprocess_exec(
        *AGENTQ_BATCH, "watch", batch_id, cwd=CHECKOUT, env={**os.environ, **env}, stdout=PIPE
    )
    assert watching.stdout is not None
    told = b""
    while b"resume" not in told:
        read = await asyncio.wait_for(watching.stdout.readline(), 60)
        assert read, told
        told += read
    await agentq("resume", batch_id)
    await yard.all_through(await yard.batch(batch_id))
    told += (await watching.communicate())[0]
    assert watching.returncode == 0
    assert told.count(b"resume") == 1, told


async def test_a_list_of_no_batches_says_of_whom(agentq: Agentq, file: Path) -> None:
    assert "No batches yet" in (await agentq("list")).stdout
    await agentq("submit", str(file))
    assert "No batches of tenant 'nobody' yet" in (await agentq("list", "--tenant", "nobody")).stdout


async def test_retry_hands_in_what_failed_as_a_new_batch(yard: Yard, agentq: Agentq, file: Path) -> None:
    batch_id = (await agentq("submit", str(file))).stdout.strip()
    batch = await yard.batch(batch_id)
    assert "is in_progress" in (await agentq("retry", batch_id, code=2)).stderr
    await yard.end(batch, await yard.admit(batch, 4))
    await yard.all_through(batch, status="failed")
    again = (await agentq("retry", batch_id)).stdout.strip()
    assert again == (await agentq("retry", batch_id)).stdout.strip() != batch_id
    new = await yard.batch(again)
    assert (new["retry_of"], new["total"]) == (batch_id, 2)
    await yard.all_through(new)
    printed = records(await agentq("results", again))
    assert [(one["id"], one["status"]) for one in printed] == [("m-5", "succeeded"), ("m-6", "succeeded")]
    assert "no line to retry" in (await agentq("retry", again, code=2)).stderr
    run = await yard.run(new, 1)
    assert run["input"] == "question 5"


async def test_dry_run_tells_what_is_in_the_file_and_stores_nothing(yard: Yard, agentq: Agentq, file: Path) -> None:
    told = (await agentq("submit", str(file), "--dry-run")).stdout
    assert "7 lines: 6 good, 1 bad" in told
    assert "line 7: invalid_json" in told
    assert "not known" in told
    assert await yard.batches.latest({}, 1) == []


async def test_dry_run_estimates_from_earlier_runs_of_the_workflow(yard: Yard, agentq: Agentq, file: Path) -> None:
    batch = (await yard.submit(lines(20))).batch
    await yard.end(batch, (await yard.admit(batch, 16)), cost=1_000_000)
    await yard.all_through(batch, cost=9_000_000)
    facts = json.loads((await agentq("submit", str(file), "--dry-run", "--json")).stdout)
    (one,) = facts["workflows"]
    assert (facts["good"], facts["bad"], facts["first_bad"][0]["line"]) == (6, 1, 7)
    assert (one["low"], one["high"], one["expected"]) == (6_000_000, 54_000_000, 6 * 2_600_000)
    assert (one["input_tokens"], one["output_tokens"]) == (18, 12)
    told = (await agentq("submit", str(file), "--dry-run")).stdout
    for word in ("$0.006000 (P50", "$0.054000 (P90", "20 earlier runs"):
        assert word in told, told


async def test_a_sample_of_lines_is_run_first_where_nothing_is_known(yard: Yard, agentq: Agentq, file: Path) -> None:
    asked = asyncio.create_task(agentq("submit", str(file), "--dry-run", "--sample", "2", "--json"))
    await until(lambda: runs_on_disk(yard))
    sampled = await yard.batches.latest({}, 1)
    await yard.all_through(sampled[0], cost=3_000_000)
    done = await asked
    facts = json.loads(done.stdout)
    assert sampled[0]["total"] == 2
    assert facts["workflows"][0]["expected"] == 18_000_000
    assert (await yard.batches.latest({}, 9)) == [await latest(yard)], "the file itself was not submitted"


async def test_standard_input_is_a_file_too(yard: Yard, agentq: Agentq) -> None:
    batch_id = (await agentq("submit", "-", text=lines(3))).stdout.strip()
    assert (await yard.batch(batch_id))["total"] == 3


async def test_a_pipe_is_a_file_too(yard: Yard, agentq: Agentq, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for words in (("--dry-run",), ()):
        writing = asyncio.create_task(asyncio.to_thread(pipe.write_bytes, lines(3)))
        told = (await agentq("submit", str(pipe), *words)).stdout.strip()
        await writing
        assert words == () or "3 lines: 3 good" in told
    assert (await yard.batch(told))["total"] == 3


async def test_options_that_a_batch_was_not_born_with_are_not_applied_and_that_is_said(
    yard: Yard, agentq: Agentq, file: Path
) -> None:
    born = ("submit", str(file), "--budget", "5", "--complete-by", "2999-01-01T00:00:00+00:00", "--live")
    batch_id = (await agentq(*born, "--webhook", "http://localhost:1/a")).stdout.strip()
    same = await agentq(*born, "--webhook", "http://localhost:1/a")
    assert "not applied" not in same.stderr
    other = ("--budget", "6", "--complete-by", "24h", "--webhook", "http://localhost:1/b")
    done = await agentq("submit", str(file), *other)
    assert done.stdout.strip() == batch_id
    for said in (
        "not applied", f"--budget: it has $5; 'agentq batch budget {batch_id} USD'",
        "--complete-by: it has until 2999-01-01 00:00:00 UTC", "--webhook: others are told", "--again",
    ):  # fmt: skip
        assert said in done.stderr, done.stderr
    assert "--live" not in done.stderr
    as_json = json.loads((await agentq("submit", str(file), *other, "--json")).stdout)
    assert as_json["not_applied"].keys() == {"--budget", "--complete-by", "--webhook"}
    assert (await yard.batch(batch_id))["budget_nano_usd"] == 5_000_000_000
    again = await agentq("submit", str(file), "--again", "--budget", "6")
    assert again.stdout.strip() != batch_id
    assert "not applied" not in again.stderr
    await yard.all_through(await yard.batch(batch_id))


async def test_a_retry_that_is_there_keeps_its_options_and_only_what_it_can_do_is_advised(
    yard: Yard, agentq: Agentq, file: Path
) -> None:
    first = (await agentq("submit", str(file))).stdout.strip()
    await yard.all_through(await yard.batch(first), status="failed")
    batch_id = (await agentq("retry", first, "--budget", "0.01")).stdout.strip()
    done = await agentq("retry", first, "--budget", "5")
    assert f"--budget: it has $0.01; 'agentq batch budget {batch_id} USD' changes that" in done.stderr
    assert "Cancel it" not in done.stderr
    more = await agentq("retry", first, "--live")
    assert f"Cancel it, then 'agentq batch retry {batch_id}'" in more.stderr
    await agentq("budget", batch_id, "5")
    await yard.all_through(await yard.batch(batch_id), status="failed")
    await yard.all_through(await yard.batch(batch_id), status="failed")
    ended = await agentq("retry", first, "--budget", "6")
    assert f"'agentq batch retry {batch_id}' hands in again" in ended.stderr
    for told in (done, more, ended):
        assert "--again" not in told.stderr


async def test_a_file_without_a_good_line_ends_with_code_1_and_the_batch_says_why(
    yard: Yard, agentq: Agentq, tmp_path: Path
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"{broken\n[1]\n")
    done = await agentq("submit", str(path), code=1)
    batch_id = done.stdout.strip()
    assert "0 requests and 2 bad lines" in done.stderr
    assert "nothing runs" in done.stderr
    await yard.keeper.tick()
    await yard.keeper.tick()
    assert (await yard.batch(batch_id))["status"] == "completed"
    watched = await agentq("submit", str(path), "--watch", code=1)
    assert "2 of 2 lines" in watched.stdout
    assert len(records(await agentq("results", batch_id))) == 2


async def test_mistakes_are_said_in_a_sentence_with_code_2(yard: Yard, agentq: Agentq, file: Path) -> None:
    for words, said in (
        (("status", "nope"), "no batch 'nope'"),
        (("cancel", "nope"), "no batch 'nope'"),
        (("results", "nope"), "no batch 'nope'"),
        (("submit", str(file), "--workflow", "nope"), "no workflow 'nope'"),
        (("submit", str(file), "--tenant", "not a name"), "tenant"),
        (("submit", str(file), "--complete-by", "yesterday"), "neither a span nor a time"),
        (("submit", str(file), "--complete-by", "2026-01-01T00:00:00+00:00"), "no time to come"),
        (("submit", str(file), "--complete-by", "0m"), "no time to come"),
        (("submit", str(file), "--complete-by", "2999-01-01T00:00"), "Add the offset: 2999-01-01T00:00:00+00:00"),
        (("submit", str(file), "--complete-by", "99999999d"), "too far away"),
        (("submit", str(file), "--complete-by", "9" * 400 + "d"), "too far away"),
        (("submit", str(file), "--complete-by", "9999-12-31T23:59:59-14:00"), "too far away"),
        (("submit", str(file), "--budget", "-1"), "budget"),
        (("submit", str(file), "--sample", "3"), "--dry-run"),
        (("submit", "missing.jsonl"), "missing.jsonl"),
    ):
        done = await agentq(*words, code=2)
        assert said in done.stderr, words
    assert await yard.batches.latest({}, 1) == []


async def test_an_empty_file_fails_visibly(agentq: Agentq, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    assert "no line in it" in (await agentq("submit", str(tmp_path / "empty.jsonl"), code=1)).stderr


async def test_a_submitter_killed_by_sigkill_is_continued_by_submitting_again(
    yard: Yard, agentq: Agentq, env: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "many.jsonl"
    path.write_bytes(lines(8_000) + b"{broken\n")
    process = await asyncio.create_subprocess_exec(
        *AGENTQ_BATCH, "submit", str(path), cwd=CHECKOUT, env={**os.environ, **env}
    )

    async def begun() -> bool:
        found = await yard.batches.latest({}, 1)
        return bool(found) and found[0]["submitted"]["line"] > 0

    await until(begun)
    process.send_signal(signal.SIGKILL)
    await process.wait()
    half = await latest(yard)
    assert (half["status"], half["submitted"]["line"] < 8_000) == ("validating", True)
    done = await agentq("submit", str(path))
    assert done.stdout.strip() == half["_id"]
    assert "8,000 requests and 1 bad line, went on from line" in done.stderr
    assert "all on disk now" in done.stderr
    assert "--again" not in done.stderr
    batch = await yard.batch(half["_id"])
    assert (batch["status"], batch["submitted"]) == ("in_progress", {"line": 8_001, "good": 8_000, "bad": 1})
    ids = [run["_id"] async for run in yard.store.runs.find({}, {"_id": 1}).sort("_id", 1)]
    assert ids == [run_id(half["_id"], line) for line in range(1, 8_001)]
