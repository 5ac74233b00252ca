"""What Redis or the network loses is found and sent again; what is merely slow is left alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from embedstream.deploy.embedded import EmbeddedServer
from embedstream.producer import Lane, Producer, enqueue
from embedstream.shared.connections import create_group
from embedstream.shared.errors import ResultTimeout, Unavailable
from embedstream.shared.keys import GROUP, Keys
from embedstream.shared.lanes import LANES
from embedstream.shared.settings import Settings

pytestmark = pytest.mark.integration


@pytest.fixture
async def producer(settings: Settings, stub: Any) -> AsyncIterator[Producer]:
    async with Producer(settings=settings.model_copy(update={"reconcile_after_s": 0.2})) as producer:
        await producer.embed("warm")
        stub.seen.clear()
        yield producer


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await condition():
            await asyncio.sleep(0.01)


async def pause(stub: Any) -> None:
    stub.paused.clear()
    await asyncio.sleep(0.3)  # longer than its blocking read


async def test_a_job_that_vanished_is_sent_again(producer: Producer, stub: Any, redis: Redis, keys: Keys) -> None:
    await pause(stub)
    waiting = asyncio.create_task(producer.embed([[5], [6]], timeout_s=20))
    lane = keys.lane(Lane.INTERACTIVE)

    async def queued() -> bool:
        return await redis.xlen(lane) == 1

    await until(queued)
    entries: Any = await redis.xrange(lane)
    await redis.xdel(lane, entries[0][0])
    await until(queued)  # sent again
    stub.paused.set()
    np.testing.assert_allclose((await waiting)[:, 0], [6, 7])
    (job,) = stub.seen
    assert 0 < job.ttl_ms < 20_000  # what is left of the time


async def test_everything_redis_held_may_vanish(producer: Producer, stub: Any, redis: Redis, keys: Keys) -> None:
    await pause(stub)
    waiting = [asyncio.create_task(producer.embed([[n]], timeout_s=20)) for n in range(1, 40)]

    async def queued() -> bool:
        return await redis.xlen(keys.lane(Lane.INTERACTIVE)) > 0

    await until(queued)
    gone = [key async for key in redis.scan_iter(f"{keys.base}:*")]
    await redis.delete(*gone)
    for lane in LANES:
        await create_group(redis, keys.lane(lane), GROUP)
    stub.paused.set()
    rows = await asyncio.gather(*waiting)
    np.testing.assert_allclose(np.concatenate(rows)[:, 0], np.arange(1, 40) + 1)


async def test_a_slow_job_is_not_sent_again(producer: Producer, stub: Any) -> None:
    stub.on_job = lambda *_: None  # it stays on the lane, as with a consumer that is still busy
    with pytest.raises(ResultTimeout):
        await producer.embed("a", timeout_s=2.5)
    assert len(stub.seen) == 1


async def test_an_unknown_outcome_is_cleared_up(producer: Producer, stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job is stored, but the reply to the call is lost on the way."""
    run = enqueue._SCRIPT.run
    lost = iter([True])

    async def lossy(*args: Any) -> Any:
        outcome = await run(*args)
        if next(lost, False):
            raise RedisConnectionError("the reply was lost")
        return outcome

    monkeypatch.setattr(enqueue._SCRIPT, "run", lossy)
    np.testing.assert_allclose((await producer.embed([[5]], timeout_s=20))[:, 0], [6])
    assert len(stub.seen) <= 2


async def test_a_call_that_never_arrived_is_made_again(
    producer: Producer, stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = enqueue._SCRIPT.run
    lost = iter([True])

    async def lossy(*args: Any) -> Any:
        if next(lost, False):
            raise RedisConnectionError("the call was lost")
        return await run(*args)

    monkeypatch.setattr(enqueue._SCRIPT, "run", lossy)
    np.testing.assert_allclose((await producer.embed([[5]], timeout_s=20))[:, 0], [6])
    assert len(stub.seen) == 1


async def test_cut_connections_lose_nothing(producer: Producer, stub: Any, redis: Redis) -> None:
    cuts = 0

    async def cut() -> None:
        """Cut the callers' connections; a consumer that loses its own is another matter."""
        nonlocal cuts
        for _ in range(10):
            await asyncio.sleep(0.1)
            clients: Any = await redis.client_list()
            for client in clients:
                if client["cmd"] in {"xread", "evalsha", "xtrim"}:
                    cuts += await redis.client_kill_filter(_id=client["id"])

    cutting = asyncio.create_task(cut())
    while not cutting.done():
        rows = await asyncio.gather(*(producer.embed([[n]], timeout_s=20) for n in range(1, 20)))
        np.testing.assert_allclose(np.concatenate(rows)[:, 0], np.arange(1, 20) + 1)
        await asyncio.sleep(0.02)
    await cutting
    assert cuts > 5


async def test_what_redis_never_took_fails_soon(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, start_stub_on: Any
) -> None:
    with EmbeddedServer(Settings()) as server:
        async with start_stub_on(server.url), Producer(server.url, settings=settings) as producer:
            await producer.embed("a")
            await asyncio.to_thread(server._process.kill)  # type: ignore[union-attr] # it is started
            # The fleet was fine a moment ago, so the request goes out before anybody has noticed.
            with pytest.raises(Unavailable):
                async with asyncio.timeout(20):
                    await producer.embed("a")
