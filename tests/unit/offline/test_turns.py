"""An agent's turns: which tools are called, with what, in which order, and what the answer is made of."""

from __future__ import annotations

from agentq.engine import parse
from agentq.engine.prompts import revision_message
from agentq.offline.brain import STAND_IN, answer
from agentq.offline.prompt import Prompt
from tests.unit.offline.library import HANDBOOK, TEXT_ONLY, Talk

DUE = {
    "loan_id": "LN-104",
    "summary": "The book Emma (loan LN-104) is due on 2026-11-28. It was borrowed on 2026-11-01.",
}
RENEWED = {"summary": "Loan LN-104 now runs until 2026-12-12."}


def test_a_question_about_a_thing_looks_the_thing_up() -> None:
    talk = Talk("When is LN-104 due?")
    assert talk.calls() == [("get_loan", {"loan_id": "LN-104"})]
    talk.results(DUE)
    assert "2026-11-28" in talk.answer()


def test_a_number_in_small_letters_is_written_as_the_pattern_wants_it() -> None:
    assert Talk("when is ln-104 due?").calls() == [("get_loan", {"loan_id": "LN-104"})]


def test_several_things_are_looked_up_in_parallel() -> None:
    calls = Talk("When are LN-104 and LN-105 due?").calls()
    assert calls == [("get_loan", {"loan_id": "LN-104"}), ("get_loan", {"loan_id": "LN-105"})]


def test_several_questions_are_served_in_parallel_and_all_answered() -> None:
    talk = Talk("When is LN-104 due? And what is the fine for overdue books?")
    assert [name for name, _ in talk.calls()] == ["get_loan", "search_handbook"]
    talk.results(DUE, HANDBOOK)
    text = talk.answer()
    assert "2026-11-28" in text
    assert "0.20 USD a day" in text
    assert text.endswith("[HB-7]")
    assert "HB-2" not in text


def test_a_deed_is_done_after_what_its_description_wants_done_first() -> None:
    talk = Talk("Please renew LN-104 by 2 weeks.")
    assert talk.calls() == [("get_loan", {"loan_id": "LN-104"})]
    talk.results(DUE)
    assert talk.calls() == [("renew_loan", {"loan_id": "LN-104", "weeks": 2})]
    talk.results(RENEWED)
    assert talk.answer() == "Loan LN-104 now runs until 2026-12-12."


def test_a_deed_is_not_done_when_what_comes_first_failed() -> None:
    talk = Talk("Please renew LN-999.")
    talk.calls()
    talk.results("There is no loan LN-999. Please check the number.")
    assert talk.answer() == "There is no loan LN-999. Please check the number."


def test_a_question_about_a_deed_does_not_do_it() -> None:
    assert "renew_loan" not in [name for name, _ in Talk("Has LN-104 been renewed yet?").calls()]


def test_another_word_that_the_description_gives_calls_the_tool_too() -> None:
    talk = Talk("I'd like to prolong LN-104")
    talk.calls()
    talk.results(DUE)
    assert [name for name, _ in talk.calls()] == ["renew_loan"]


def test_who_asks_for_a_person_gets_one_with_urgency() -> None:
    ((name, arguments),) = Talk("This is ridiculous, I want to talk to a person!").calls()
    assert name == "notify_librarian"
    assert arguments["urgency"] == "high"
    assert arguments["subject"]
    assert "ridiculous" in arguments["message"]


def test_a_result_that_names_another_tool_is_followed() -> None:
    talk = Talk("Please renew LN-104.")
    talk.calls()
    talk.results(DUE)
    talk.calls()
    talk.results("Loan LN-104 was renewed 3 times already and cannot be renewed again. Ask with notify_librarian.")
    ((name, arguments),) = talk.calls()
    assert (name, arguments["urgency"]) == ("notify_librarian", "low")
    talk.results({"summary": "A librarian has your message (M-5)."})
    assert talk.answer() == (
        "Loan LN-104 was renewed 3 times already and cannot be renewed again. A librarian has your message (M-5)."
    )


