"""The shapes of the store's conditions and updates, apart from any connection: pure, so they can be read and tested."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any, cast

from agentq.engine.commit import Commit, Grant
from agentq.event import Event
from agentq.protocol import Hint, Pool
from agentq.run import RUN_FORMAT, START_STEP
from agentq.store.api import Dead, Held, Letters, Queue, Verdict
from schemas.chat import Message
from schemas.run import RunDoc

Doc = dict[str, Any]
WORKER_ALIVE = timedelta(seconds=15)  # a worker that has shown no sign of life for so long is taken for dead
WORKER_HEARS = timedelta(seconds=10)  # and what it took out of a queue before it fell silent for so long is lost
CLAIMABLE = ["queued", "running", "waiting"]
LIVE: Doc = {"in_flight": True}  # under way: neither ended nor in the backlog
WITHOUT_JOURNAL: Doc = {"journal": 0}  # it grows with the run, and only an operator's act needs it


def claim(hint: Hint, grant: Grant, now: datetime) -> tuple[Doc, Doc]:
    """Condition and update of a claim: the step is open at this attempt, may start, and nobody holds it.

    The scheduler must look when the lease is out, even if it meant to look later.
    """
    step, lease = f"steps.{hint.step_id}", f"leases.{hint.step_id}"
    condition = {
        "_id": hint.run_id,
        "v": {"$lte": RUN_FORMAT},  # a newer worker's run is left to newer workers
        "status": {"$in": CLAIMABLE},
        "cancel": None,
        "backlog": None,
        f"{step}.attempt": hint.attempt,
        f"{step}.not_before": None,
        f"{step}.held": None,
        lease: None,
    }
    written: Doc = {f"{lease}.token": grant.token, f"{lease}.worker": grant.worker, f"{lease}.ms": grant.ms}
    if hint.step_id == START_STEP:
        written["status"] = "running"
    due = now + timedelta(milliseconds=grant.ms)
    return condition, {"$set": written, "$currentDate": {f"{lease}.at": True}, "$min": {"next_due": due}}


def commit(planned: Commit) -> tuple[Doc, Doc]:
    """Condition and update of a commit."""
    return _commit_condition(planned), _commit_update(planned)


def _commit_condition(planned: Commit) -> Doc:
    condition: Doc = {"_id": planned.run_id, "rev": planned.rev}
    if planned.token is not None:
        condition[f"leases.{planned.step_id}.token"] = planned.token
    for step_id in planned.unclaimed:
        condition[f"leases.{step_id}"] = None
    if planned.lapsed:
        lease = f"$leases.{planned.step_id}"
        condition["$expr"] = {"$lt": [{"$add": [f"{lease}.at", f"{lease}.ms"]}, "$$NOW"]}
    return condition


def _commit_update(planned: Commit) -> Doc:
    written = _written(planned)
    update: Doc = {"$set": written}
    pushed: Doc = {}
    if planned.trimmed:
        written["events"] = planned.after["events"]
    elif planned.events:
        pushed["events"] = {"$each": planned.events}
    if planned.entry is not None:
        pushed["journal"] = planned.entry
    if pushed:
        update["$push"] = pushed
    if planned.waste:
        update["$inc"] = {f"waste.{name}": amount for name, amount in planned.waste.items()}
    if planned.drops:
        update["$unset"] = dict.fromkeys(planned.drops, "")
    if planned.after["steps"]:
        _update_steps(planned, update)
    else:
        written |= {"steps": {}, "leases": {}}
    return update


def _written(planned: Commit) -> Doc:
    after = planned.after
    always = ("rev", "status", "usage", "audit", "next_due")
    written: Doc = {name: after[name] for name in always}  # type: ignore[literal-required]
    if planned.state_changes is None:
        written["state"] = after["state"]
    else:
        written |= {f"state.{name}": value for name, value in planned.state_changes.items()}
    if planned.step_id in after["receipts"]:
        written[f"receipts.{planned.step_id}"] = after["receipts"][planned.step_id]
    if after["ended_at"] is not None:
        written |= {"result": after["result"], "error": after["error"], "ended_at": after["ended_at"]}
        if "batch" in after:
            written["tally"] = True
        if "quarantine" in after:
            written["quarantine"] = after["quarantine"]
    return {**written, **planned.fields}


def _update_steps(planned: Commit, update: Doc) -> None:
    """Each open step by its own path, so that leases taken on others meanwhile are left alone."""
    dropped: Doc = {}
    clocks: Doc = {}
    for step_id in planned.closed:
        dropped[f"steps.{step_id}"] = dropped[f"leases.{step_id}"] = ""
    for step_id, step in planned.opened.items():
        update["$set"][f"steps.{step_id}"] = step
        if step_id not in planned.grants:
            dropped[f"leases.{step_id}"] = ""
    for step_id, grant in planned.grants.items():
        lease = f"leases.{step_id}"
        update["$set"] |= {f"{lease}.token": grant.token, f"{lease}.worker": grant.worker, f"{lease}.ms": grant.ms}
        clocks[f"{lease}.at"] = True
    if dropped:
        update["$unset"] = update.get("$unset", {}) | dropped
    if clocks:
        update["$currentDate"] = clocks


def verdict(doc: Doc | None, planned: Commit) -> Verdict:
    """What became of a commit, read from the run afterwards."""
    if doc is None:
        return Verdict.FENCED
    if planned.step_id is not None and not planned.lapsed and doc["receipts"].get(planned.step_id) == planned.token:
        return Verdict.APPLIED
    if planned.events and doc["audit"] == planned.after["audit"]:
        return Verdict.APPLIED
    without_events = planned.unclaimed and not planned.events
    if without_events and doc["rev"] == planned.after["rev"] and planned.opened.items() <= doc["steps"].items():
        return Verdict.APPLIED
    if planned.token is not None and not holds(doc, planned.step_id or "", planned.token):
        return Verdict.FENCED
    return Verdict.MOVED


def unclaimed(run: RunDoc) -> Doc:
    """The condition that no step has been claimed since ``run`` was read: a claim does not change ``rev``."""
    return {f"leases.{step_id}": None for step_id in run["steps"] if step_id not in run["leases"]}


def holds(doc: Doc | None, step_id: str, token: str) -> bool:
    """Is the step leased with this token?"""
    return doc is not None and doc["leases"].get(step_id, {}).get("token") == token


# Which waiting turn of a conversation goes next: one that interrupts, then the oldest.
NEXT_TURN = [("backlog.front", -1), ("turn", 1)]


def release(run_id: str, hold: str) -> tuple[Doc, list[Doc]]:
    """Let a run that was held be admitted: condition and update."""
    return (
        {"_id": run_id, "backlog.hold": hold},
        [{"$set": {"backlog.class": "$priority"}}, {"$unset": "backlog.hold"}],
    )


def let_go(run: RunDoc) -> None:
    """What ``release`` does, to a document in memory."""
    run["backlog"]["class"] = run["priority"]
    del run["backlog"]["hold"]


def renewal(lease: Held, ms: int) -> tuple[Doc, Doc]:
    """Prolong a lease that still carries our token; the run need not be looked at before it is out."""
    path = f"leases.{lease.step_id}"
    return (
        {"_id": lease.run_id, f"{path}.token": lease.token},
        {"$set": {f"{path}.ms": ms}, "$currentDate": {f"{path}.at": True}},
    )


def audit_record(event: Event) -> Doc:
    """An event as a document; its id makes copying it twice harmless."""
    return {"_id": f"{event['run']}:{event['seq']:06d}", **event}


def audit_range(run_id: str) -> Doc:
    """The audit records of a run, by their ids: no index but the one on _id is needed."""
    return {"_id": {"$gte": f"{run_id}:", "$lt": f"{run_id};"}}


def audit_event(doc: Doc) -> Event:
    """The event of an audit record."""
    return cast("Event", {name: value for name, value in doc.items() if name != "_id"})


def of_conversation(tenant: str, conversation: str | None) -> Doc:
    """The runs of a conversation. The condition repeats what the index ``turns`` is limited to: else MongoDB does not
    use it and reads the whole collection."""
    return {"tenant": tenant, "conversation": {"$eq": conversation, "$type": "string"}}


def earlier_turns(run: RunDoc) -> Doc:
    """The answered turns of the run's conversation before it."""
    return {
        **of_conversation(run["tenant"], run["conversation"]),
        "turn": {"$lt": run["turn"]},
        "status": "succeeded",
    }


