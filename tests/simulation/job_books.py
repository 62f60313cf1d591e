"""The books of a provider's jobs: what must be true of model calls that wait for them, checked from outside.

While it runs: a call is in one job at the most, and while it waits nobody may claim it; a job is handed in by its
holder, and a second time only if the provider has none of its name; one that the provider has is given up only when its
window is at risk, and cancelled only if nobody wants it or there is no more time; a call is made both in a job and live
only where its run says why; an answer comes late only to a run that has ended or had no more time; standing still costs
a run nothing of its deadline, and gives it nothing beyond its window.

In the end: no job is live and no run waits; every answer that a job was paid for is booked once; a job's own figures
are what it came to; runs with a window have ended within it, as far as the faults left time for that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from agentq.engine.commit import Commit
from agentq.engine.joining import window
from agentq.protocol import TERMINAL
from schemas.job import JOB, JobDoc, place_of
from schemas.run import RunDoc

if TYPE_CHECKING:
    from tests.simulation.invariants import Books
    from tests.simulation.loop import Process
    from tests.simulation.provider import Job

StepKey = tuple[str, str]
LOOKED_AT = timedelta(seconds=45)  # when the simulated scheduler has looked at what is due
LIVE = timedelta(seconds=240)  # a whole run, made live without faults, has ended by then
BACK = ("step.joined", "step.undeferred")


@dataclass(slots=True)
class Sent:
    """A job that the provider was handed. ``stray``: by one whose lease had run out, so another may do it too."""

    job: Job
    stray: bool
    paid: dict[int, str] = field(default_factory=dict)  # cost -> custom id, of calls whose answers can be read


@dataclass(slots=True)
class JobBooks:
    """A part of ``Books``, which says what is wrong."""

    books: Books
    docs: dict[str, JobDoc] = field(default_factory=dict)
    runs: dict[str, RunDoc] = field(default_factory=dict)
    handed_in: dict[str, list[Sent]] = field(default_factory=dict)  # by our name for the job
    calls: dict[StepKey, str] = field(default_factory=dict)  # steps whose calls are in a job
    unreadable: set[StepKey] = field(default_factory=set)
    came_back: dict[StepKey, str] = field(default_factory=dict)  # how a step that waited went on
    deadlines: dict[str, datetime] = field(default_factory=dict)  # of runs that wait: as it was before
    codes: set[str] = field(default_factory=set)  # all ways in which steps went on, for the test of the simulation

    # -- while it runs ----------------------------------------------------------------------------------------------

    def marked(self, run: RunDoc, before: str | None) -> None:
        if before is not None:
            self.books.wrong(f"{run['_id']} is in {before} and was taken into {run['joins'].get('job')}")

    def sent(self, job: Job, process: Process, now: datetime) -> None:
        """The provider has a new job."""
        lease = self.docs[job.name]["lease"]
        mine = lease is not None and lease["holder"] == joiner_of(process.name) and lease["until"] >= now
        stray = not mine
        if stray and process.disturbed_at is None:
            self.books.wrong(f"{process.name} handed in {job.name}, which it did not hold")
        others = self.handed_in.setdefault(job.name, [])
        if any(not other.stray for other in others) and not stray:
            self.books.wrong(f"{process.name} handed in {job.name} again, and the provider has it already")
        others.append(Sent(job, stray))
        for asked in job.asked:
            self._call(job.name, asked.line.custom_id, stray=stray)

    def _call(self, name: str, custom_id: str, *, stray: bool) -> None:
        place = place_of(custom_id)
        assert place is not None
        key = place.run_id, place.step_id
        if self.calls.setdefault(key, name) != name:
            self.books.wrong(f"step {key[1]} of {key[0]} is asked in {self.calls[key]} and in {name}")
        if stray:  # of a call that it has made one too many, another may have been the first
            return
        if place.attempt != 1 or key in self.books.begun:
            self.books.wrong(f"{custom_id} is asked in {name} after it was made live")
        self.books.begun[key] = self.books.begun.get(key, 0) + 1

    def paid(self, job: Job, custom_id: str, cost: int, *, readable: bool) -> None:
        """A call of the job was made: its answer is there, or lost."""
        place = place_of(custom_id)
        assert place is not None
        sent = next(one for one in self.handed_in[job.name] if one.job is job)
        if readable:
            sent.paid[cost] = custom_id
        elif self.docs[job.name].get("provider_id") == job.id:
            self.unreadable.add((place.run_id, place.step_id))
        self.books.answered(place.run_id, cost, None, delivered=readable)

    def cancelled(self, job: Job, now: datetime) -> None:
        """Somebody asks the provider for a job's end."""
        doc = self.docs[job.name]
        wanted = any(run.get("joins", {}).get("job") == job.name for run in self.runs.values())
        early = now + self.books.ahead < doc["until"]
        if doc.get("provider_id") == job.id and wanted and early and doc["status"] == "sent":
            self.books.wrong(f"{job.name} was cancelled at the provider while it was waited for and had time left")

    def noted(self, before: JobDoc, after: JobDoc, now: datetime) -> None:
        """The holder of a job wrote how far it is."""
        name, status = after["_id"], after["status"]
        handed_in = [sent for sent in self.handed_in.get(name, []) if not sent.stray]
        if not before["live"]:
            self.books.wrong(f"{name} was {before['status']} and is {status}")
        if status == "sent" and after["provider_id"] not in [sent.job.id for sent in self.handed_in.get(name, [])]:
            self.books.wrong(f"{name} is said to be {after['provider_id']}, which the provider does not know")
        if status == "given_up" and handed_in and now + self.books.ahead < after["until"] and not self.books.skewed:
            self.books.wrong(f"{name} was given up with time left, and the provider has it")
        if status == "done":
            self._done(after)

    def _done(self, doc: JobDoc) -> None:
        """A job's figures are those of the job that we followed."""
        ours = [sent for sent in self.handed_in.get(doc["_id"], []) if sent.job.id == doc.get("provider_id")]
        cost = sum(sum(sent.paid) for sent in ours)
        if doc["cost_nano_usd"] != cost:
            self.books.wrong(f"{doc['_id']} says it cost {doc['cost_nano_usd']}, it was {cost}")

    def late(self, run: RunDoc, job_id: str, cost: int) -> None:
        """An answer was booked as waste, because nobody waited for it any more."""
        custom_id = next((s.paid[cost] for s in self.handed_in.get(job_id, []) if cost in s.paid), None)
        place = place_of(custom_id or "")
        if place is None:
            self.books.wrong(f"{run['_id']} books a late answer of {job_id} that cost {cost}, which there was not")
            return
        self.codes.add("late")
        how = self.came_back.get((run["_id"], place.step_id))
        if how not in (None, "no_job_in_time") or (how is None and run["status"] not in TERMINAL):
            self.books.wrong(
                f"an answer of {job_id} came late to step {place.step_id} of {run['_id']}, it went on by {how}"
            )

    def live(self, run_id: str, step_id: str) -> None:
        """A model call is made live."""
        key, run = (run_id, step_id), self.runs[run_id]
        if key in self.calls and key not in self.came_back and run["status"] not in TERMINAL:
            self.books.wrong(f"the call of step {step_id} of {run_id} is in {self.calls[key]} and is made live")

    def committed(self, before: RunDoc, after: RunDoc, commit: Commit, now: datetime) -> None:
        """A commit was applied to a run of a batch with a window."""
        if "joins" in after:
            self._waits(before, after)
        elif "joins" in before:
            self._back(before, after, commit, now)
        elif commit.waste.get("lost_calls") and not commit.lapsed:
            self.books.wrong(f"{commit.run_id} counts a lost call, and no lease was lost")

    def _waits(self, before: RunDoc, after: RunDoc) -> None:
        run_id, joins = after["_id"], after["joins"]
        step = after["steps"].get(joins["step"])
        if step is None or "not_before" not in step:
            self.books.wrong(f"{run_id} waits for a job, and its step {joins['step']} does not")
        if "joins" in before:
            return
        line = after.get("batch")
        if line is None or "complete_by" not in line or joins["since"] >= joins["until"]:
            self.books.wrong(f"{run_id} waits for a job, for which there is no time")
        self.deadlines[run_id] = before["deadline_at"]

    def _back(self, before: RunDoc, after: RunDoc, commit: Commit, now: datetime) -> None:
        """The run waits no more."""
        run_id, joins = after["_id"], before["joins"]
        told = next((event for event in commit.events if event["type"] in BACK), None)
        if told is None:
            if after["status"] not in TERMINAL:
                self.books.wrong(f"{run_id} waits for a job no more, and does not say why")
            return
        joined = told["type"] == "step.joined"
        code = "joined" if joined else told["data"]["code"]
        self.came_back[run_id, joins["step"]] = code
        self.codes.add(code)
        self._lost(before, commit, code)
        if joined and joins["step"] not in after["steps"]:
            self.books.finished.add((run_id, joins["step"]))
        if after["status"] not in TERMINAL:
            self._deadline(before, after, told["at_ms"])
        self._not_too_late(before, now)

    def _lost(self, before: RunDoc, commit: Commit, code: str) -> None:
        """An answer that was paid and that nobody can read is counted as a lost call."""
        run_id, lost = commit.run_id, commit.waste.get("lost_calls", 0)
        unreadable = (run_id, before["joins"]["step"]) in self.unreadable
        if code == "job_completed" and unreadable != bool(lost):
            self.books.wrong(f"{run_id} counts {lost} lost calls, its answer {'was' if unreadable else 'was not'} lost")
        if not commit.lapsed:
            self.books.lost[run_id] = self.books.lost.get(run_id, 0) + lost

    def _deadline(self, before: RunDoc, after: RunDoc, at_ms: int) -> None:
        """It has moved by as long as the run stood still, but not out of the window."""
        run_id, was = after["_id"], self.deadlines[after["_id"]]
        since = before["steps"][before["joins"]["step"]]["hinted_at"]
        moved = was + (datetime.fromtimestamp(at_ms / 1000, since.tzinfo) - since)
        wanted = min(moved, max(was, after["batch"]["complete_by"]))
        if abs(after["deadline_at"] - wanted) > timedelta(milliseconds=2):
            found = after["deadline_at"]
            self.books.wrong(
                f"{run_id} stood still from {since:%H:%M:%S} on, its deadline was {was:%H:%M:%S} and is "
                f"{found:%H:%M:%S}, not {wanted:%H:%M:%S}"
            )

    def _not_too_late(self, before: RunDoc, now: datetime) -> None:
        live_at = window(before["created_at"], before["batch"]["complete_by"]).live_at
        if not self.books.skewed and now > max(live_at, self.books.calm_at or now) + LOOKED_AT:
            self.books.wrong(
                f"{before['_id']} waited for a job until {now:%H:%M:%S}, it should until {live_at:%H:%M:%S}"
            )

    # -- in the end -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        for doc in self.docs.values():
            JOB.validate_python(doc)
            if doc["live"]:
                self.books.wrong(f"{doc['_id']} is {doc['status']} and still live")
        for name, handed_in in self.handed_in.items():
            self._booked(name, handed_in)
        for run in self.runs.values():
            if "joins" in run:
                self.books.wrong(f"{run['_id']} still waits for a job: {run['joins']}")
            if "complete_by" in run.get("batch", {}) and run["status"] in TERMINAL and not self.books.skewed:
                self._in_window(run)

    def _booked(self, name: str, handed_in: list[Sent]) -> None:
        """Every answer is booked, but of a job that we could not know of."""
        doc = self.docs[name]
        for sent in handed_in:
            unknown = doc["status"] == "given_up" or any(one.stray for one in handed_in)
            if sent.job.id != doc.get("provider_id") and unknown:
                continue
            for cost, custom_id in sent.paid.items():
                if self.books.calls[cost].booked is None:
                    self.books.wrong(f"{custom_id} was answered in {name} for {cost}, and it shows nowhere")

    def _in_window(self, run: RunDoc) -> None:
        """Faults that are over in time, and a slow endpoint, do not make a run miss its window."""
        complete_by, calm_at = run["batch"]["complete_by"], self.books.calm_at
        live_at = window(run["created_at"], complete_by).live_at
        ended = self.books.ended[run["_id"]]
        if calm_at is not None and ended > max(complete_by, max(live_at, calm_at) + LIVE):
            self.books.wrong(f"{run['_id']} ended at {ended:%H:%M:%S}, its window at {complete_by:%H:%M:%S}")


def joiner_of(process: str) -> str:
    """What the joiner of a process is called."""
    return f"{process}j"
