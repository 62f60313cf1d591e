"""What a scheduler does goes on after any failure, and says that it failed without quoting anybody."""

from __future__ import annotations

import asyncio

import pytest

from agentq.errors import Unavailable
from agentq.runtime.ever import ever


async def test_it_goes_on_after_an_outage_and_after_a_fault_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    done = asyncio.Event()
    outcomes = iter([Unavailable("MongoDB does not answer."), ValueError("a person's words")])

    async def act() -> float:
        for outcome in outcomes:
            raise outcome
        done.set()
        return 3600

    going = asyncio.create_task(ever("the clerk", act, 0))
    await asyncio.wait_for(done.wait(), 10)
    assert not going.done()
    going.cancel()
    with pytest.raises(asyncio.CancelledError):
        await going
    assert "the clerk waits: MongoDB does not answer." in caplog.text
    assert "ValueError" in caplog.text
    assert "a person's words" not in caplog.text
