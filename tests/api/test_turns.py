from __future__ import annotations

import asyncio

import pytest

from embedstream.api.turns import Turns


async def test_pieces_of_all_take_turns_and_so_does_the_loop() -> None:
    turns, done = Turns(), []
    iterations = 0

    async def work(name: str) -> None:
        for _ in range(3):
            async with turns:
                done.append((name, iterations))

    async def count() -> None:
        nonlocal iterations
        while True:
            iterations += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    await asyncio.gather(work("a"), work("b"), work("c"))
    counting.cancel()
    await asyncio.wait([counting])
    assert [name for name, _ in done] == ["a", "b", "c"] * 3
    moments = [moment for _, moment in done]
    assert len(set(moments)) == len(moments)  # never two pieces in one iteration of the loop


async def test_a_lone_one_lets_the_loop_have_its_turn_too() -> None:
    turns, others = Turns(), 0

    async def other() -> None:
        nonlocal others
        while True:
            others += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    for _ in range(10):
        async with turns:
            pass
    task.cancel()
    await asyncio.wait([task])
    assert others >= 10


async def test_an_error_leaves_the_turn_to_others() -> None:
    turns = Turns()
    with pytest.raises(ZeroDivisionError):
        async with turns:
            raise ZeroDivisionError
    async with asyncio.timeout(5), turns:
        pass
