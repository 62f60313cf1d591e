"""A run from request to answer, by the real engine and runtime over the in-memory store."""

from __future__ import annotations

import pytest

from agentq.errors import ProviderError
from agentq.protocol import Hint
from agentq.testing import ScriptedLlm, calls_tool, says
from agentq.testing.model import Script
from tests.unit.runtime.world import World

ROUTE = '{"route": "billing", "reason": "it is about money"}'
ACCEPT = '{"verdict": "accept", "problems": []}'


@pytest.mark.parametrize("inline", [True, False])
async def test_the_main_path_ends_with_an_accepted_answer(inline: bool) -> None:
    """route -> tool -> draft -> critic -> answer, in place or by hints: the same run."""
    llm = ScriptedLlm(
        [ROUTE, calls_tool("look_up", {"order": "17"}), says("Order 17 is shipped [KB-7] [KB-8]."), ACCEPT]
    )
    world = World(llm, inline=inline)
    world.submit()
    await world.run_all()
    run = world.run()
    llm.assert_complete()
    assert run["status"] == "succeeded"
    assert run["result"] == {
        "answer": "Order 17 is shipped [KB-7] [KB-8].", "agent": "billing", "acceptance": "critic",
        "citations": ["KB-7"], "tools": ["look_up"], "revisions": 0, "problems": [],
    }  # fmt: skip
    assert run["steps"] == {}
    assert run["leases"] == {}
    assert run["next_due"] is None
    assert run["usage"]["steps"] == 5
    assert run["usage"]["llm_calls"] == 4
    assert world.events() == [
        "run.accepted", "route.chosen", "agent.turn", "tool.called", "agent.turn", "critic.verdict", "run.succeeded"
    ]  # fmt: skip


async def test_parallel_tools_are_answered_in_the_order_the_model_asked(
) -> None:  # fmt: skip
    """Three calls in one turn are three steps; their results enter the transcript in the model's order."""
    wish = Script(
        tool_calls=tuple(
            {"id": f"c{index}", "name": "look_up", "arguments": {"order": str(index)}} for index in range(3)
        )
    )
    llm = ScriptedLlm([ROUTE, wish, says("done"), ACCEPT])
    world = World(llm)
    world.submit()
    await world.run_all()
    run = world.run()
    assert run["status"] == "succeeded"
    answered = [message["content"] for message in llm.calls[2].messages if message["role"] == "tool"]
    assert ['"0"' in answered[0], '"1"' in answered[1], '"2"' in answered[2]] == [True, True, True]
    assert world.events().count("tool.called") == 3


async def test_an_unusable_route_is_asked_once_again_then_the_default_takes_it() -> None:
    llm = ScriptedLlm(["I would say marketing", "ROUTE_TO: nobody\nREASON: x", says("ok"), ACCEPT])
    world = World(llm)
    world.submit()
    await world.run_all()
    assert world.run()["result"]["agent"] == "orders"
    assert "route.unusable" in world.events()


async def test_the_text_form_of_a_route_is_understood() -> None:
    llm = ScriptedLlm(["ROUTE_TO: billing\nREASON: money", says("ok"), ACCEPT])
    world = World(llm)
    world.submit()
    await world.run_all()
    assert world.run()["result"]["agent"] == "billing"


async def test_revisions_are_bounded_and_the_answer_says_how_it_was_accepted() -> None:
    revise = '{"verdict": "revise", "problems": ["name the order"]}'
    llm = ScriptedLlm([ROUTE, says("a"), revise, says("b"), revise, says("c"), revise])
    world = World(llm)
    world.submit()
    await world.run_all()
    result = world.run()["result"]
    assert (result["answer"], result["acceptance"], result["revisions"]) == ("c", "revisions_exhausted", 2)
    assert result["problems"] == ["name the order"]
    assert "name the order" in llm.calls[3].messages[-1]["content"]


async def test_react_text_works_for_models_without_native_tools() -> None:
    llm = ScriptedLlm(
        [
            ROUTE,
            'Thought: look\nAction: look_up\nAction Input: {"order": "17"}\nObservation: invented',
            'Thought: refund\nAction: refund({"order": "17"})',
            "Thought: done\nFinal Answer: shipped and refunded",
            ACCEPT,
        ]
    )
    world = World(llm, native=False)
    world.submit()
    await world.run_all()
    assert world.run()["result"]["answer"] == "shipped and refunded"
    assert world.run()["result"]["tools"] == ["look_up", "refund"]
    assert llm.calls[2].tools == []
    assert llm.calls[2].messages[-1]["content"].startswith("Observation: ")
    assert "invented" not in llm.calls[2].messages[-1]["content"]


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        (calls_tool("nope", {}), "nope"),
        (calls_tool("look_up", {"order": 3}), "order"),
        (calls_tool("look_up", "{not json"), "JSON"),
        (calls_tool("look_up", {"order": "missing"}), "There is no such order."),
    ],
)
async def test_what_goes_wrong_in_a_tool_is_an_observation(call: Script, seen: str) -> None:
    """Unknown tool, bad arguments, a refusal: the model hears of it and goes on."""
    llm = ScriptedLlm([ROUTE, call, says("sorry"), ACCEPT])
    world = World(llm)
    world.submit()
    await world.run_all()
    assert world.run()["status"] == "succeeded"
    assert seen in llm.calls[2].messages[-1]["content"]


