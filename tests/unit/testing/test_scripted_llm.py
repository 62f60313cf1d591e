"""The scripted model that users' own tests build on."""

from __future__ import annotations

import asyncio

import pytest

import agentq.testing
from agentq.errors import ProviderError
from agentq.llm.endpoints import Endpoints
from agentq.llm.types import Llm, LlmCall, LlmReply
from agentq.testing import Held, ScriptedLlm, calls_tool, no_real_models, says
from schemas.catalog import ModelSpec

MODEL = ModelSpec(provider="openai", model="m-1", input_usd_per_mtok=1.0, output_usd_per_mtok=2.0)


def a_call(purpose: str = "turn", content: str = "Where is A-17?") -> LlmCall:
    return LlmCall(model=MODEL, messages=[{"role": "user", "content": content}], purpose=purpose)


async def test_answers_come_in_order_and_calls_are_recorded():
    llm = ScriptedLlm(["one", calls_tool("look_up", {"order": "A-17"}), says("three", finish="length")])
    replies = [await llm.complete(a_call(content=str(n))) for n in range(3)]
    assert [(r.text, r.finish) for r in replies] == [("one", "stop"), ("", "tool_calls"), ("three", "length")]
    assert replies[1].tool_calls == [{"id": "call_1", "name": "look_up", "arguments": {"order": "A-17"}}]
    assert [call.messages[0]["content"] for call in llm.calls] == ["0", "1", "2"]
    llm.assert_complete()


async def test_it_is_an_llm():
    llm: Llm = ScriptedLlm(["yes"])
    assert (await llm.complete(a_call())).text == "yes"


async def test_tokens_and_cost_are_counted_unless_the_script_says_them():
    llm = ScriptedLlm(["x" * 8, says("x", input_tokens=100, output_tokens=50)])
    first, second = await llm.complete(a_call(content="y" * 16)), await llm.complete(a_call())
    assert (first.usage, first.cost_nano_usd) == ({"input_tokens": 4, "output_tokens": 2}, 4 * 1_000 + 2 * 2_000)
    assert (second.usage, second.cost_nano_usd) == ({"input_tokens": 100, "output_tokens": 50}, 200_000)
    assert first.model == "m-1"


async def test_a_finished_reply_is_given_as_it_is():
    reply = LlmReply("t", [], "stop", {"input_tokens": 1, "output_tokens": 1}, 7, "other", 3)
    assert await ScriptedLlm([reply]).complete(a_call()) is reply


async def test_errors_are_raised_and_the_next_call_goes_on():
    llm = ScriptedLlm([ProviderError("busy", code="rate_limited", retryable=True, retry_after_s=3), "then"])
    with pytest.raises(ProviderError) as caught:
        await llm.complete(a_call())
    assert caught.value.retry_after_s == 3
    assert (await llm.complete(a_call())).text == "then"


async def test_matching_answers_go_first_and_the_rest_comes_from_the_list():
    llm = ScriptedLlm(["listed"]).on("route", "billing").on(lambda call: "refund" in call.messages[-1]["content"], "no")
    assert (await llm.complete(a_call("route"))).text == "billing"
    assert (await llm.complete(a_call(content="a refund"))).text == "no"
    assert (await llm.complete(a_call(content="a refund"))).text == "listed", "its own answers are used up"
    llm.assert_complete()


async def test_an_answer_for_always_is_repeated_and_may_stay_unused():
    llm = ScriptedLlm().on("route", "first", "rest", always=True).on("critique", "accept", always=True)
    assert [(await llm.complete(a_call("route"))).text for _ in range(3)] == ["first", "rest", "rest"]
    llm.assert_complete()


async def test_an_answer_may_be_made_from_the_call():
    llm = ScriptedLlm([lambda call: call.messages[-1]["content"].upper()])
    assert (await llm.complete(a_call(content="hi"))).text == "HI"


async def test_a_call_without_an_answer_fails_at_once_and_at_the_end():
    llm = ScriptedLlm()
    with pytest.raises(AssertionError, match=r"no answer for call 1, purpose 'turn', last message user: 'Where"):
        await llm.complete(a_call())
    with pytest.raises(AssertionError, match="calls without an answer: call 1"):
        llm.assert_complete()


async def test_answers_nobody_asked_for_fail_at_the_end():
    llm = ScriptedLlm(["one", "two"]).on("route", "a")
    await llm.complete(a_call())
    with pytest.raises(AssertionError, match=r"\{\"purpose 'route'\": 1, 'any call': 1\}; there were 1 calls"):
        llm.assert_complete()


def test_a_rule_without_an_answer_is_refused():
    with pytest.raises(ValueError, match="needs an answer"):
        ScriptedLlm().on("route")


async def test_a_held_answer_waits_for_its_release_while_others_go_on():
    held = Held(calls_tool("t"))
    llm = ScriptedLlm([held, "quick"])
    slow = asyncio.create_task(llm.complete(a_call()))
    await held.started.wait()
    assert (await llm.complete(a_call())).text == "quick"
    assert not slow.done()
    held.release()
    assert (await slow).tool_calls[0]["name"] == "t"
    assert not held.cancelled.is_set()


async def test_a_held_answer_tells_that_its_call_was_cancelled():
    held = Held("never")
    task = asyncio.create_task(ScriptedLlm([held]).complete(a_call()))
    await held.started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert held.cancelled.is_set()


async def test_a_held_error_is_raised_after_its_release():
    held = Held(ProviderError("cut", code="response_cut", retryable=True))
    task = asyncio.create_task(ScriptedLlm([held]).complete(a_call()))
    held.release()
    with pytest.raises(ProviderError, match="cut"):
        await task


def test_the_kill_switch_is_restored_even_after_an_error_and_nests():
    before = Endpoints.only_loopback
    with no_real_models():
        with pytest.raises(KeyError), no_real_models():
            raise KeyError
        assert Endpoints.only_loopback
    assert Endpoints.only_loopback == before


def test_what_is_exported():
    assert agentq.testing.__all__ == ["Answer", "Held", "Script", "ScriptedLlm", "calls_tool", "no_real_models", "says"]
