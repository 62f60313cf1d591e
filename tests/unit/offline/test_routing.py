"""Routing by the words of the descriptions in the prompt."""

from __future__ import annotations

import json

import pytest

from agentq.engine import parse
from agentq.engine.prompts import route_schema
from agentq.offline.brain import answer
from agentq.offline.prompt import Prompt
from tests.unit.offline.library import OPTIONS, ROUTER, route


@pytest.mark.parametrize(
    ("text", "specialist"),
    [
        ("Can I extend the book I borrowed?", "loans"),
        ("How much do I have to pay for a late book? Are there fines?", "loans"),
        ("Do you have new titles by Le Guin?", "catalogue"),
        ("I want to book a group room for Friday.", "rooms"),
        ("When are you open on Sundays?", "desk"),
        ("Who won the match yesterday?", "desk"),
        ("", "desk"),
    ],
)
def test_a_request_goes_to_the_option_whose_description_speaks_of_it(text: str, specialist: str) -> None:
    assert route(text) == specialist


def test_what_is_asked_counts_more_than_the_story_around_it() -> None:
    assert route("I was in a quiet reading room with my group. Please renew my loan.") == "loans"


def test_a_follow_up_without_words_of_its_own_goes_where_the_talk_was() -> None:
    assert route("And how do I do that?", "I want to book a group room") == "rooms"


def test_an_unusable_first_answer_is_asked_again_about_the_request_not_about_the_question() -> None:
    again = f"That names no specialist. Choose one of: {', '.join(OPTIONS)}. Answer with JSON."
    assert route(again, "Please renew my loan.") == "loans"


def test_the_text_form_is_answered_in_the_text_form() -> None:
    system = ROUTER.rsplit("\n\n", 1)[0] + "\n\nAnswer in exactly two lines:\nROUTE_TO: <name>\nREASON: <one sentence>"
    reply = answer(Prompt("m", system, ({"role": "user", "content": "Please renew my loan."},)))
    chosen = parse.route(reply.text, OPTIONS)
    assert chosen is not None
    assert chosen.choice == "loans"
    assert "loan" in chosen.reason


def test_the_choice_is_one_of_the_schema_and_every_property_is_filled() -> None:
    schema = route_schema(["rooms", "desk"])
    reply = json.loads(answer(Prompt("m", ROUTER, ({"role": "user", "content": "Renew my loan"},), schema=schema)).text)
    assert set(reply) == {"route", "reason"}
    assert reply["route"] in ("rooms", "desk")


def test_the_same_prompt_has_the_same_answer() -> None:
    prompt = Prompt("m", ROUTER, ({"role": "user", "content": "a room with wifi"},), schema=route_schema(OPTIONS))
    assert answer(prompt) == answer(prompt)
