"""What is read from the text of models."""

from __future__ import annotations

import json
import time

import bson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentq.canonical import canonical_json
from agentq.engine import parse

WORDS = st.text(max_size=30) | st.sampled_from(
    ["ROUTE_TO:", "REASON:", "Action:", "Action Input:", "Observation:", "Final Answer:", "```json\n", "```",
     '{"route":',
     '{"verdict": "revise", "problems": [', '"}', "{", "}", "[", "]", "(", ")", "\n", "**", "NaN", "\\ud800", "1" * 30]
)  # fmt: skip
MODEL_TEXT = st.lists(WORDS, max_size=20).map("".join)


@given(MODEL_TEXT)
def test_reading_is_total(text: str) -> None:
    """Whatever a model writes, no reader raises."""
    parse.json_object(text)
    parse.route(text, ["billing", "orders"])
    parse.verdict(text)
    parse.react(text)
    parse.citations(text, text)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1}',
        '  {"a": 1}  ',
        'Sure, here it is: {"a": 1}. Anything else?',
        '```json\n{"a": 1}\n```',
        '```\n{"a": 1}\n```',
        'As JSON:\n```json\n{"a": 1}\n```\nThat {is} all.',
        'Not this {one}, but {"a": 1}.',
        '```python\nprint({})\n```\nand\n```json\n{"a": 1}\n```',
    ],
)
def test_a_json_object_is_found_in_whatever_surrounds_it(text: str) -> None:
    """Bare, fenced, amid prose, after braces that are no JSON."""
    found = parse.json_object(text)
    assert found in ({"a": 1}, {})
    assert found == {"a": 1} or "print({})" in text


@pytest.mark.parametrize("text", ["", "no", "[1, 2]", "{", '{"a": }', "{'a': 1}", '{"a":' * 5000])
def test_where_there_is_no_object_there_is_none(text: str) -> None:
    assert parse.json_object(text) is None


@pytest.mark.parametrize(
    "text",
    [
        '{"n": NaN}', '{"n": Infinity}', '{"n": -Infinity}', '{"n": 1180591620717411303424}', '{"t": "\\ud83d"}',
        '{"a\\u0000b": 1}', '{"deep": [{"n": NaN}]}',
    ],
)  # fmt: skip
def test_what_is_read_can_be_stored(text: str) -> None:
    """Values from a model's text go into the run and its audit chain: BSON and canonical JSON must take them.

    One that they do not take would fail the commits of every run in its group.
    """
    for found in (parse.json_object(text), parse.react(f"Action: look_up\nAction Input: {text}")):
        value = {"arguments": found.arguments if isinstance(found, parse.Action) else found}
        bson.encode(value)
        canonical_json(value)


@given(MODEL_TEXT)
def test_whatever_is_read_can_be_stored(text: str) -> None:
    read = [parse.json_object(text), parse.route(text, ["billing"]), parse.verdict(text)]
    reason = read[1].reason if isinstance(read[1], parse.Route) else ""
    problems = read[2].problems if isinstance(read[2], parse.Verdict) else []
    canonical_json([read[0], reason, problems])
    bson.encode({"object": read[0]})


@pytest.mark.parametrize(
    "text",
    ["\n" * 40_000, "\n*" * 20_000, "```" + " " * 40_000, "Action: a(\n" * 4_000, "{" * 40_000, "[" * 40_000,
     "Final Answer" + "*" * 40_000, "REASON:" + "\n" * 40_000],
    ids=["line breaks", "stars", "open fence", "actions", "braces", "brackets", "final answer", "reason"],
)  # fmt: skip
@pytest.mark.timeout(20)
def test_reading_takes_linear_time(text: str) -> None:
    """A model that writes 40 kB of anything must not stop its worker: milliseconds, where a quadratic pattern takes
    a minute. The bound leaves room for a slow machine."""
    began = time.process_time()
    parse.json_object(text)
    parse.route(text, ["billing"])
    parse.verdict(text)
    parse.react(text)
    assert time.process_time() - began < 2.0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"route": "billing", "reason": "money"}', "money"),
        ('{"route": " Billing "}', ""),
        ("ROUTE_TO: billing\nREASON: money", "money"),
        ("I think so.\n**ROUTE_TO**: `billing`\n**REASON**: money", "money"),
        ("route_to: Billing", ""),
        ('- ROUTE_TO: "billing"', ""),
    ],
)
def test_a_route_is_read_in_every_form(text: str, reason: str) -> None:
    """As JSON or as lines, in any case and emphasis; the name comes back as it was offered."""
    assert parse.route(text, ["orders", "billing"]) == parse.Route("billing", reason)


