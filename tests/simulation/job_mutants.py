"""Deliberate bugs in what joins calls into jobs of a provider's batch endpoint; see ``mutants``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

from agentq.engine import advance, commit, joining, recovery
from agentq.engine.commit import Commit
from agentq.engine.decision import Decision, Deferred
from agentq.engine.joining import Back
from agentq.errors import ProviderError
from agentq.runtime import runtime
from agentq.runtime.answers import Answers
from agentq.runtime.joiner import Joiner
from agentq.store.api import Verdict
from agentq.store.jobs import LEASE
from agentq.store.memory import MemoryStore
from agentq.store.memory_jobs import MemoryJobs
from schemas.job import JobDoc, Place
from schemas.llm import LlmCall
from schemas.run import RunDoc
from tests.simulation.mutants import Patch

_back, _release, _settle, _deferral = joining.back, joining.release, joining.settle, joining.deferral
_send, _put_off = Joiner._send, Joiner._put_off
_note, _book_waste = MemoryJobs.note, MemoryStore.book_waste


def a_job_is_handed_in_again_unlooked() -> Patch:
    """After a crash in handing it in, nobody asks the provider whether it has the job."""

    async def again(self: Joiner, job: JobDoc) -> None:
        await self._send(job)

    return mock.patch.object(Joiner, "_find_or_send", again)


def late_answers_are_booked_without_guard() -> Patch:
    """Answers that are read twice are booked twice."""

    async def book(self: MemoryStore, run_id: str, token: str, waste: dict[str, int]) -> None:
        self.runs[run_id]["late"] = [one for one in self.runs[run_id].get("late", []) if not one.startswith("job_")]
        await _book_waste(self, run_id, token, waste)

    return mock.patch.object(MemoryStore, "book_waste", book)


def an_answer_that_is_in_is_booked_as_late() -> Patch:
    async def never(self: Answers, run: RunDoc, place: Place, job_id: str) -> bool:
        return False

    return mock.patch.object(Answers, "_is_in", never)


def a_job_takes_calls_from_others() -> Patch:
    """Runs are marked without the condition that they are in no job."""

    def may_mark(self: MemoryJobs, run: RunDoc, endpoint: str) -> bool:
        return "joins" in run and run["joins"]["endpoint"] == endpoint

    return mock.patch.object(MemoryJobs, "may_mark", may_mark)


def a_deadline_is_not_given_back() -> Patch:
    """A run that comes back keeps the deadline of one that waits."""

    def back(run: RunDoc, at_ms: int) -> Back:
        came = _back(run, at_ms)
        return Back({**came.run, "deadline_at": run["deadline_at"]}, came.waited_ms)

    return mock.patch.object(joining, "back", back)


def a_deadline_moves_out_of_the_window() -> Patch:
    """A line's own deadline comes no nearer while it waits, as if waiting were its customer's wish."""

    def back(run: RunDoc, at_ms: int) -> Back:
        endless: Any = {**run, "batch": {**run["batch"], "complete_by": run["created_at"].replace(year=9999)}}
        came = _back(endless, at_ms)
        return Back({**came.run, "batch": run["batch"]}, came.waited_ms)

    return mock.patch.object(joining, "back", back)


def waking_leaves_the_run_waiting() -> Patch:
    """The scheduler wakes a step that waits for a job as any other: the run is not taken out of its job."""

    def wake(run: RunDoc, step_id: str, at_ms: int) -> Decision:
        with mock.patch.object(joining, "waits", return_value=False):
            return advance.wake(run, step_id, at_ms)

    return mock.patch.object(recovery, "wake", wake)


def the_joiner_minds_no_rev() -> Patch:
    """It commits to a run that has moved on."""

    async def committed(self: Answers, run: RunDoc, decision: Decision, step_id: str) -> Commit | None:
        fresh = await self._store.load(run["_id"])
        made = commit.plan(run, decision, now=self._store.now(), unclaimed=(step_id,))
        rev = run["rev"] if fresh is None else fresh["rev"]
        planned = replace(made, rev=rev, after={**made.after, "rev": rev + 1})
        return planned if await self._store.commit(planned) is Verdict.APPLIED else None

    return mock.patch.object(Answers, "_commit", committed)


def two_work_on_a_job() -> Patch:
    """A job's lease is given to whoever asks."""

    async def take(self: MemoryJobs, job_id: str, holder: str) -> JobDoc | None:
        job = self.docs[job_id]
        lease: Any = {"holder": holder, "until": self._store.now() + LEASE}
        self.docs[job_id] = {**job, "lease": lease}
        return {**self.docs[job_id]} if job["live"] else None

    return mock.patch.object(MemoryJobs, "take", take)