def test_what_is_missing_is_asked_for() -> None:
    text = Talk("Please renew my loan.").answer()
    assert "loan number, for example LN-104" in text


def test_a_follow_up_takes_the_thing_from_the_conversation() -> None:
    talk = Talk(
        "Please renew it.",
        {"role": "user", "content": "When is LN-104 due?"},
        {"role": "assistant", "content": "On 2026-11-28."},
    )
    assert talk.calls() == [("get_loan", {"loan_id": "LN-104"})]


def test_what_no_text_speaks_of_is_refused_honestly() -> None:
    talk = Talk("What will the weather be tomorrow?")
    assert [name for name, _ in talk.calls()] == ["search_handbook"]
    talk.results(HANDBOOK)
    text = talk.answer()
    assert "cannot help" in text
    assert "loans and books" in text
    assert "[" not in text


def test_wrong_arguments_are_corrected() -> None:
    talk = Talk("When is LN-104 due?")
    talk.calls()
    talk.transcript[-1]["tool_calls"][0]["arguments"] = {"wrong_argument": 1}
    talk.results("The arguments do not fit: $.loan_id: is required. Correct them and call again.")
    assert talk.calls() == [("get_loan", {"loan_id": "LN-104"})]
    talk.results(DUE)
    assert talk.answer().startswith("The book Emma")


def test_an_unknown_tool_is_called_by_its_right_name() -> None:
    talk = Talk("When is LN-104 due?")
    talk.calls()
    talk.transcript[-1]["tool_calls"][0]["name"] = "get_loan_v2"
    talk.results("There is no tool 'get_loan_v2'. Permitted tools: get_loan, notify_librarian, renew_loan.")
    assert talk.calls() == [("get_loan", {"loan_id": "LN-104"})]


def test_a_lost_effect_is_told_and_not_called_again() -> None:
    talk = Talk("Please renew LN-104.")
    talk.calls()
    talk.results(DUE)
    talk.calls()
    talk.results(
        "The tool gave no answer within 5 s. Go on without its result. It is not known whether it took effect. Do not "
        "call it again; say that a person will check."
    )
    assert talk.answer() == "One step did not work on our side: renew loan gave no result. A person will check."


def test_a_draft_that_was_sent_back_is_mended() -> None:
    talk = Talk("When is LN-104 due?")
    talk.calls()
    talk.results(DUE)
    talk.transcript.append({"role": "assistant", "content": "The book is due on 2027-01-01 and costs 99 USD."})
    talk.transcript.append(revision_message(["The draft states the number '99', which no result holds: remove it."]))
    text = talk.answer()
    assert "2026-11-28" in text
    assert "99" not in text


def test_a_part_that_was_not_answered_is_looked_up_after_the_review() -> None:
    talk = Talk("When is LN-104 due?")
    talk.calls()
    talk.results(DUE)
    talk.transcript.append({"role": "assistant", "content": "It is due on 2026-11-28."})
    talk.transcript.append(
        revision_message(["The draft does not answer 'what is the fine for overdue books?': answer it."])
    )
    assert [name for name, _ in talk.calls()] == ["search_handbook"]
    talk.results(HANDBOOK)
    assert "[HB-7]" in talk.answer()


def test_react_text_is_spoken_where_tools_are_described_in_text() -> None:
    talk = Talk("Please renew LN-104 by 2 weeks.", model=TEXT_ONLY)
    for expected, result in (("get_loan", DUE), ("renew_loan", RENEWED)):
        reply = talk.turn()
        action = parse.react(reply.text)
        assert isinstance(action, parse.Action)
        assert action.tool == expected
        talk.transcript.append({"role": "assistant", "content": reply.text})
        talk.transcript.append({"role": "user", "content": f"Observation: {parse.json.dumps(result)}"})
    assert parse.react(talk.turn().text) == "Loan LN-104 now runs until 2026-12-12."


def test_without_tools_it_says_what_it_is() -> None:
    reply = answer(Prompt("m", "You are a poet.", ({"role": "user", "content": "A poem, please."},)))
    assert reply.text == STAND_IN
    assert "not a language model" in reply.text