@pytest.mark.parametrize(
    "text", ["", "billing", "ROUTE_TO: marketing", '{"route": "marketing"}', '{"route": 7}', '{"route": null}', "{}"]
)
def test_a_route_that_was_not_offered_is_none(text: str) -> None:
    assert parse.route(text, ["orders", "billing"]) is None


def test_a_verdict_is_accept_or_revise_with_problems() -> None:
    assert parse.verdict('{"verdict": "accept", "problems": ["ignored"]}') == parse.Verdict(accept=True, problems=[])
    assert parse.verdict('{"verdict": "revise", "problems": ["a", " ", 3]}') == parse.Verdict(False, ["a", "3"])


@pytest.mark.parametrize(
    "text",
    ["fine", "{}", '{"verdict": "maybe"}', '{"verdict": "revise"}', '{"verdict": "revise", "problems": []}',
     '{"verdict": "revise", "problems": "all of it"}', '{"verdict": ["accept"]}'],
)  # fmt: skip
def test_a_verdict_without_a_ground_is_none(text: str) -> None:
    """A revision that names no problem cannot be acted upon."""
    assert parse.verdict(text) is None


def test_the_length_of_what_is_kept_is_bounded() -> None:
    verdict = parse.verdict(json.dumps({"verdict": "revise", "problems": ["x" * 9000] * 99}))
    route = parse.route(json.dumps({"route": "a", "reason": "x" * 9000}), ["a"])
    assert verdict is not None
    assert route is not None
    assert ([len(problem) for problem in verdict.problems], len(route.reason)) == ([500] * 10, 500)


LOOK_UP = parse.Action("look_up", {"order": "17"})


@pytest.mark.parametrize(
    "text",
    [
        'Thought: look\nAction: look_up\nAction Input: {"order": "17"}',
        'Action: `look_up`\nAction Input: ```json\n{"order": "17"}\n```',
        '**Action:** look_up\n**Action Input:** {"order": "17"}',
        'Thought: look\nAction: look_up({"order": "17"})',
        'Action: look_up({"order": "17"})\nObservation: shipped\nFinal Answer: shipped',
        'Action: look_up\nAction Input: {"order": "17"}\nObservation: {"order": "18"}\nThought: done\nFinal Answer: x',
    ],
)
def test_react_calls_are_read_in_both_forms_and_inventions_after_them_are_ignored(text: str) -> None:
    """An observation that the model made up, and an answer drawn from it, never count."""
    assert parse.react(text) == LOOK_UP


def test_react_arguments_that_are_no_json_are_kept_as_text_for_the_tool_to_refuse() -> None:
    assert parse.react("Action: look_up\nAction Input: order 17") == parse.Action("look_up", "order 17")
    assert parse.react("Action: look_up") == parse.Action("look_up", {})
    assert parse.react("Action: look_up()") == parse.Action("look_up", {})


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Thought: done\nFinal Answer: It is shipped.", "It is shipped."),
        ("**Final Answer:** It is shipped.\nAction: none", "It is shipped.\nAction: none"),
        ("  It is shipped. ", "It is shipped."),
        ("", ""),
    ],
)
def test_react_text_without_an_action_first_is_an_answer(text: str, answer: str) -> None:
    assert parse.react(text) == answer


def test_citations_are_the_ids_that_the_tools_gave_once_and_in_order() -> None:
    seen = 'Article KB-7 and KB-9; {"id": "doc:3.1"}'
    assert parse.citations("See [KB-9], [KB-7], [KB-9], [KB-8] and [doc:3.1] [not an id].", seen) == [
        "KB-9", "KB-7", "doc:3.1"
    ]  # fmt: skip


def test_a_piece_of_an_id_is_no_citation() -> None:
    """[7] or [KB-1] is not vouched for by a result that says 17 or KB-12."""
    assert parse.citations("As said in [7], [1] and [KB-1].", "order 17 is described in KB-12") == []
