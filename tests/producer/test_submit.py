"""Requests that are handed over, and picked up by their id."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from embedstream.producer import Lane, Producer, SyncProducer, enqueue
from embedstream.producer.pickup import READ_COUNT
from embedstream.shared import results
from embedstream.shared.errors import InvalidInput, JobFailed, Overloaded, ResultNotFound, ResultTimeout, Unavailable
from embedstream.shared.jobs import Job
from embedstream.shared.keys import FIELD_JOBS, FIELD_ROWS, Keys
from embedstream.shared.results import ResultPart, Status
from embedstream.shared.settings import Settings

pytestmark = pytest.mark.integration

MINE = "00112233445566778899aabbccddeeff"


@pytest.fixture
async def producer(settings: Settings) -> AsyncIterator[Producer]:
    async with Producer(settings=settings) as producer:
        yield producer


async def test_another_process_picks_it_up(settings: Settings, producer: Producer, stub: Any) -> None:
    texts = [f"{number}" for number in range(200)]
    name = await producer.submit(texts, dimensions=2, dtype="float16")
    async with Producer(settings=settings) as other:
        vectors = await other.result(name)
        np.testing.assert_array_equal(vectors, await other.embed(texts, dimensions=2, dtype="float16"))
        again = await other.result(name, timeout_s=0)
    np.testing.assert_array_equal(again, vectors)
    assert vectors.dtype == np.float16
    vectors *= 2  # the caller's own


async def test_accepted_means_stored(producer: Producer, stub: Any, redis: Redis, keys: Keys) -> None:
    await stub.pause()
    name = await producer.submit([[number] for number in range(1, 300)], lane="bulk", result_ttl_s=50, timeout_s=7)
    assert await redis.xlen(keys.lane(Lane.BULK)) == 5
    entries: Any = await redis.xrange(keys.lane(Lane.BULK))
    assert {fields[b"rt"] for _, fields in entries} == {b""}
    key = keys.result(bytes.fromhex(name))
    assert await redis.hgetall(key) == {FIELD_JOBS: b"5", FIELD_ROWS: b""}
    assert 50 < await redis.ttl(key) <= 57  # its own time, and what may pass before
    with pytest.raises(ResultTimeout, match="5 of 5 jobs have no result"):
        await producer.result(name, timeout_s=0)
    waiting = asyncio.create_task(producer.result(name))
    stub.resume()
    np.testing.assert_allclose((await waiting)[:, 0], np.arange(1, 300) + 1)
    assert {(job.result_ttl_s, job.ttl_ms) for job in stub.seen} == {(57, 7000)}


async def test_token_vectors_have_their_own_way(producer: Producer, stub: Any) -> None:
    name = await producer.submit(["a b", "a"], per_token=True)
    assert [matrix.shape for matrix in await producer.result_tokens(name)] == [(4, 4), (3, 4)]
    with pytest.raises(InvalidInput, match="result_tokens"):
        await producer.result(name)
    plain = await producer.submit(["a b"])
    with pytest.raises(InvalidInput, match=r"use result\(\)"):
        await producer.result_tokens(plain)


async def test_many_parts_come_in_bounded_reads(producer: Producer, stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(job: Job, parts: list[ResultPart]) -> list[ResultPart]:
        return [piece for part in parts for piece in results.split(part, 150)]

    stub.on_job = cut
    sizes: list[int] = []
    ask = Redis.hmget

    def counted(self: Redis, name: Any, keys: Any, *args: Any) -> Any:
        sizes.append(len(keys))
        return ask(self, name, keys, *args)

    monkeypatch.setattr(Redis, "hmget", counted)
    name = await producer.submit([[number] for number in range(1, 40)])
    np.testing.assert_allclose((await producer.result(name))[:, 0], np.arange(1, 40) + 1)
    assert len(sizes) > 2
    assert max(sizes) <= READ_COUNT


@pytest.mark.parametrize("name", ["", "xyz", MINE[:-1], MINE + "0"])
async def test_what_is_no_id_is_said(producer: Producer, stub: Any, name: str) -> None:
    for call in (producer.result(name), producer.cancel(name), producer.submit(["a"], request_id=name)):
        with pytest.raises(InvalidInput, match="32 hexadecimal digits"):
            await call


async def test_unknown_ids_are_told_from_waiting_ones(producer: Producer, stub: Any) -> None:
    with pytest.raises(ResultNotFound, match=f"No request {MINE} is known"):
        await producer.result(MINE)
    with pytest.raises(ResultNotFound, match="No request"):
        await producer.cancel(MINE)


async def test_the_same_id_twice_is_one_result(producer: Producer, stub: Any, redis: Redis, keys: Keys) -> None:
    await stub.pause()
    assert await producer.submit([[1], [2]], request_id=MINE) == MINE
    assert await producer.submit([[1], [2]], request_id=MINE.upper()) == MINE
    stub.resume()
    np.testing.assert_allclose((await producer.result(MINE))[:, 0], [2, 3])
    while await redis.xlen(keys.lane(Lane.INTERACTIVE)):
        await asyncio.sleep(0.01)
    assert len(stub.seen) == 2
    assert set(await redis.hkeys(keys.result(bytes.fromhex(MINE)))) == {FIELD_JOBS, FIELD_ROWS, b"0:0"}
    np.testing.assert_allclose((await producer.result(MINE))[:, 0], [2, 3])
    with pytest.raises(InvalidInput, match="stands for a request of 1 jobs, and this one has 2"):
        await producer.submit([[1]] * 65, request_id=MINE)


async def test_a_failed_row_is_told(producer: Producer, stub: Any) -> None:
    def fail(job: Job, parts: list[ResultPart]) -> list[ResultPart]:
        print_ = parts[0].fingerprint
        return [results.failed(job.request_id, print_, job.index, job.count, job.first_input, 1, Status.FAILED, "hot")]

    stub.on_job = fail
    name = await producer.submit(["a"])
    with pytest.raises(JobFailed, match="hot"):
        await producer.result(name)


async def test_a_cancelled_request_says_so(producer: Producer, stub: Any, redis: Redis, keys: Keys) -> None:
    await stub.pause()
    name = await producer.submit(["a"])
    waiting = asyncio.create_task(producer.result(name))
    await producer.cancel(name)
    for asked in (waiting, producer.result(name, timeout_s=0)):
        with pytest.raises(ResultNotFound, match=f"The request {name} was cancelled"):
            await asked
    with pytest.raises(InvalidInput, match="was cancelled; take a new id"):
        await producer.submit(["a"], request_id=name)
    while not await redis.exists(keys.notices):
        await asyncio.sleep(0.01)
    entries: Any = await redis.xrange(keys.notices)
    assert [fields for _, fields in entries] == [{b"c": bytes.fromhex(name)}]
    stub.resume()
    while await redis.xlen(keys.lane(Lane.INTERACTIVE)):  # computed all the same: it stays cancelled
        await asyncio.sleep(0.01)
    with pytest.raises(ResultNotFound, match="was cancelled"):
        await producer.result(name)


async def test_a_refused_request_leaves_no_trace(settings: Settings, stub: Any, redis: Redis, keys: Keys) -> None:
    await stub.pause()
    async with Producer(settings=settings.model_copy(update={"max_lane_bytes": 1000})) as producer:
        first = await producer.submit([[1]] * 640)  # an empty lane takes all of it
        with pytest.raises(Overloaded):
            await producer.submit(["a"], request_id=MINE)
        with pytest.raises(ResultNotFound):
            await producer.result(MINE)
        with pytest.raises(Overloaded):
            await producer.submit([[1]] * 640, request_id=first)
        with pytest.raises(ResultTimeout):  # refused this time, and on its way since the first
            await producer.result(first, timeout_s=0)
    stub.resume()


async def test_a_lost_confirmation_is_asked_for_again(
    producer: Producer, stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await producer.submit(["warm"])
    send = Redis.evalsha
    lost = 0

    async def lose(self: Redis, *args: Any) -> Any:
        nonlocal lost
        reply = await send(self, *args)
        if b"EJ" in b"".join(arg[:2] for arg in args if isinstance(arg, bytes)) and lost < 2:
            lost += 1
            raise RedisConnectionError("gone")
        return reply

    monkeypatch.setattr(Redis, "evalsha", lose)
    name = await producer.submit([[1], [2]])
    assert lost == 2
    np.testing.assert_allclose((await producer.result(name))[:, 0], [2, 3])


async def test_a_caller_that_gives_up_breaks_no_command(producer: Producer, stub: Any, redis: Redis) -> None:
    """Whatever is cancelled in the middle, no connection is given up and nothing is left over."""

    async def connections_made() -> int:
        stats: Any = await redis.info("stats")
        return int(stats["total_connections_received"])

    await asyncio.gather(*(producer.submit(["warm"]) for _ in range(10)))
    before, connections = len(asyncio.all_tasks()), await connections_made()
    for delay_s in np.linspace(0, 0.002, 300):
        task = asyncio.create_task(producer.submit(["a"]))
        await asyncio.sleep(float(delay_s))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await producer._by_id.join()
    assert len(asyncio.all_tasks()) <= before + 2  # the fleet's polling may have one of its own
    assert await connections_made() - connections < 16  # the pool may fill; a command that is broken off costs one more
    assert await producer.result(await producer.submit([[1]])) is not None


async def test_redis_away_is_said(producer: Producer, stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = await producer.submit(["a"])

    async def gone(*_: Any, **__: Any) -> Any:
        raise RedisConnectionError("gone")

    monkeypatch.setattr("redis.asyncio.client.Pipeline.execute", gone)
    with pytest.raises(Unavailable, match="cannot be reached"):
        await producer.result(name, timeout_s=0)
    with pytest.raises(Unavailable, match="cannot be reached"):
        await producer.submit(["a"])


async def test_a_result_without_a_marker_is_a_result(producer: Producer, stub: Any, redis: Redis, keys: Keys) -> None:
    """Producers in other languages need not write how many jobs they sent."""
    name = await producer.submit([[1]] * 65)
    await producer.result(name)
    await redis.hdel(keys.result(bytes.fromhex(name)), FIELD_JOBS.decode())
    assert (await producer.result(name, timeout_s=0)).shape == (65, 4)


async def test_without_an_event_loop(settings: Settings, stub: Any) -> None:
    def work() -> Any:
        with SyncProducer(settings=settings) as producer:
            name = producer.submit([[1], [2]])
            tokens = producer.submit([[1, 2]], per_token=True)
            cancelled = producer.submit([[1]])
            producer.cancel(cancelled)
            with pytest.raises(ResultNotFound):
                producer.result(cancelled)
            return producer.result(name, timeout_s=10), producer.result_tokens(tokens)

    vectors, (matrix,) = await asyncio.to_thread(work)
    np.testing.assert_allclose(vectors[:, 0], [2, 3])
    assert matrix.shape == (2, 4)


@pytest.mark.parametrize("timeout_s", [float("nan"), float("inf"), -1.0])
async def test_no_result_is_waited_for_without_end(producer: Producer, stub: Any, timeout_s: float) -> None:
    with pytest.raises(InvalidInput, match="timeout_s is"):
        async with asyncio.timeout(20):
            await producer.result(MINE, timeout_s=timeout_s)


async def test_a_part_of_a_second_is_no_time_to_keep_a_result(producer: Producer, stub: Any, redis: Redis) -> None:
    with pytest.raises(InvalidInput, match="whole number"):
        await producer.submit(["a"], result_ttl_s=1.5, request_id=MINE)  # type: ignore[arg-type] # on purpose
    with pytest.raises(ResultNotFound):
        await producer.result(MINE, timeout_s=0)


async def test_submitting_ends_with_its_time(producer: Producer, stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = asyncio.Event()
    run = enqueue._SCRIPT.run

    async def slow(*args: Any) -> Any:
        await answer.wait()
        return await run(*args)

    monkeypatch.setattr(enqueue._SCRIPT, "run", slow)
    with pytest.raises(Unavailable, match="submit them again under the same id"):
        async with asyncio.timeout(4):  # less than it takes to give Redis up
            await producer.submit(["a"], timeout_s=0.1)
    answer.set()
