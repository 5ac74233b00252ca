"""Consumers are told of requests that nobody waits for any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from prometheus_client import REGISTRY
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from embedstream.producer import Lane, Producer, notices
from embedstream.producer.notices import Notices
from embedstream.shared import results
from embedstream.shared.errors import JobFailed, Overloaded, ResultTimeout, Unavailable
from embedstream.shared.jobs import Job
from embedstream.shared.keys import FIELD_CANCELLED, Keys
from embedstream.shared.results import ResultPart, Status
from embedstream.shared.settings import Settings

pytestmark = pytest.mark.integration


@pytest.fixture
async def producer(settings: Settings, stub: Any) -> AsyncIterator[Producer]:
    async with Producer(settings=settings) as producer:
        await producer.embed("warm")
        stub.seen.clear()
        yield producer


async def told(redis: Redis, keys: Keys, count: int) -> list[bytes]:
    """The ids of all notices, once there are so many."""
    async with asyncio.timeout(20):
        while True:
            entries: Any = await redis.xrange(keys.notices)
            data = b"".join(fields[FIELD_CANCELLED] for _, fields in entries)
            if len(data) >= 16 * count:
                return [data[at : at + 16] for at in range(0, len(data), 16)]
            await asyncio.sleep(0.01)


async def queued(redis: Redis, keys: Keys, count: int = 1, lane: Lane = Lane.INTERACTIVE) -> None:
    async with asyncio.timeout(20):
        while await redis.xlen(keys.lane(lane)) < count:
            await asyncio.sleep(0.01)


def counted(outcome: str, lane: str = "interactive") -> float:
    return REGISTRY.get_sample_value("embedstream_requests_total", {"lane": lane, "outcome": outcome}) or 0.0


async def test_callers_that_leave_are_told_of_in_few_entries(
    producer: Producer, stub: Any, redis: Redis, keys: Keys
) -> None:
    await stub.pause()
    before, tasks = counted("abandoned"), len(asyncio.all_tasks())
    waiting = [asyncio.create_task(producer.embed([[number]])) for number in range(1, 301)]
    await queued(redis, keys, 300)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    ids = await told(redis, keys, 300)
    entries: Any = await redis.xrange(keys.lane(Lane.INTERACTIVE))
    assert sorted(ids) == sorted(fields[b"h"][4:20] for _, fields in entries)
    assert await redis.xlen(keys.notices) < 10
    assert counted("abandoned") - before == 300
    (session,) = producer._sessions._sessions.values()
    assert session.replies.requests == {}
    assert len(asyncio.all_tasks()) <= tasks
    stub.resume()


async def test_a_deadline_calls_the_jobs_off(producer: Producer, stub: Any, redis: Redis, keys: Keys) -> None:
    await stub.pause()
    before = counted("timeout")
    with pytest.raises(ResultTimeout):
        await producer.embed("a", timeout_s=0.05)
    assert len(await told(redis, keys, 1)) == 1
    assert counted("timeout") - before == 1
    stub.resume()


async def test_one_failed_row_calls_the_rest_off(producer: Producer, stub: Any, redis: Redis, keys: Keys) -> None:
    def first_fails(job: Job, parts: list[ResultPart]) -> list[ResultPart] | None:
        if job.index:
            return None
        return [results.failed(job.request_id, parts[0].fingerprint, 0, job.count, 0, 1, Status.FAILED, "hot")]

    stub.on_job = first_fails
    before = counted("failed")
    with pytest.raises(JobFailed, match="hot"):
        await producer.embed([[1]] * 200)
    (name,) = await told(redis, keys, 1)
    assert name == stub.seen[0].request_id
    assert counted("failed") - before == 1


async def test_an_unread_stream_is_called_off(producer: Producer, stub: Any, redis: Redis, keys: Keys) -> None:
    stub.on_job = lambda job, parts: parts if job.index == 0 else None
    pieces = producer.stream([[1]] * 200)
    await anext(pieces)
    await pieces.aclose()
    assert len(await told(redis, keys, 1)) == 1


async def test_what_is_answered_or_refused_needs_no_notice(
    settings: Settings, stub: Any, redis: Redis, keys: Keys
) -> None:
    async with Producer(settings=settings.model_copy(update={"max_lane_bytes": 1000})) as producer:
        await producer.embed([[1]] * 100)
        await stub.pause()
        filling = asyncio.create_task(producer.embed([[1]] * 640))
        await queued(redis, keys, 10)
        before = counted("refused")
        with pytest.raises(Overloaded):
            await producer.embed([[1]])
        assert counted("refused") - before == 1
        stub.resume()
        await filling
    assert not await redis.exists(keys.notices)


async def test_closing_calls_all_off(
    settings: Settings, stub: Any, redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def idle(_: Notices, stopping: asyncio.Event) -> None:  # it ends before the requests do
        await stopping.wait()

    monkeypatch.setattr(Notices, "run", idle)
    async with Producer(settings=settings) as producer:
        await producer.embed("warm")
        await stub.pause()
        waiting = [asyncio.create_task(producer.embed([[number]])) for number in range(1, 11)]
        await queued(redis, keys, 10)
    for task in waiting:
        with pytest.raises(Unavailable, match="closed"):
            await task
    assert len(await told(redis, keys, 10)) == 10
    stub.resume()


async def test_notices_outlast_a_redis_that_is_away(redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "MAX_IDS", 3)
    add, failures = Redis.xadd, 0

    async def fail_at_first(self: Redis, *args: Any, **options: Any) -> Any:
        nonlocal failures
        failures += 1
        if failures in (1, 3):
            raise RedisConnectionError("gone")
        return await add(self, *args, **options)

    monkeypatch.setattr(Redis, "xadd", fail_at_first)
    stopping, sender = asyncio.Event(), Notices(redis)
    running = asyncio.create_task(sender.run(stopping))
    ids = [bytes([number]) * 16 for number in range(8)]
    for name in ids:
        sender.abandon(keys, name)
    assert await told(redis, keys, 8) == ids
    stopping.set()
    sender.wake()
    await running
