"""The store's conditions and updates, apart from any connection."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from agentq.engine import advance
from agentq.engine.commit import Grant, plan
from agentq.protocol import Hint
from agentq.store import documents
from agentq.store.api import Verdict
from agentq.store.memory import MemoryStore
from tests.unit.engine.play import START, TO_BILLING, Play, wish


def stored(play: Play, **changes: Any) -> Any:
    return {**play.run, **changes}


def test_a_commit_is_known_as_applied_by_its_receipt() -> None:
    play = Play().says(TO_BILLING)
    assert play.last is not None
    assert documents.verdict(stored(play), play.last) is Verdict.APPLIED


def test_a_commit_whose_lease_is_gone_is_fenced_and_one_whose_lease_holds_may_decide_again() -> None:
    play = Play()
    decision = advance.wake(play.run, "s1", 0)
    planned = plan(play.run, decision, now=START, step_id="s1", token="t1")
    ours = {"token": "t1", "worker": "w", "ms": 1, "at": START}
    assert documents.verdict(stored(play, rev=9, leases={}), planned) is Verdict.FENCED
    assert documents.verdict(stored(play, rev=9, leases={"s1": {**ours, "token": "t2"}}), planned) is Verdict.FENCED
    assert documents.verdict(stored(play, rev=9, leases={"s1": ours}), planned) is Verdict.MOVED
    assert documents.verdict(None, planned) is Verdict.FENCED


def test_an_act_of_the_scheduler_that_was_applied_is_known_as_applied_though_it_wrote_no_event() -> None:
    """A wake and a repeated hint write no event; taken for lost, their hints would not be published."""
    for act in ("wake", "hint_again"):
        play = Play().fails()
        decision = advance.wake(play.run, "s1", 0) if act == "wake" else advance.hint_again(play.run, "s1")
        planned = plan(play.run, decision, now=START, unclaimed=("s1",))
        assert documents.verdict({**planned.after}, planned) is Verdict.APPLIED
        assert documents.verdict(stored(play), planned) is Verdict.MOVED
        assert documents.verdict(stored(play, rev=play.run["rev"] + 1), planned) is Verdict.MOVED


def test_a_commit_touches_only_the_paths_of_its_own_steps() -> None:
    """Leases that others take meanwhile on parallel steps are left alone."""
    play = Play().says(TO_BILLING).says("", [wish("look_up"), wish("look_up")])
    play.sees("x", "s3")
    assert play.last is not None
    _, update = documents.commit(play.last)
    touched = {path for part in update.values() for path in part}
    assert {path for path in touched if path.startswith(("steps", "leases"))} == {"steps.s3", "leases.s3"}


async def test_a_claim_makes_the_run_due_no_later_than_its_lease_runs_out() -> None:
    """A step that was hinted seven times is looked at every half hour, but once claimed, its worker may die at once."""
    play = Play()
    play.run["steps"] = {"s1": {**play.run["steps"]["s1"], "hints": 7}}
    play.run = plan(play.run, advance.hint_again(play.run, "s1"), now=START).after
    store = MemoryStore(lambda: START)
    store.insert(dict(play.run))
    run = await store.claim(Hint("r1", "s1", 1), Grant("t", "w", 30_000))
    assert run is not None
    assert run["next_due"] is not None
    assert (run["next_due"] - START).total_seconds() <= 30


@given(st.lists(st.tuples(st.text(max_size=40), st.text(max_size=40)), max_size=20), st.integers(0, 300))
def test_the_window_holds_the_newest_turns_that_fit_in_their_order(turns: list[tuple[str, str]], tokens: int) -> None:
    docs = [{"input": asked, "result": {"answer": answered}} for asked, answered in turns]
    messages = documents.window(docs, tokens)
    kept = len(messages) // 2
    assert [message["content"] for message in messages] == [
        text for asked, answered in reversed(turns[:kept]) for text in (asked, answered)
    ]
    cost = [(len(asked) + len(answered)) // 4 + 8 for asked, answered in turns]
    assert sum(cost[:kept]) <= tokens
    assert kept == len(turns) or sum(cost[: kept + 1]) > tokens


def test_audit_records_sort_by_their_ids_and_come_back_as_events() -> None:
    events = Play().says(TO_BILLING).run["events"]
    records = [documents.audit_record({**event, "seq": seq}) for seq, event in ((9, events[0]), (10, events[1]))]
    assert records[0]["_id"] < records[1]["_id"]
    assert documents.audit_event(documents.audit_record(events[0])) == events[0]
    bounds = documents.audit_range("r1")["_id"]
    assert bounds["$gte"] < records[0]["_id"] < bounds["$lt"]
    assert not bounds["$gte"] < "r12:000001" < bounds["$lt"]