async def test_a_budget_ends_the_run_with_the_best_draft_so_far() -> None:
    wish = calls_tool("look_up", {"order": "1"}, text="Your order seems shipped.")
    llm = ScriptedLlm([ROUTE, wish, wish, wish])
    world = World(llm, limits={"max_turns": 3})
    world.submit()
    await world.run_all()
    run = world.run()
    assert run["status"] == "succeeded"
    assert run["result"]["acceptance"] == "budget"
    assert run["result"]["reason"] == "agent max_turns"
    assert run["result"]["answer"] == "Your order seems shipped."


async def test_a_budget_without_any_draft_is_a_failed_run_that_says_so() -> None:
    wish = calls_tool("look_up", {"order": "1"})
    world = World(ScriptedLlm([ROUTE, wish]), run={"max_steps": 2})
    world.submit()
    await world.run_all()
    run = world.run()
    assert (run["status"], run["error"]["code"]) == ("failed", "budget_exhausted")


async def test_a_retryable_failure_waits_as_an_open_step_and_is_tried_again() -> None:
    """Retry-After is honoured without holding a worker."""
    busy = ProviderError("busy", code="rate_limited", retryable=True, retry_after_s=20)
    llm = ScriptedLlm([busy, ROUTE, busy, says("ok"), ACCEPT])
    world = World(llm)
    world.submit()
    began = world.time
    await world.run_all()
    assert world.run()["status"] == "succeeded"
    assert (world.run()["ended_at"] - began).total_seconds() >= 40
    assert world.events().count("step.failed") == 2


async def test_a_step_whose_attempts_are_used_up_is_quarantined_with_its_cause() -> None:
    busy = ProviderError("busy", code="provider_unavailable", retryable=True)
    llm = ScriptedLlm([ROUTE]).on("turn", busy, always=True)
    world = World(llm)
    world.submit()
    await world.run_all()
    run = world.run()
    assert (run["status"], run["error"]["code"]) == ("failed", "provider_unavailable")
    assert run["quarantine"]["step"]["attempt"] == 5


async def test_a_later_run_of_a_conversation_sees_the_earlier_turns() -> None:
    llm = ScriptedLlm([ROUTE, says("It is shipped."), ACCEPT, ROUTE, says("On Monday."), ACCEPT])
    world = World(llm)
    world.submit("Where is order 17?", "r1", conversation="c", turn=1)
    await world.run_all()
    world.submit("When?", "r2", conversation="c", turn=2)
    await world.run_all()
    spoken = [message["content"] for message in llm.calls[4].messages[1:]]
    assert spoken == ["Where is order 17?", "It is shipped.", "When?"]


async def test_duplicate_and_stale_hints_do_nothing() -> None:
    llm = ScriptedLlm([ROUTE, says("ok"), ACCEPT])
    world = World(llm)
    world.submit()
    world.hints += [*world.hints * 4, ("router", Hint("r1", "s9", 1)), ("router", Hint("nope", "s1", 1))]
    await world.run_all()
    world.hints += [("specialist", Hint("r1", "s2", 1)), ("router", Hint("r1", "s1", 1))]
    await world.deliver()
    llm.assert_complete()
    assert world.run()["usage"]["llm_calls"] == 3


async def test_cancel_ends_a_waiting_run_and_books_nothing_twice() -> None:
    busy = ProviderError("busy", code="rate_limited", retryable=True, retry_after_s=3000)
    world = World(ScriptedLlm([ROUTE, busy]))
    world.submit()
    await world.deliver()
    run = world.store.runs["r1"]
    run["cancel"], run["next_due"], run["rev"] = (
        {"reason": "changed my mind", "at": world.time},
        world.time,
        run["rev"] + 1,
    )
    await world.scheduler().tick()
    assert world.run()["status"] == "cancelled"
    assert world.events()[-1] == "run.cancelled"


async def test_an_answer_for_a_waiting_caller_is_stored_when_the_run_ends() -> None:
    world = World(ScriptedLlm([ROUTE, says("ok"), ACCEPT]))
    world.submit()
    world.store.runs["r1"]["reply"] = {"task_id": "t-1"}
    await world.run_all()
    assert world.replies == ["r1"]


async def test_the_words_of_an_unexpected_error_are_in_no_log(caplog: pytest.LogCaptureFixture) -> None:
    """They may quote what a person wrote: a log says where it happened and what class of error it was."""

    def trip(_: object) -> str:
        raise ValueError("CANARY: the customer's own words")

    llm = ScriptedLlm().on("route", trip, ROUTE).on("turn", says("ok")).on("critique", ACCEPT)
    world = World(llm)
    world.submit()
    await world.run_all()
    assert world.run()["status"] == "succeeded"
    assert "CANARY" not in caplog.text
    assert "ValueError at test_run.py" in caplog.text
