from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from embedstream.consumer import notices as notices_module
from embedstream.consumer.notices import Cancelled, Notices
from embedstream.shared.connections import connect, connect_reader
from embedstream.shared.keys import Keys

from .made import entry, until


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    client = connect(redis_url)
    yield client
    await client.aclose()


@pytest.fixture
async def notices(redis_url: str, keys: Keys) -> AsyncIterator[Notices]:
    reader, stopping = connect_reader(redis_url), asyncio.Event()
    notices = Notices(reader, keys, "me")
    task = asyncio.create_task(notices.run(stopping))
    yield notices
    stopping.set()
    await task
    await reader.aclose()


def number(value: int) -> bytes:
    return value.to_bytes(16, "big")


@pytest.mark.integration
async def test_abandoned_requests_are_remembered(notices: Notices, redis: Redis, keys: Keys) -> None:
    await redis.xadd(keys.notices, {"c": number(1)})
    await redis.xadd(keys.notices, {"c": number(2) + number(3) + b"half an id"[:8]})
    await redis.xadd(keys.notices, {"x": "of a later version"})
    await redis.xadd(keys.notices, {"c": number(4)})

    async def last_came() -> bool:
        return number(4) in notices.cancelled

    await until(last_came)
    assert all(number(value) in notices.cancelled for value in (1, 2, 3))
    assert len(notices.cancelled) == 4
    assert not notices.released.is_set()


@pytest.mark.integration
async def test_what_others_give_back_is_news_and_our_own_is_not(notices: Notices, redis: Redis, keys: Keys) -> None:
    await redis.xadd(keys.notices, {"w": "me"})
    await redis.xadd(keys.notices, {"c": number(1)})

    async def came() -> bool:
        return number(1) in notices.cancelled

    await until(came)
    assert not notices.released.is_set()
    await redis.xadd(keys.notices, {"w": "other"})
    async with asyncio.timeout(20):
        await notices.released.wait()


@pytest.mark.integration
async def test_it_reads_on_after_failures_and_misses_nothing(notices: Notices, redis: Redis, keys: Keys) -> None:
    await redis.xadd(keys.notices, {"c": number(1)})
    await redis.client_kill_filter(_type="normal", skipme=True)
    await redis.xadd(keys.notices, {"c": number(2)})
    await redis.delete(keys.notices)
    await redis.set(keys.notices, "no stream")
    await asyncio.sleep(0.1)
    await redis.delete(keys.notices)
    await redis.xadd(keys.notices, {"c": number(3)})

    async def last_came() -> bool:
        return number(3) in notices.cancelled

    await until(last_came)


def test_so_many_are_remembered_and_the_oldest_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices_module, "MOST_REMEMBERED", 3)
    cancelled = Cancelled()
    for value in (1, 2, 1, 3, 4):
        cancelled.add(number(value), 1)
    assert [number(value) in cancelled for value in range(1, 5)] == [False, True, True, True]
    assert len(cancelled) == 3


async def test_ids_are_forgotten_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices_module, "REMEMBERED_S", 0.01)
    cancelled = Cancelled()
    cancelled.add(number(1), 1)
    await asyncio.sleep(0.02)
    cancelled.add(number(2), 1)
    assert number(1) not in cancelled
    assert number(2) in cancelled


async def test_an_id_that_is_called_off_again_after_it_was_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices_module, "REMEMBERED_S", 0.01)
    cancelled = Cancelled()
    cancelled.add(number(1), 1)
    await asyncio.sleep(0.02)
    cancelled.add(number(1), 2)
    cancelled.add(number(1), 3)
    assert len(cancelled) <= 1


def test_what_is_enqueued_after_it_was_called_off_is_wanted() -> None:
    """A dead letter is replayed under the id of a request whose caller has long gone."""
    cancelled = Cancelled()
    cancelled.add(number(7), 5)
    before, after = (entry([10], number=at_ms - 1, request_id=number(7)) for at_ms in (4, 6))
    assert before.is_called_off(cancelled)
    assert not after.is_called_off(cancelled)
