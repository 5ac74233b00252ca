from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from embedstream.producer.credit import FLOOR_TOKENS, RATE_OVER_S, Credit


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def credit(clock: Clock) -> Credit:
    return Credit(3.0, 1000, clock)


async def answered(credit: Credit, clock: Clock, tokens_a_second: int, seconds: float) -> None:
    """Requests of a tenth of a second's work each, answered one after another."""
    for _ in range(int(seconds * 10)):
        async with credit.of(tokens_a_second // 10, 1):
            clock.now_s += 0.1


class Holder:
    """One request: a task that waits for credit, and holds it until it is told to let go."""

    def __init__(self, credit: Credit, n_tokens: int, n_rows: int = 1) -> None:
        self.has_it = False
        self.letting_go = asyncio.Event()
        self.task = asyncio.create_task(self._hold(credit, n_tokens, n_rows))

    async def _hold(self, credit: Credit, n_tokens: int, n_rows: int) -> None:
        async with credit.of(n_tokens, n_rows):
            self.has_it = True
            await self.letting_go.wait()

    async def let_go(self) -> None:
        self.letting_go.set()
        await self.task


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_the_limit_is_the_rate_times_the_time_of_an_answer(credit: Credit, clock: Clock) -> None:
    assert credit.limit_tokens == FLOOR_TOKENS
    await answered(credit, clock, 100_000, 4)
    assert credit.limit_tokens == pytest.approx(300_000, rel=0.1)


async def test_it_grows_for_a_fast_fleet_and_shrinks_for_one_that_has_become_slow(credit: Credit, clock: Clock) -> None:
    await answered(credit, clock, 50_000, 4)
    slow = credit.limit_tokens
    await answered(credit, clock, 200_000, 4)
    fast = credit.limit_tokens
    assert fast == pytest.approx(4 * slow, rel=0.1)
    await answered(credit, clock, 50_000, RATE_OVER_S + 1)
    assert credit.limit_tokens == pytest.approx(slow, rel=0.1)


async def test_it_shrinks_when_answers_become_rare(credit: Credit, clock: Clock) -> None:
    await answered(credit, clock, 100_000, 4)
    async with credit.of(80_000, 1):
        clock.now_s += 5 * RATE_OVER_S
    assert credit.limit_tokens < 100_000
    async with credit.of(80_000, 1):
        clock.now_s += 4.0
    assert credit.limit_tokens == pytest.approx(60_000, rel=0.01)  # 20,000 a second, for 3 s


async def test_it_never_falls_below_some_batches(credit: Credit, clock: Clock) -> None:
    await answered(credit, clock, 10, 4)
    credit.refused()
    assert credit.limit_tokens == FLOOR_TOKENS


async def test_a_refusal_halves_it_until_the_fleet_has_answered_for_a_while(credit: Credit, clock: Clock) -> None:
    await answered(credit, clock, 100_000, 4)
    before = credit.limit_tokens
    credit.refused()
    assert credit.limit_tokens == before // 2
    await answered(credit, clock, 100_000, 0.5)
    assert credit.limit_tokens == before // 2  # what was answered before the refusal does not count any more
    await answered(credit, clock, 100_000, 2)
    assert credit.limit_tokens > before // 2


async def test_what_failed_is_no_sign_of_speed(credit: Credit, clock: Clock) -> None:
    async def fail() -> None:
        async with credit.of(20_000, 1):
            clock.now_s += 0.1
            raise ValueError("x")

    for _ in range(40):
        with pytest.raises(ValueError, match="x"):
            await fail()
    assert credit.limit_tokens == FLOOR_TOKENS
    async with credit.of(FLOOR_TOKENS, 1000):  # and all of it was given back
        pass


@pytest.mark.parametrize(("tokens", "rows"), [(FLOOR_TOKENS // 2 + 1, 1), (1, 501)])
async def test_tokens_and_rows_are_bounded(credit: Credit, tokens: int, rows: int) -> None:
    first, second = Holder(credit, tokens, rows), Holder(credit, tokens, rows)
    await turns()
    assert first.has_it
    assert not second.has_it
    await first.let_go()
    await turns()
    assert second.has_it
    await second.let_go()


async def test_who_asked_first_goes_first(credit: Credit) -> None:
    running = Holder(credit, FLOOR_TOKENS - 10)
    await turns()
    large, small = Holder(credit, 100), Holder(credit, 5)
    await turns()
    assert not small.has_it  # though it would fit: else a large request might wait for ever
    await running.let_go()
    await turns()
    assert large.has_it
    assert small.has_it
    await large.let_go()
    await small.let_go()


async def test_what_exceeds_the_limit_goes_alone(credit: Credit) -> None:
    small = Holder(credit, 1)
    await turns()
    huge, next_one = Holder(credit, 10 * FLOOR_TOKENS, 5000), Holder(credit, 1)
    await turns()
    assert not huge.has_it
    await small.let_go()
    await turns()
    assert huge.has_it
    assert not next_one.has_it
    await huge.let_go()
    await turns()
    assert next_one.has_it
    await next_one.let_go()


async def test_a_request_that_is_given_up_lets_those_behind_it_pass(credit: Credit) -> None:
    running = Holder(credit, FLOOR_TOKENS - 10)
    await turns()
    large, small = Holder(credit, 100), Holder(credit, 5)
    await turns()
    large.task.cancel()
    await turns()
    assert small.has_it
    await running.let_go()
    await small.let_go()


async def test_credit_goes_back_to_those_who_wait_when_its_holder_is_given_up(credit: Credit) -> None:
    holders = [Holder(credit, FLOOR_TOKENS) for _ in range(3)]
    await turns()
    holders[0].task.cancel()
    await turns()
    assert holders[1].has_it

    async def give_up() -> None:
        await holders[1].letting_go.wait()
        holders[2].task.cancel()  # it has been given its credit by now, and has not seen it yet

    giving_up = asyncio.create_task(give_up())
    await turns()
    await holders[1].let_go()
    await giving_up
    await turns()
    assert holders[2].task.cancelled()
    assert not holders[2].has_it
    async with AsyncExitStack() as stack:
        async with asyncio.timeout(10):
            await stack.enter_async_context(credit.of(FLOOR_TOKENS, 1000))
