"""How requests are read: stems, sentences, parts, moods."""

from __future__ import annotations

import pytest

from agentq.offline.observe import observe
from agentq.offline.parts import meaning, split
from agentq.offline.text import sentences, stem, synonyms


@pytest.mark.parametrize(
    ("one", "other"),
    [("refunded", "refunds"), ("deliveries", "delivery"), ("cancellation", "cancelled"), ("batteries", "battery"),
     ("paid", "payment"), ("shipping", "shipped"), ("charges", "charging")],
)  # fmt: skip
def test_forms_of_one_word_have_one_stem(one: str, other: str) -> None:
    assert stem(one) == stem(other)


def test_a_step_of_a_list_is_one_sentence_with_its_mark() -> None:
    assert sentences("Do this.\n1. Press it. Then wait.\n2. Go.") == ("Do this.", "1. Press it. Then wait.", "2. Go.")


def test_abbreviations_do_not_end_a_sentence() -> None:
    assert sentences("Open from 8 a.m. to 8 p.m. daily. Closed e.g. at Easter.") == (
        "Open from 8 a.m. to 8 p.m. daily.", "Closed e.g. at Easter.",
    )  # fmt: skip


def test_a_description_teaches_other_words_in_brackets() -> None:
    assert synonyms("Renew a loan, refunds (money back)")["money"] == "refund"


@pytest.mark.parametrize(
    ("text", "moods"),
    [
        ("Where is it?", ["question"]),
        ("Please refund order LF-1001.", ["request"]),
        ("My router is dead. What should I do?", ["question"]),
        ("Refund LF-1001 and tell me how refunds are paid.", ["request", "question"]),
        ("I want my money back; where is LF-1002?", ["request", "question"]),
        ("The lamp flickers and does not dim.", ["problem"]),
        ("Can I get a refund?", ["request"]),
        ("Can I return it?", ["question"]),
    ],
)
def test_a_request_is_split_into_what_it_asks(text: str, moods: list[str]) -> None:
    assert [part.mood for part in split(text)] == moods


def test_what_only_explains_is_the_context_of_what_is_asked() -> None:
    (part,) = split("Hello! The lamp fell down. It broke. Please send a new one.")
    assert part.text == "Please send a new one."
    assert part.context == "The lamp fell down. It broke."


def test_numbers_and_politeness_are_not_what_a_text_is_about() -> None:
    assert meaning("Please help me with order LF-1001, thanks") == ("order",)


@pytest.mark.parametrize(
    ("result", "failed", "message"),
    [
        ('{"summary": "The loan is due.", "x": 1}', False, "The loan is due."),
        ('{"status": "due", "weeks": 2}', False, "The status is due. The weeks is 2."),
        ("There is no loan LN-999.", True, "There is no loan LN-999."),
        ('{"error": {"message": "No.", "hint": "Ask."}}', True, "No. Ask."),
        ("The limit is above 3. Open it with notify_librarian.", True, "The limit is above 3."),
        ("The tool gave no answer within 5 s. Go on without its result.", True, ""),
    ],
)
def test_a_result_is_read_as_what_it_says_to_a_person(result: str, failed: bool, message: str) -> None:
    seen = observe(result)
    assert (seen.failed, seen.message) == (failed, message)


def test_a_wrong_call_is_told_from_a_refusal() -> None:
    assert observe("There is no tool 'x'. Permitted tools: get_loan.").unusable
    assert observe("The arguments do not fit: $: bad. Correct them and call again.").unusable
    assert not observe("There is no loan LN-999.").unusable
