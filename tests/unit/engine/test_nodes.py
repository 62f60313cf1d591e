"""The way of a run through its nodes, decided from outcomes alone."""

from __future__ import annotations

from typing import Any

import pytest

from agentq.engine.commit import hints
from agentq.protocol import Hint
from schemas.catalog import Bundle
from tests.unit.engine.play import ACCEPT, CRITIC, REVISE, ROUTE, TO_BILLING, WORK, Play, bundle, wish

LOOK = {"type": "tool", "tool": "look_up"}


def agent(name: str = "billing", then: str = "end") -> dict[str, Any]:
    return {"type": "agent", "agent": name, "next": then}


def test_every_node_opens_its_step_in_its_pool() -> None:
    """Router, specialist, tool runner, critic: kind, pool, recovery and a new id each."""
    play = Play()
    seen = []
    for turn in (
        lambda: play.says(TO_BILLING),
        lambda: play.says("", [wish("refund")]),
        lambda: play.sees("refunded"),
        lambda: play.says("It is refunded."),
        lambda: play.says(ACCEPT),
    ):
        step = play.run["steps"][play.step]
        seen.append((play.step, step["kind"], step["pool"], step["recovery"]))
        turn()
    assert seen == [
        ("s1", "route", "router", "retry"),
        ("s2", "turn", "specialist", "retry"),
        ("s3", "tool", "tools", "keyed"),
        ("s4", "turn", "specialist", "retry"),
        ("s5", "critique", "critic", "retry"),
    ]
    assert play.run["status"] == "succeeded"
    assert play.result["agent"] == "billing"


def test_a_step_that_opens_is_hinted_at_its_first_attempt() -> None:
    play = Play().says(TO_BILLING)
    assert play.last is not None
    assert hints(play.last) == [("specialist", Hint("r1", "s2", 1))]


def test_a_workflow_without_a_router_starts_with_its_agent() -> None:
    play = Play(bundle({"agent": agent()}, "agent"))
    assert (play.kind, play.run["steps"]["s1"]["pool"]) == ("turn", "specialist")
    play.says("Hello.")
    assert (play.run["status"], play.result["answer"], play.result["acceptance"]) == (
        "succeeded", "Hello.", "unreviewed"
    )  # fmt: skip


def test_a_tool_node_before_an_agent_reads_its_arguments_from_the_run_and_the_agent_sees_its_result() -> None:
    nodes = {
        "look": {**LOOK, "args": {"q": {"from": "input"}, "who": {"from": "user"}, "n": 3}, "next": "agent"},
        "agent": agent(),
    }
    play = Play(bundle(nodes, "look"), "Where is it?", user="C-7")
    wanted = play.tool()
    assert (wanted.name, wanted.arguments) == ("look_up", {"q": "Where is it?", "who": "C-7", "n": 3})
    assert wanted.allowed == ("look_up",)
    messages = play.sees("It is on its way.").call().messages
    assert [(message["role"], message["content"]) for message in messages[1:]] == [
        ("user", "Where is it?"), ("assistant", ""), ("tool", "It is on its way.")
    ]  # fmt: skip
    assert messages[2]["tool_calls"][0]["id"] == messages[3]["tool_call_id"]


def after_an_agent() -> Bundle:
    return bundle(
        {
            "agent": agent(then="critic"),
            "critic": {**CRITIC, "next": "send"},
            "send": {"type": "tool", "tool": "post", "args": {"text": {"from": "draft"}}, "next": "end"},
        },
        "agent",
    )


def test_a_tool_node_after_an_agent_gets_the_draft_and_the_draft_stays_the_answer() -> None:
    """What the critic accepted is what the caller gets, not the tool's receipt."""
    play = Play(after_an_agent()).says("Dear customer").says(ACCEPT)
    assert play.tool().arguments == {"text": "Dear customer"}
    assert play.run["steps"][play.step]["recovery"] == "unsafe"
    play.sees('{"letter": 1}')
    assert (play.run["status"], play.result["answer"], play.result["acceptance"], play.result["tools"]) == (
        "succeeded", "Dear customer", "critic", ["post"]
    )  # fmt: skip