def window(newest_first: Iterable[Doc], tokens: int) -> list[Message]:
    """The newest answered turns that fit into ``tokens``, as messages, oldest first.

    About four characters a token, and eight tokens for the frame of a turn.
    """
    turns: list[list[Message]] = []
    for doc in newest_first:
        asked, answered = doc["input"], doc["result"]["answer"]
        tokens -= (len(asked) + len(answered)) // 4 + 8
        if tokens < 0:
            break
        turns.append([{"role": "user", "content": asked}, {"role": "assistant", "content": answered}])
    return [message for turn in reversed(turns) for message in turn]


def queues(beats: Iterable[Doc]) -> dict[Pool, Queue]:
    """What living workers say of the queues, together: a queue has been heard up to where the foremost worker is, but
    not past what another has taken out of it and not yet begun."""
    heard: dict[Pool, Queue] = {}
    oldest: dict[Pool, datetime] = {}
    for beat in beats:
        for pool, told in beat["queues"].items():
            if told["heard"] is not None and (pool not in heard or heard[pool].heard < told["heard"]):
                moved = told["heard"] + timedelta(milliseconds=told["wait_ms"])
                heard[pool] = Queue(told["heard"], told["wait_ms"], moved)
            if told["oldest"] is not None:
                oldest[pool] = min(told["oldest"], oldest.get(pool, told["oldest"]))
    return {
        pool: queue._replace(heard=min(queue.heard, oldest.get(pool, queue.heard))) for pool, queue in heard.items()
    }


