"""Whatever people, tools and drafts say, the stand-in answers: it never raises and never takes long."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.offline.library import Talk, route, verdict

_PIECES = st.sampled_from(
    ["LN-104", "ln-104", "renew", "Please", "?", "!", ".", "\n", "1. ", "and", "who", "12.50 USD", "$", "a@b.cd",
     "[HB-7]",
     "## Draft answer",
     "- get_loan({}) -> ", "{", "}", '"', "Observation:", "Action: get_loan", "not", "\u0131", "§", "😀"]
)  # fmt: skip
HUGE = ["a ", "LN-104 ", "1.", "x", "1", " ", "\n", "and what ", "(", "a@", ", ", "A-1", "- x: ", "No. ", "?"]
TEXTS = st.one_of(st.text(max_size=200), st.lists(_PIECES, max_size=30).map(" ".join))


@settings(max_examples=150, deadline=None)
@given(request=TEXTS, results=st.lists(TEXTS, min_size=4, max_size=4))
def test_a_visit_ends_whatever_is_asked_and_answered(request: str, results: list[str]) -> None:
    talk = Talk(request)
    for result in results:
        calls = talk.calls()
        if not calls:
            break
        talk.results(*[result] * len(calls))
    assert route(request) in ("loans", "catalogue", "rooms", "desk")


@settings(max_examples=150, deadline=None)
@given(request=TEXTS, draft=TEXTS)
def test_a_critique_is_always_a_verdict(request: str, draft: str) -> None:
    assert isinstance(verdict(request, [], draft), list)


@pytest.mark.parametrize("piece", HUGE, ids=repr)
def test_a_huge_request_is_answered_in_time(piece: str) -> None:
    """No pattern takes quadratic time: the bound is generous, a quadratic one takes minutes."""
    text = piece * (120_000 // len(piece))
    began = time.perf_counter()
    Talk(text).turn()
    verdict(text, [], text)
    assert time.perf_counter() - began < 15