def test_a_workflow_of_tools_alone_answers_with_its_last_result() -> None:
    play = Play(bundle({"look": {**LOOK, "next": "end"}}, "look")).sees('{"order": 17}')
    assert (play.run["status"], play.result["answer"]) == ("succeeded", '{"order": 17}')


def test_what_a_tool_node_found_is_no_draft_of_the_agent() -> None:
    """An agent that runs out of its budget without a word has no answer; raw look-ups are not sent to customers."""
    nodes = {"look": {**LOOK, "next": "agent"}, "agent": agent()}
    play = Play(bundle(nodes, "look", max_turns=1)).sees('{"secret": "row"}').says("", [wish("look_up")])
    assert play.run["status"] == "failed"
    assert play.run["error"] is not None
    assert play.run["error"]["code"] == "budget_exhausted"


def test_an_unusable_route_is_asked_again_with_what_was_wrong_then_the_default_takes_it() -> None:
    play = Play().says("marketing!")
    assert play.kind == "route"
    assert play.call().messages[-2]["content"] == "marketing!"
    play.says("marketing, I said")
    assert play.kind == "turn"
    assert play.run["state"] is not None
    assert play.run["state"]["visits"]["agent"]["agent"] == "orders"
    assert play.happened() == ["run.accepted", "route.unusable", "route.chosen"]


def test_an_empty_answer_is_nudged_while_turns_last() -> None:
    play = Play(bundle(max_turns=2)).says(TO_BILLING).says("  ")
    assert play.kind == "turn"
    assert "empty" in play.call().messages[-1]["content"]
    play.says("")
    assert play.run["status"] == "failed"
    assert play.run["events"][-1]["data"]["reason"] == "agent max_turns"


def test_calls_past_the_agents_limit_are_refused_in_words_and_cost_no_step() -> None:
    play = Play(bundle(max_tool_calls=2)).says(TO_BILLING).says("", [wish("look_up")] * 3)
    assert len(play.run["steps"]) == 2
    first, second = play.run["steps"]
    play.sees("one", first)
    play.sees("two", second)
    answered = [message["content"] for message in play.call().messages if message["role"] == "tool"]
    assert answered[:2] == ["one", "two"]
    assert "no tool calls are left" in answered[2]
    play.says("", [wish("look_up")])
    assert play.kind == "turn"
    assert "no tool calls are left" in play.call().messages[-1]["content"]


def test_parallel_calls_are_answered_in_the_models_order_whichever_ends_first() -> None:
    play = Play().says(TO_BILLING).says("", [wish("look_up", {"n": index}) for index in range(3)])
    for step in reversed(list(play.run["steps"])):
        play.sees(f"result of {step}", step)
    answered = [message["content"] for message in play.call().messages if message["role"] == "tool"]
    assert answered == ["result of s3", "result of s4", "result of s5"]


def test_tool_call_ids_are_the_runs_own_and_unique() -> None:
    """Models repeat ids; the transcript never does."""
    play = Play().says(TO_BILLING)
    for _ in range(2):
        play.says("", [wish("look_up"), wish("look_up")])
        for step in list(play.run["steps"]):
            play.sees("x", step)
    ids = [call["id"] for message in play.call().messages for call in message.get("tool_calls", [])]
    assert len(set(ids)) == len(ids) == 4


def test_a_tool_nobody_knows_is_still_a_step_and_may_be_retried() -> None:
    play = Play().says(TO_BILLING).says("", [wish("nope")])
    assert play.run["steps"][play.step]["recovery"] == "retry"
    assert play.tool().spec is None


