"""The books of a schedule: what really happened, kept from outside, and what must be true of it.

While it runs: no step is finished twice, comes back, or is committed out of order; no live lease is taken from its
holder; every effect has a lease of its own and none starts for a step that is finished; an unsafe tool acts once; a
keyed one is called with one key a step; what a call cost is booked once, in usage or in waste; hints name what is
committed; a look of the scheduler ends.

In the end: every run has ended (or waits for a person, because of a held step); the stored documents are valid; nothing
is due and nobody holds anything; the audit chain is whole and copied; usage is what the committed calls took; calls
are no more than attempts; what was spent is shown; conversations are in order; the journal gives the stored state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta

from agentq.engine import audit
from agentq.engine.commit import Commit
from agentq.engine.replay import agrees
from agentq.event import Event
from agentq.protocol import TERMINAL, Hint
from schemas.catalog import Bundle
from schemas.run import RUN, RunDoc
from tests.simulation.job_books import JobBooks
from tests.simulation.loop import Clock, Process

StepKey = tuple[str, str]
WAITING_TOO_LONG = timedelta(seconds=45)  # for a lease that ran out: a pause of the simulated scheduler, and room


@dataclass(slots=True)
class Call:
    """One paid call to the model: ``cost`` is unique among the calls of a schedule."""

    run_id: str
    cost: int
    process: Process | None  # None: it was made in a provider's job
    delivered: bool = False
    booked: str | None = None


@dataclass(slots=True)
class Books:
    """Everything that is checked. ``problems`` are sentences; a schedule without any is a good one."""

    clock: Clock
    processes: dict[str, Process]
    problems: list[str] = field(default_factory=list)
    calls: dict[int, Call] = field(default_factory=dict)  # by cost
    opened: dict[StepKey, int] = field(default_factory=dict)  # the highest attempt a step was opened at
    closed: set[StepKey] = field(default_factory=set)
    finished: set[StepKey] = field(default_factory=set)  # closed by a worker's own commit
    leases: dict[tuple[str, str, str], int] = field(default_factory=dict)  # (process, run, step): leases it was given
    effects: dict[tuple[str, str, str], int] = field(default_factory=dict)  # the same of effects it began
    begun: dict[StepKey, int] = field(default_factory=dict)  # effects begun for a step
    keys: dict[StepKey, set[str]] = field(default_factory=dict)  # keys under which a keyed tool took effect
    acted: dict[StepKey, int] = field(default_factory=dict)  # how often an unsafe tool took effect
    lost: dict[str, int] = field(default_factory=dict)  # leases that ran out, by run
    entered: dict[str, datetime] = field(default_factory=dict)  # the first claim of a run
    ended: dict[str, datetime] = field(default_factory=dict)
    ahead: timedelta = timedelta(0)  # how far any wall clock was ahead: what it wrote is due so much later
    skewed: bool = False  # a wall clock was wrong: deadlines and limits of time may have been, too
    unanswered: set[str] = field(default_factory=set)  # runs that ended while they waited for a person
    cut: dict[str, int] = field(default_factory=dict)  # what calls that were cut short are taken to have cost, by run
    calm_at: datetime | None = None  # from then on nothing fails, and nothing that was delayed comes later
    jobs: JobBooks = field(init=False)

    def __post_init__(self) -> None:
        self.jobs = JobBooks(self)

    def wrong(self, sentence: str) -> None:
        if sentence in self.problems:
            return
        self.problems.append(sentence)
        self.clock.note(f"VIOLATION: {sentence}")

    # -- while it runs ----------------------------------------------------------------------------------------------

    def born(self, run: RunDoc) -> None:
        for step_id, step in run["steps"].items():
            self.opened[run["_id"], step_id] = step["attempt"]

    def claimed(self, run: RunDoc, hint: Hint, worker: str, now: datetime) -> None:
        if run["steps"][hint.step_id]["attempt"] != hint.attempt:
            self.wrong(f"{hint} claimed attempt {run['steps'][hint.step_id]['attempt']}")
        self.entered.setdefault(run["_id"], now)
        self._leased(worker, run["_id"], hint.step_id)

    def _leased(self, worker: str, run_id: str, step_id: str) -> None:
        holder = (worker, run_id, step_id)
        self.leases[holder] = self.leases.get(holder, 0) + 1

    def committed(self, before: RunDoc, after: RunDoc, commit: Commit, now: datetime) -> None:
        """A commit was applied."""
        run_id = commit.run_id
        if before["status"] in TERMINAL:
            self.wrong(f"{run_id} was committed after it had ended")
        if before["cancel"] is not None and after["status"] != "cancelled":
            self.wrong(f"{run_id} was to be cancelled and is {after['status']}")
        if after["rev"] != before["rev"] + 1:
            self.wrong(f"{run_id} went from rev {before['rev']} to {after['rev']}")
        self._steps(before, after, commit)
        self._leases_kept(before, after, commit, now)
        for step_id, grant in commit.grants.items():
            self._leased(grant.worker, run_id, step_id)
        self._usage(before, after)
        if "batch" in after:
            self.jobs.committed(before, after, commit, now)
        if after["status"] in TERMINAL:
            self.ended[run_id] = now
            if any("held" in step for step in before["steps"].values()):
                self.unanswered.add(run_id)

    def _steps(self, before: RunDoc, after: RunDoc, commit: Commit) -> None:
        run_id = commit.run_id
        for step_id in before["steps"].keys() - after["steps"].keys():
            self.closed.add((run_id, step_id))
        for step_id, step in after["steps"].items():
            key = (run_id, step_id)
            if key in self.closed:
                self.wrong(f"step {step_id} of {run_id} is open again after it was closed")
            if step["attempt"] < self.opened.get(key, 1):
                self.wrong(f"step {step_id} of {run_id} went back to attempt {step['attempt']}")
            self.opened[key] = step["attempt"]
        if commit.token is not None and not commit.lapsed and commit.step_id not in after["steps"]:
            key = (run_id, commit.step_id or "")
            if key in self.finished:
                self.wrong(f"step {key[1]} of {run_id} was finished twice")
            self.finished.add(key)

    def _leases_kept(self, before: RunDoc, after: RunDoc, commit: Commit, now: datetime) -> None:
        """No commit but its holder's ends a lease that has time left, unless it ends the run."""
        for step_id, lease in before["leases"].items():
            over = lease["at"] + timedelta(milliseconds=lease["ms"]) <= now
            if over and commit.lapsed and step_id == commit.step_id:
                self.lost[commit.run_id] = self.lost.get(commit.run_id, 0) + 1
                self._excused(lease["worker"], lease["at"], f"step {step_id} of {commit.run_id}")
            if over or after["status"] in TERMINAL or (commit.step_id == step_id and commit.token == lease["token"]):
                if not over and commit.lapsed:
                    self.wrong(f"the live lease of step {step_id} of {commit.run_id} was declared lost")
                continue
            kept = after["leases"].get(step_id)
            if kept is None or kept["token"] != lease["token"]:
                self.wrong(f"the live lease of step {step_id} of {commit.run_id} was taken from {lease['worker']}")

    def _excused(self, worker: str, since: datetime, what: str) -> None:
        """A worker that nothing happened to loses no lease."""
        process = self.processes[worker]
        if process.alive and process.disturbed_at is None:
            self.wrong(
                f"{worker} lost the lease of {what}, taken at {since:%H:%M:%S}, though nothing had happened to it"
            )

    def answered(self, run_id: str, cost: int, process: Process | None, *, delivered: bool = True) -> None:
        """A model call is paid for; ``delivered``: and its answer can be read."""
        self.calls[cost] = Call(run_id, cost, process, delivered)

    def _usage(self, before: RunDoc, after: RunDoc) -> None:
        spent = after["usage"].get("cost_nano_usd", 0) - before["usage"].get("cost_nano_usd", 0)
        calls = after["usage"].get("llm_calls", 0) - before["usage"].get("llm_calls", 0)
        if calls or spent:
            self._book(after["_id"], spent, "usage")
            if calls != 1:
                self.wrong(f"{after['_id']} counts {calls} calls for one")

    def _book(self, run_id: str, cost: int, where: str) -> None:
        call = self.calls.get(cost)
        if call is None or call.run_id != run_id or not call.delivered:
            self.wrong(f"{run_id} books {cost} as {where}, which no call of it cost")
        elif call.booked is not None:
            self.wrong(f"{run_id} books a call of {cost} as {where}, booked as {call.booked} before")
        else:
            call.booked = where

    def wasted(self, run: RunDoc, token: str, waste: dict[str, int]) -> None:
        if waste.get("late_calls"):
            self.jobs.late(run, token, waste["cost_nano_usd"])
        run_id, cost = run["_id"], waste.get("cost_nano_usd", 0)
        if not waste.get("cut_calls"):
            self._book(run_id, cost, "waste")
            return
        self.cut[run_id] = self.cut.get(run_id, 0) + cost
        if run["cancel"] is None and run["status"] not in TERMINAL:
            self.wrong(f"a model call of {run_id} was cut short, and nobody had stopped the run")

    def effect(self, process: Process, run_id: str, step_id: str) -> None:
        """An effect begins in ``process``."""
        holder, key = (process.name, run_id, step_id), (run_id, step_id)
        self.effects[holder] = self.effects.get(holder, 0) + 1
        self.begun[key] = self.begun.get(key, 0) + 1
        if self.effects[holder] > self.leases.get(holder, 0):
            self.wrong(f"{process.name} began an effect of step {step_id} of {run_id} without a lease of its own")
        if key in self.finished and not process.stood_still_ms:
            self.wrong(f"{process.name} began an effect of step {step_id} of {run_id}, which is finished")

    def unsafe_effect(self, run_id: str, step_id: str) -> None:
        key = (run_id, step_id)
        self.acted[key] = self.acted.get(key, 0) + 1
        if self.acted[key] > 1:
            self.wrong(f"the unsafe tool of step {step_id} of {run_id} acted {self.acted[key]} times")

    def keyed_effect(self, run_id: str, step_id: str, key: str) -> None:
        keys = self.keys.setdefault((run_id, step_id), set())
        keys.add(key)
        if len(keys) > 1:
            self.wrong(f"the keyed tool of step {step_id} of {run_id} was called with the keys {sorted(keys)}")

    def published(self, hint: Hint) -> None:
        if self.opened.get((hint.run_id, hint.step_id), 0) < hint.attempt:
            self.wrong(f"{hint} was published before its step was committed")

    def overdue(self, runs: dict[str, RunDoc], calm_since: datetime, now: datetime) -> None:
        """With a scheduler that has been well since ``calm_since``, a lease that ran out is noticed soon."""
        for run in runs.values():
            for step_id, lease in run["leases"].items():
                out = lease["at"] + timedelta(milliseconds=lease["ms"])
                if max(out, calm_since) + WAITING_TOO_LONG + self.ahead < now:
                    self.wrong(
                        f"the lease of step {step_id} of {run['_id']} ran out at {out:%H:%M:%S} and nobody looks "
                        f"before {run['next_due']:%H:%M:%S}"
                    )

    # -- in the end -------------------------------------------------------------------------------------------------

    def close(
        self, runs: dict[str, RunDoc], audited: dict[str, Event], patient: set[str], bundles: dict[str, Bundle]
    ) -> None:
        """The schedule is over. ``patient`` are the runs with the default deadline, long after the faults."""
        copied: dict[str, list[Event]] = {run_id: [] for run_id in runs}
        for key in sorted(audited):
            copied[audited[key]["run"]].append(audited[key])
        for run in runs.values():
            RUN.validate_python(run)
            self._ended(run, copied[run["_id"]])
            self._audited(run, copied[run["_id"]])
            self._paid(run)
            self._history(run, runs)
            if not agrees(bundles, run):
                self.wrong(f"the journal of {run['_id']} does not give its state")
            if run["_id"] in patient - self.unanswered and not self.skewed:
                self._in_time(run)
        self._attempts()
        self._shown()
        self.jobs.close()

    def _ended(self, run: RunDoc, copied: list[Event]) -> None:
        held = [step_id for step_id, step in run["steps"].items() if "held" in step]
        if run["status"] in TERMINAL:
            if run["next_due"] or run["steps"] or run["leases"] or run["events"]:
                left = f"{run['steps']}, {run['leases']}, {len(run['events'])} events, next {run['next_due']}"
                self.wrong(f"{run['_id']} has {run['status']} and keeps {left}")
            if len(copied) != run["audit"]["seq"]:
                self.wrong(
                    f"{run['_id']} has {run['status']} with {len(copied)} of {run['audit']['seq']} events copied"
                )
        elif not held or len(held) < len(run["steps"]):
            self.wrong(f"{run['_id']} never ended: {run['status']}, open steps {run['steps']}, next {run['next_due']}")
        elif run["status"] != "waiting" or run["leases"] or not self._due_by_deadline(run):
            self.wrong(f"{run['_id']} is {run['status']} with steps held: {run['leases']}, next {run['next_due']}")

    def _in_time(self, run: RunDoc) -> None:
        """Where no clock was wrong, faults that are over do not make a run wait for its deadline."""
        result, error = run["result"], run["error"]
        reason = result.get("reason") if result is not None else None
        if reason == "max_wall_s" or (error is not None and "limit max_wall_s" in error["message"]):
            self.wrong(f"{run['_id']} was forgotten until its deadline at {run['deadline_at']:%H:%M:%S}")

    def _due_by_deadline(self, run: RunDoc) -> bool:
        return run["next_due"] is not None and run["next_due"] <= run["deadline_at"]

    def _audited(self, run: RunDoc, copied: list[Event]) -> None:
        seen = {event["seq"]: event for event in copied}
        for event in run["events"]:
            if seen.setdefault(event["seq"], event) != event:
                self.wrong(f"event {event['seq']} of {run['_id']} was copied and is another now")
        for problem in audit.check(run["_id"], run["audit"], [seen[seq] for seq in sorted(seen)]):
            self.wrong(f"audit of {run['_id']}: {problem}")

    def _paid(self, run: RunDoc) -> None:
        mine = [call for call in self.calls.values() if call.run_id == run["_id"]]
        used = [call.cost for call in mine if call.booked == "usage"]
        wasted = [call.cost for call in mine if call.booked == "waste"]
        usage, waste = run["usage"], run["waste"]
        counted = (usage.get("llm_calls", 0), usage.get("cost_nano_usd", 0))
        if counted != (len(used), sum(used)):
            self.wrong(f"{run['_id']} counts {counted} used, the committed calls were {len(used)} for {sum(used)}")
        if run["budget_nano_usd"] is not None and sum(used[:-1]) >= run["budget_nano_usd"]:
            self.wrong(f"{run['_id']} went on after its budget of {run['budget_nano_usd']} was used up: {used}")
        counted = (
            waste.get("llm_calls", 0) + waste.get("late_calls", 0),
            waste.get("cost_nano_usd", 0) - self.cut.get(run["_id"], 0),
        )
        if counted != (len(wasted), sum(wasted)):
            self.wrong(f"{run['_id']} counts {counted} wasted, the calls were {len(wasted)} for {sum(wasted)}")
        if waste.get("lost_calls", 0) != self.lost.get(run["_id"], 0):
            self.wrong(f"{run['_id']} counts {waste.get('lost_calls', 0)} lost, it was {self.lost.get(run['_id'], 0)}")

    def _history(self, run: RunDoc, runs: dict[str, RunDoc]) -> None:
        """What a run knew of its conversation: the earlier turns in order, none missing that had ended before it."""
        state, turn = run["state"], run["turn"]
        if state is None or turn is None or not state["node"]:  # it never began
            return
        earlier = sorted(
            (other for other in runs.values() if other["status"] == "succeeded" and (other["turn"] or turn) < turn),
            key=lambda other: other["turn"] or 0,
        )
        known = [message["content"] for message in state["history"]]
        turns = [[other["input"], other["result"]["answer"]] for other in earlier if other["result"] is not None]
        if known != [text for pair in turns if pair[0] in known for text in pair]:
            self.wrong(f"{run['_id']} knows of its conversation {known}")
        for other in earlier:
            if self.ended[other["_id"]] < self.entered[run["_id"]] and other["input"] not in known:
                self.wrong(f"{run['_id']} does not know of {other['_id']}, which had ended before")

    def _attempts(self) -> None:
        for key, begun in self.begun.items():
            if begun > self.opened[key]:
                self.wrong(f"step {key[1]} of {key[0]} had {begun} effects in {self.opened[key]} attempts")

    def _shown(self) -> None:
        """A worker that lives to see an answer books it."""
        for call in self.calls.values():
            process = call.process  # None: see JobBooks
            if call.delivered and call.booked is None and process is not None and process.alive:
                self.wrong(f"{process.name} spent {call.cost} for {call.run_id} and it shows nowhere")
