"""Group commit: what becomes ready while a call is under way shares the next one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from agentq.errors import Unavailable
from agentq.group import Group


class Writes:
    """A write that is under way until it is released; remembers its batches."""

    def __init__(self, answer: Callable[[int], int | Exception] = lambda item: item * 10) -> None:
        self.batches: list[list[int]] = []
        self.under_way = 0
        self.most = 0
        self._answer = answer
        self._gates: list[asyncio.Event] = []

    async def __call__(self, items: list[int]) -> Sequence[int | Exception]:
        self.batches.append(items)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        gate = asyncio.Event()
        self._gates.append(gate)
        await gate.wait()
        self.under_way -= 1
        return [self._answer(item) for item in items]

    async def begun(self, count: int) -> None:
        """Wait until so many writes have begun."""
        while len(self.batches) < count:  # noqa: ASYNC110 - a turn of the loop, no time
            await asyncio.sleep(0)

    def release(self) -> None:
        self._gates.pop(0).set()


async def test_a_lone_item_goes_out_at_once() -> None:
    writes = Writes()
    group: Group[int, int] = Group(writes)
    one = group(1)
    await writes.begun(1)
    writes.release()
    assert await one == 10
    assert writes.batches == [[1]]


async def test_what_comes_while_a_write_is_under_way_shares_the_next_one_and_each_gets_its_own_result() -> None:
    writes = Writes()
    group: Group[int, int] = Group(writes)
    first = group(1)
    await writes.begun(1)
    others = [group(item) for item in (2, 3, 4)]
    writes.release()
    await writes.begun(2)
    writes.release()
    assert await asyncio.gather(first, *others) == [10, 20, 30, 40]
    assert writes.batches == [[1], [2, 3, 4]]


async def test_a_write_carries_no_more_than_the_limit_in_the_order_of_coming() -> None:
    writes = Writes()
    group: Group[int, int] = Group(writes, limit=2)
    futures = [group(item) for item in range(5)]
    for batch in range(3):
        await writes.begun(batch + 1)
        writes.release()
    await asyncio.gather(*futures)
    assert writes.batches == [[0, 1], [2, 3], [4]]


async def test_no_more_writes_than_lanes_are_under_way() -> None:
    writes = Writes()
    group: Group[int, int] = Group(writes, limit=1, lanes=2)
    futures = [group(item) for item in range(6)]
    await writes.begun(2)
    for batch in range(6):
        await writes.begun(min(batch + 2, 6))
        writes.release()
    assert sorted(await asyncio.gather(*futures)) == [0, 10, 20, 30, 40, 50]
    assert writes.most == 2


async def test_a_result_that_is_an_exception_is_raised_to_its_caller_alone() -> None:
    writes = Writes(lambda item: ValueError("no") if item == 2 else item)
    group: Group[int, int] = Group(writes)
    futures = [group(item) for item in (1, 2, 3)]
    await writes.begun(1)
    writes.release()
    results = await asyncio.gather(*futures, return_exceptions=True)
    assert [results[0], str(results[1]), results[2]] == [1, "no", 3]


async def test_an_outage_is_told_to_every_item_of_the_write_and_to_none_of_the_next() -> None:
    """Whether the write came through is unknown, so it is not repeated here."""
    batches = []

    async def write(items: list[int]) -> list[int]:
        batches.append(items)
        if len(batches) == 1:
            raise Unavailable("down")
        return items

    group: Group[int, int] = Group(write)
    results = await asyncio.gather(group(1), group(2), return_exceptions=True)
    assert [type(result) for result in results] == [Unavailable, Unavailable]
    assert await group(3) == 3
    assert batches == [[1, 2], [3]]


async def test_an_item_that_spoils_a_write_fails_alone() -> None:
    """A document that cannot be encoded must not take the others of its write along."""

    async def write(items: list[int]) -> list[int]:
        if 2 in items:
            raise OverflowError("too large")
        return items

    group: Group[int, int] = Group(write)
    results = await asyncio.gather(*(group(item) for item in (1, 2, 3)), return_exceptions=True)
    assert [results[0], type(results[1]), results[2]] == [1, OverflowError, 3]


@pytest.mark.timeout(10)
async def test_a_write_that_answers_for_too_few_items_leaves_nobody_waiting() -> None:
    """A bug in a write is an error for its callers, not a hang."""

    async def write(items: list[int]) -> list[int]:
        return items[1:]

    group: Group[int, int] = Group(write)
    results = await asyncio.gather(group(1), group(2), return_exceptions=True)
    assert [type(result) for result in results] == [RuntimeError, RuntimeError]


async def test_a_caller_that_gives_up_disturbs_nobody() -> None:
    writes = Writes()
    group: Group[int, int] = Group(writes)
    futures = [group(item) for item in (1, 2, 3)]
    await writes.begun(1)
    futures[1].cancel()
    writes.release()
    assert [await futures[0], await futures[2]] == [10, 30]
    again = group(4)
    await writes.begun(2)
    writes.release()
    assert await again == 40
