"""The critic accepts what the results support and really rejects what they do not."""

from __future__ import annotations

import json

import pytest

from schemas.chat import Message
from tests.unit.offline.library import HANDBOOK, verdict

REQUEST = "When is LN-104 due, and what is the fine for overdue books?"
DUE = {"loan_id": "LN-104", "status": "borrowed", "summary": "Loan LN-104 (Emma) is due on 2026-11-28."}
GOOD = "Loan LN-104 (Emma) is due on 2026-11-28. An overdue book costs 0.20 USD a day. [HB-7]"


def transcript(*results: tuple[str, dict[str, str], object]) -> list[Message]:
    messages: list[Message] = []
    for number, (name, arguments, result) in enumerate(results):
        text = result if isinstance(result, str) else json.dumps(result)
        messages.append(
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": f"c{number}", "name": name, "arguments": arguments}],
            }
        )
        messages.append({"role": "tool", "content": text, "tool_call_id": f"c{number}"})
    return messages


SEEN = transcript(("get_loan", {"loan_id": "LN-104"}, DUE), ("search_handbook", {"query": "fine overdue"}, HANDBOOK))


def test_a_supported_draft_is_accepted() -> None:
    assert verdict(REQUEST, SEEN, GOOD) == []


@pytest.mark.parametrize(
    ("draft", "problem"),
    [
        (GOOD.replace("0.20 USD", "0.50 USD"), "'0.50'"),
        (GOOD.replace("2026-11-28", "2026-12-24"), "'2026-12-24'"),
        (GOOD.replace("LN-104", "LN-140"), "'LN-140'"),
        (GOOD.replace("[HB-7]", "[HB-9]"), "cites 'HB-9'"),
        (GOOD.replace(" [HB-7]", ""), "without citing it"),
        (GOOD.replace("is due on", "was returned on"), "'returned'"),
        ("Loan LN-104 (Emma) is due on 2026-11-28.", "does not answer 'what is the fine for overdue books?'"),
        (f"{GOOD} You will get 25 USD as a present.", "'25'"),
        (f"{GOOD} Write to boss@library.example.", "'boss@library.example'"),
        (f"I have called get_loan for you. {GOOD}", "internal tool 'get_loan'"),
        ("", "empty"),
    ],
)
def test_a_bad_draft_is_sent_back_with_what_is_wrong(draft: str, problem: str) -> None:
    problems = verdict(REQUEST, SEEN, draft)
    assert any(problem in found for found in problems), problems


def test_an_amount_must_be_an_amount_in_the_results() -> None:
    """A number that occurs as something else (a day, a size) does not support a sum of money."""
    assert verdict(REQUEST, SEEN, GOOD + " The card costs 104 USD.")


def test_a_failure_must_not_be_hidden() -> None:
    refused = transcript(
        ("renew_loan", {"loan_id": "LN-104"}, "Loan LN-104 cannot be renewed: it was renewed 3 times.")
    )
    assert any(
        "hides" in found for found in verdict("Please renew LN-104.", refused, "Done, LN-104 is yours for longer!")
    )
    assert verdict("Please renew LN-104.", refused, "Loan LN-104 cannot be renewed: it was renewed 3 times.") == []


def test_a_failure_that_was_mended_need_not_be_told() -> None:
    seen = transcript(
        ("get_loan", {"loan": "LN-104"}, "The arguments do not fit: $.loan: unexpected. Correct them and call again."),
        ("get_loan", {"loan_id": "LN-104"}, DUE),
    )
    assert verdict("When is LN-104 due?", seen, "Loan LN-104 (Emma) is due on 2026-11-28.") == []


def test_an_honest_refusal_is_accepted_where_nothing_was_found() -> None:
    seen = transcript(("search_handbook", {"query": "weather"}, {"articles": []}))
    assert verdict("What will the weather be?", seen, "I am sorry, I cannot help with that.") == []


def test_a_refusal_is_rejected_where_a_record_was_found() -> None:
    assert verdict("When is LN-104 due?", SEEN[:2], "I am sorry, I cannot help with that.")


def test_asking_for_what_is_missing_is_accepted_with_its_example() -> None:
    draft = "I need one more thing from you: the loan number, for example LN-200. Please send it to us."
    assert verdict("Please renew my loan.", [], draft) == []


def test_the_numbers_of_steps_are_no_claims() -> None:
    article = {
        "id": "HB-1",
        "title": "Printing",
        "text": "Print like this.\n1. Insert your card.\n2. Press the green button.",
    }
    seen = transcript(("search_handbook", {"query": "print"}, {"articles": [article]}))
    draft = "Print like this.\n1. Insert your card.\n2. Press the green button. [HB-1]"
    assert verdict("How do I print?", seen, draft) == []