def dead_letters(kind: Dead, which: Letters) -> Doc:
    """The condition for dead letters of a kind; covered by the index of its name."""
    field = "quarantine" if kind == "quarantined" else "refused"
    condition: Doc = {
        "status": "failed" if kind == "quarantined" else "rejected",
        f"{field}.code": {"$exists": True} if which.code is None else which.code,
        f"{field}.dropped": None,
        f"{field}.run": None,
    }
    if which.tenant is not None:
        condition["tenant"] = which.tenant
    if which.workflow is not None:
        condition["workflow.name"] = which.workflow
    if which.since is not None:
        condition["ended_at"] = {"$gte": which.since}
    return condition


def is_dead_letter(run: RunDoc, kind: Dead, which: Letters) -> bool:
    """The same on a run in hand."""
    quarantined = kind == "quarantined"
    kept = cast("Doc | None", run.get("quarantine") if quarantined else run.get("refused"))
    if kept is None or run["status"] != ("failed" if quarantined else "rejected") or {"dropped", "run"} & kept.keys():
        return False
    return which.code in (None, kept["code"]) and fits(run, which)


def fits(run: RunDoc, which: Letters) -> bool:
    """Tenant, workflow and time of a run."""
    return (
        which.tenant in (None, run["tenant"])
        and which.workflow in (None, run["workflow"].get("name"))
        and (which.since is None or (run["ended_at"] or run["created_at"]) >= which.since)
    )


def tells(run: RunDoc) -> bool:
    """Is there somebody who is to be told of the run's end?"""
    return run["reply"] is not None or "notify" in run