def test_a_keyed_tool_that_timed_out_is_tried_again_as_the_same_step_then_told_as_unknown() -> None:
    """The same step id is the same idempotency key; after the third try the model hears that nobody knows."""
    play = Play().says(TO_BILLING).says("", [wish("refund", {"order": "17"})])
    key = play.step
    for attempt in (1, 2):
        play.sees("no answer", unknown=True)
        assert play.step == key
        step = play.run["steps"][key]
        assert step["attempt"] == attempt + 1
        assert step["not_before"] > play.now
        assert play.last is not None
        assert hints(play.last) == []
    play.sees("no answer", unknown=True)
    assert play.kind == "turn"
    assert "not known whether it took effect" in play.call().messages[-1]["content"]
    assert play.happened()[-3:] == ["tool.retried", "tool.retried", "tool.called"]


def test_an_unsafe_tool_that_timed_out_is_never_tried_again_and_told_as_unknown() -> None:
    play = Play().says(TO_BILLING).says("", [wish("post")]).sees("no answer", unknown=True)
    assert play.kind == "turn"
    assert "Do not call it again" in play.call().messages[-1]["content"]


def test_a_read_that_timed_out_is_an_observation() -> None:
    play = Play().says(TO_BILLING).says("", [wish("look_up")]).sees("no answer", ok=False)
    assert play.call().messages[-1]["content"] == "no answer"


def test_a_revision_goes_back_to_the_agent_with_the_problems_and_the_answer_says_how_often() -> None:
    play = Play().says(TO_BILLING).says("a").says(REVISE)
    assert play.kind == "turn"
    assert "name the order" in play.call().messages[-1]["content"]
    play.says("b, order 17").says(ACCEPT)
    assert (play.result["answer"], play.result["revisions"], play.result["acceptance"]) == ("b, order 17", 1, "critic")
    assert play.result["problems"] == []


def test_revisions_end_and_the_answer_says_so() -> None:
    nodes = {"route": ROUTE, "agent": WORK, "critic": {**CRITIC, "max_revisions": 0}}
    play = Play(bundle(nodes)).says(TO_BILLING).says("a").says(REVISE)
    assert (play.result["answer"], play.result["acceptance"]) == ("a", "revisions_exhausted")
    assert play.result["problems"] == ["name the order"]


def test_a_critic_that_says_nothing_usable_twice_lets_the_draft_pass_as_unreviewed() -> None:
    play = Play().says(TO_BILLING).says("a").says("looks good to me")
    assert play.kind == "critique"
    play.says("as I said")
    assert (play.run["status"], play.result["acceptance"]) == ("succeeded", "unreviewed")
    assert play.happened().count("critic.unusable") == 2


def test_a_verdict_on_an_older_draft_says_nothing_about_a_newer_one() -> None:
    """Accepted is what the critic saw last."""
    play = Play().says(TO_BILLING).says("a").says(REVISE).says("b").says("hm").says("hm")
    assert (play.result["answer"], play.result["acceptance"]) == ("b", "unreviewed")


def test_the_critic_sees_the_request_the_tool_results_and_the_draft() -> None:
    play = Play().says(TO_BILLING).says("", [wish("look_up", {"order": "17"})]).sees("shipped").says("It is shipped.")
    asked = play.call().messages[-1]["content"]
    assert [part in asked for part in ("Where is order 17?", 'look_up({"order": "17"}) -> shipped', "It is shipped.")]


def test_thinking_aloud_beside_a_tool_call_is_the_draft_until_there_is_a_better_one() -> None:
    play = Play(bundle(max_turns=2)).says(TO_BILLING).says("Seems shipped.", [wish("look_up")]).sees("shipped")
    play.says("", [wish("look_up")])
    assert (play.result["answer"], play.result["acceptance"]) == ("Seems shipped.", "budget")


@pytest.mark.parametrize("native", [True, False])
def test_models_without_native_tools_are_asked_and_read_in_text(native: bool) -> None:
    play = Play(bundle(native=native)).says(TO_BILLING)
    assert bool(play.call().tools) is native
    assert ("Action Input" in play.call().messages[0]["content"]) is not native


def test_the_key_of_a_call_is_the_step_and_differs_from_every_other_steps() -> None:
    play = Play()
    keys = [play.call().key]
    keys.append(play.fails().call().key)
    keys.append(play.says(TO_BILLING).call().key)
    assert keys == ["r1:s1", "r1:s1", "r1:s2"]