def a_lost_lease_is_not_noticed() -> Patch:
    """A joiner that stood still writes over what another has done about the job meanwhile."""

    async def note(self: MemoryJobs, job_id: str, holder: str, **fields: Any) -> bool:
        lease = self.docs[job_id]["lease"]
        return await _note(self, job_id, holder if lease is None else lease["holder"], **fields)

    return mock.patch.object(MemoryJobs, "note", note)


def a_jobs_lease_is_not_kept() -> Patch:
    """Whoever waits for a slow provider loses the job."""

    def leased(self: Joiner, job_id: str) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    return mock.patch.object(Joiner, "_leased", leased)


def a_job_is_given_up_unseen() -> Patch:
    """One failure to hand a job in, and its calls are made live: the provider may have it."""

    async def put_off(self: Joiner, job_id: str, error: ProviderError) -> None:
        job = await self._jobs.load(job_id)
        if job is not None and job["status"] == "sending":
            await self._give_up(job, error.code)
        else:
            await _put_off(self, job_id, error)

    return mock.patch.object(Joiner, "_put_off", put_off)


def a_call_made_live_is_the_same_attempt() -> Patch:
    def release(run: RunDoc, at_ms: int, code: str, *, paid: bool = False) -> Decision:
        decision = _release(run, at_ms, code, paid=paid)
        return replace(decision, opened={key: replace(one, attempt=1) for key, one in decision.opened.items()})

    return mock.patch.object(joining, "release", release)


def further_attempts_wait_too() -> Patch:
    """A call that was made live may be put off at its next attempt."""

    def deferral(call: LlmCall, run: RunDoc, step_id: str, now: Any) -> Deferred | None:
        steps: Any = {step_id: {**run["steps"][step_id], "attempt": 1}}
        return _deferral(call, {**run, "steps": steps}, step_id, now)

    return mock.patch.object(runtime, "deferral", deferral)


def a_call_waits_without_time() -> Patch:
    """Nobody looks whether the window leaves time for a job."""

    def deferral(call: LlmCall, run: RunDoc, step_id: str, now: Any) -> Deferred | None:
        early = _deferral(call, run, step_id, run["created_at"])
        return None if early is None else replace(early, at_ms=int(now.timestamp() * 1000))

    return mock.patch.object(runtime, "deferral", deferral)


def the_journal_tells_nothing_of_the_wait() -> Patch:
    def settle(came: Back, decision: Decision, told: Any) -> Decision:
        settled = _settle(came, decision, told)
        entry: Any = {name: value for name, value in (settled.entry or {}).items() if name != "stood_still_ms"}
        return replace(settled, entry=entry)

    return mock.patch.object(joining, "settle", settle)


def an_answer_of_a_job_costs_the_full_price() -> Patch:
    return mock.patch.object(joining, "discounted", lambda call: call)


def a_lost_answer_is_not_counted() -> Patch:
    """An answer that was paid and that nobody can read shows nowhere."""

    def release(run: RunDoc, at_ms: int, code: str, *, paid: bool = False) -> Decision:
        return _release(run, at_ms, code)

    return mock.patch.object(joining, "release", release)


JOB_MUTANTS: tuple[Callable[[], Patch], ...] = (
    a_job_is_handed_in_again_unlooked,
    late_answers_are_booked_without_guard,
    an_answer_that_is_in_is_booked_as_late,
    a_job_takes_calls_from_others,
    a_deadline_is_not_given_back,
    a_deadline_moves_out_of_the_window,
    waking_leaves_the_run_waiting,
    the_joiner_minds_no_rev,
    two_work_on_a_job,
    a_lost_lease_is_not_noticed,
    a_jobs_lease_is_not_kept,
    a_job_is_given_up_unseen,
    a_call_made_live_is_the_same_attempt,
    further_attempts_wait_too,
    a_call_waits_without_time,
    the_journal_tells_nothing_of_the_wait,
    an_answer_of_a_job_costs_the_full_price,
    a_lost_answer_is_not_counted,
)
