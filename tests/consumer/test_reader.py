from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from embedstream.consumer.reader import FIRST_COUNT, MAX_COUNT, MIN_COUNT, LaneReader
from embedstream.shared.connections import connect, connect_reader
from embedstream.shared.keys import Keys
from embedstream.shared.lanes import LANES, Lane

pytestmark = pytest.mark.integration


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    client = connect(redis_url)
    yield client
    await client.aclose()


@pytest.fixture
async def reader(redis_url: str, keys: Keys) -> AsyncIterator[LaneReader]:
    client = connect_reader(redis_url)
    reader = LaneReader(client, keys, "c")
    await reader.prepare()
    yield reader
    await client.aclose()


async def fill(redis: Redis, keys: Keys, lane: Lane, count: int, size: int = 10) -> None:
    for number in range(count):
        await redis.xadd(keys.lane(lane), {"h": str(number), "b": b"x" * size})


async def test_waiting_reads_both_lanes_interactive_first(reader: LaneReader, redis: Redis, keys: Keys) -> None:
    await fill(redis, keys, Lane.BULK, 2)
    await fill(redis, keys, Lane.INTERACTIVE, 1)
    entries = await reader.wait(LANES, 16)
    assert [(entry.lane, entry.fields[b"h"]) for entry in entries] == [
        (Lane.INTERACTIVE, b"0"),
        (Lane.BULK, b"0"),
        (Lane.BULK, b"1"),
    ]
    assert entries[0].enqueued_ms > 1_600_000_000_000


async def test_entries_from_before_the_group_are_read(redis: Redis, redis_url: str, keys: Keys) -> None:
    await fill(redis, keys, Lane.INTERACTIVE, 1)
    client = connect_reader(redis_url)
    reader = LaneReader(client, keys, "c")
    await reader.prepare()
    await reader.prepare()  # having the groups already is fine
    assert len(await reader.wait(LANES, 16)) == 1
    await client.aclose()


async def test_taking_brings_no_more_than_asked(reader: LaneReader, redis: Redis, keys: Keys) -> None:
    await fill(redis, keys, Lane.INTERACTIVE, 5)
    await fill(redis, keys, Lane.BULK, 5)
    entries = await reader.take({Lane.INTERACTIVE: 3, Lane.BULK: 1})
    assert [entry.lane for entry in entries].count(Lane.INTERACTIVE) == 3
    assert [entry.lane for entry in entries].count(Lane.BULK) == 1
    assert await reader.take({Lane.INTERACTIVE: 0, Lane.BULK: 0}) == []


async def test_an_empty_wait_returns(reader: LaneReader) -> None:
    assert await reader.wait(LANES, 16) == []


async def test_reads_grow_with_small_entries_and_shrink_at_once(reader: LaneReader, redis: Redis, keys: Keys) -> None:
    assert reader.most == MIN_COUNT
    for _ in range(80):
        await fill(redis, keys, Lane.INTERACTIVE, 1)
        await reader.take({Lane.INTERACTIVE: 1})
    assert reader.most == MAX_COUNT
    await fill(redis, keys, Lane.INTERACTIVE, 1, size=200_000)
    await reader.take({Lane.INTERACTIVE: 1})
    assert reader.most < MIN_COUNT * 2


async def test_a_lane_is_taken_of_carefully_at_first(reader: LaneReader, redis: Redis, keys: Keys) -> None:
    await fill(redis, keys, Lane.BULK, 7 * FIRST_COUNT)
    first, second, third = [len(await reader.take({Lane.BULK: MAX_COUNT})) for _ in range(3)]
    assert (first, second, third) == (FIRST_COUNT, 2 * FIRST_COUNT, 4 * FIRST_COUNT)
    assert await reader.take({Lane.BULK: MAX_COUNT}) == []  # it was quiet: careful again
    await fill(redis, keys, Lane.BULK, 2 * FIRST_COUNT)
    assert len(await reader.take({Lane.BULK: MAX_COUNT})) == FIRST_COUNT


async def test_a_lost_group_is_created_again(reader: LaneReader, redis: Redis, keys: Keys) -> None:
    await redis.delete(keys.lane(Lane.INTERACTIVE), keys.lane(Lane.BULK))
    assert await reader.wait(LANES, 16) == []
    await fill(redis, keys, Lane.INTERACTIVE, 1)
    assert len(await reader.wait(LANES, 16)) == 1


async def test_a_lane_that_lost_its_group_loses_nothing_of_the_other(
    reader: LaneReader, redis: Redis, keys: Keys
) -> None:
    await fill(redis, keys, Lane.INTERACTIVE, 2)
    await redis.delete(keys.lane(Lane.BULK))
    assert len(await reader.take({Lane.INTERACTIVE: 5, Lane.BULK: 5})) == 2
    await fill(redis, keys, Lane.BULK, 1)
    assert len(await reader.take({Lane.INTERACTIVE: 5, Lane.BULK: 5})) == 1


async def test_waiting_brings_no_more_than_asked(reader: LaneReader, redis: Redis, keys: Keys) -> None:
    await fill(redis, keys, Lane.INTERACTIVE, 5)
    assert len(await reader.wait(LANES, 2)) == 2


async def test_waiting_leaves_other_lanes_alone(reader: LaneReader, redis: Redis, keys: Keys) -> None:
    await fill(redis, keys, Lane.BULK, 5)
    assert await reader.wait([Lane.INTERACTIVE], 5, block_ms=20) == []


async def test_a_lost_connection_is_no_end(reader: LaneReader, redis: Redis, keys: Keys) -> None:
    await reader.wait(LANES, 16)
    await redis.client_kill_filter(_type="normal", skipme=True)
    await fill(redis, keys, Lane.INTERACTIVE, 1)
    entries = await reader.wait(LANES, 16) or await reader.wait(LANES, 16)
    assert len(entries) == 1
