from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError

from embedstream.consumer import publisher as publisher_module
from embedstream.consumer.entries import Entry, RawEntry
from embedstream.consumer.intake import Refused
from embedstream.consumer.publisher import Answer, DeadLetterBounds, Publisher, answer_of, answer_to_refused
from embedstream.shared import results
from embedstream.shared.connections import connect, create_group, is_transient
from embedstream.shared.jobs import Job
from embedstream.shared.keys import GROUP, Keys
from embedstream.shared.lanes import LANES, Lane
from embedstream.shared.results import ResultPart, Status, failed
from embedstream.shared.tokenization import Tokens

pytestmark = pytest.mark.integration


@pytest.fixture
async def redis(redis_url: str, keys: Keys) -> AsyncIterator[Redis]:
    client = connect(redis_url)
    for lane in LANES:
        await create_group(client, keys.lane(lane), GROUP)
    await client.xadd(keys.reply("me"), {"p": ""})
    yield client
    await client.aclose()


@pytest.fixture
async def publisher(redis: Redis, keys: Keys) -> AsyncIterator[Publisher]:
    publisher = Publisher(redis, keys)
    task = asyncio.create_task(publisher.run())
    yield publisher
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def finished(redis: Redis, keys: Keys, dim: int = 4, rows: int = 2, **changes: Any) -> Entry:
    """An entry that is on its lane, pending, and has its vectors."""
    lane = Lane.INTERACTIVE
    lengths = np.full(rows, 2, np.uint32)
    ids = np.arange(2 * rows, dtype=np.uint32)
    job = Job(b"r" * 16, 0, 1, 0, 60_000, lengths, ids=ids, **changes)
    await redis.xadd(keys.lane(lane), dict(zip(("h", "b"), job.encode(), strict=True)))
    reply: Any = await redis.xreadgroup(GROUP, "c", {keys.lane(lane): ">"}, 1)
    entry_id, fields = reply[0][1][0]
    entry = Entry(RawEntry(lane, entry_id, fields), job, keys.reply("me"), Tokens(ids, lengths), np.zeros(rows, bool))
    entry.store(np.arange(rows), np.arange(rows * dim, dtype="<f4").reshape(rows, dim))
    return entry


async def replies(redis: Redis, keys: Keys) -> list[ResultPart]:
    entries: Any = await redis.xrange(keys.reply("me"))
    return [results.decode(part) for _, fields in entries for part in results.unframe(fields[b"p"])]


async def left(redis: Redis, keys: Keys) -> tuple[int, int]:
    lane = keys.lane(Lane.INTERACTIVE)
    pending: Any = await redis.xpending(lane, GROUP)
    return await redis.xlen(lane), pending["pending"]


async def test_a_reply_and_the_removal_are_one(redis: Redis, keys: Keys, publisher: Publisher) -> None:
    entry = await finished(redis, keys)
    await publisher.put(answer_of(entry, b"f" * 16))
    await publisher.flush()
    (part,) = await replies(redis, keys)
    np.testing.assert_array_equal(part.vectors, np.arange(8).reshape(2, 4))
    assert await left(redis, keys) == (0, 0)


async def test_many_answers_of_one_caller_travel_in_one_entry(redis: Redis, keys: Keys) -> None:
    publisher = Publisher(redis, keys)
    for _ in range(20):
        await publisher.put(answer_of(await finished(redis, keys), b"f" * 16))
    task = asyncio.create_task(publisher.run())
    await publisher.flush()
    task.cancel()
    assert await redis.xlen(keys.reply("me")) == 2  # the marker, and one entry
    assert len(await replies(redis, keys)) == 20
    assert await left(redis, keys) == (0, 0)


async def test_large_answers_come_in_parts(redis: Redis, keys: Keys, publisher: Publisher) -> None:
    entry = await finished(redis, keys, dim=40_000, rows=16)
    await publisher.put(answer_of(entry, b"f" * 16))
    await publisher.flush()
    parts = await replies(redis, keys)
    assert len(parts) == 3
    np.testing.assert_array_equal(
        np.concatenate([part.vectors for part in parts]), np.arange(16 * 40_000).reshape(16, 40_000)
    )
    entries: Any = await redis.xrange(keys.reply("me"))
    assert max(len(fields[b"p"]) for _, fields in entries) <= results.MAX_PART_BYTES + 4
    assert await left(redis, keys) == (0, 0)


async def test_a_reply_refused_for_good_holds_nobody_back(redis: Redis, keys: Keys, publisher: Publisher) -> None:
    bad, good = await finished(redis, keys), await finished(redis, keys)
    await redis.set(keys.reply("bad"), "no stream")
    bad.reply_to = keys.reply("bad")
    await publisher.put(answer_of(bad, b"f" * 16))
    await publisher.put(answer_of(good, b"f" * 16))
    async with asyncio.timeout(20):
        await publisher.flush()
    assert len(await replies(redis, keys)) == 1
    assert await left(redis, keys) == (0, 0)


async def test_parts_that_were_confirmed_are_not_sent_again(
    redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "MAX_WRITE_BYTES", results.MAX_PART_BYTES)
    publisher = Publisher(redis, keys)
    answer = answer_of(await finished(redis, keys, dim=40_000, rows=16), b"f" * 16)
    await publisher._send_parts(answer)
    assert answer.sent == 1
    await publisher._publish([answer])
    assert await redis.xlen(keys.reply("me")) == 1 + len(answer.parts)


async def test_too_much_undelivered_makes_the_caller_wait(redis: Redis, keys: Keys) -> None:
    publisher = Publisher(redis, keys, most_waiting_bytes=1)
    await publisher.put(answer_of(await finished(redis, keys), b"f" * 16))
    second = asyncio.create_task(publisher.put(answer_of(await finished(redis, keys), b"f" * 16)))
    await asyncio.sleep(0.05)
    assert not second.done()
    task = asyncio.create_task(publisher.run())
    async with asyncio.timeout(20):
        await second
        await publisher.flush()
    task.cancel()


async def test_results_are_kept_under_a_key_when_asked(redis: Redis, keys: Keys, publisher: Publisher) -> None:
    entry = await finished(redis, keys, result_ttl_s=100)
    await publisher.put(answer_of(entry, b"f" * 16))
    await publisher.flush()
    stored: Any = await redis.hgetall(keys.result(b"r" * 16))
    np.testing.assert_array_equal(results.decode(stored[b"0:0"]).vectors, np.arange(8).reshape(2, 4))
    assert 0 < await redis.ttl(keys.result(b"r" * 16)) <= 100


async def test_a_caller_that_is_gone_gets_no_new_stream(redis: Redis, keys: Keys, publisher: Publisher) -> None:
    entry = await finished(redis, keys)
    await redis.delete(keys.reply("me"))
    await publisher.put(answer_of(entry, b"f" * 16))
    await publisher.flush()
    assert not await redis.exists(keys.reply("me"))
    assert await left(redis, keys) == (0, 0)


async def test_a_malformed_entry_is_kept_as_a_dead_letter(redis: Redis, keys: Keys, publisher: Publisher) -> None:
    raw = (await finished(redis, keys)).raw
    answer = failed(b"r" * 16, b"f" * 16, 0, 1, 0, 1, Status.INVALID_INPUT, "bad")
    await publisher.put(answer_to_refused(Refused(raw, "bad bytes", keys.reply("me"), answer, dead_letter=True)))
    await publisher.flush()
    letters: Any = await redis.xrange(keys.dead_letters)
    fields = letters[0][1]
    assert fields[b"why"] == b"bad bytes"
    assert fields[b"src"] == raw.entry_id
    assert fields[b"h"] == raw.fields[b"h"]
    assert (await replies(redis, keys))[0].message(0) == "bad"
    assert await left(redis, keys) == (0, 0)


async def test_an_answer_is_held_until_redis_takes_it(
    redis: Redis, keys: Keys, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter([RedisConnectionError("away"), OSError("away")])
    publish = publisher._publish

    async def flaky(answers: list[Answer]) -> None:
        for error in failures:
            raise error
        await publish(answers)

    monkeypatch.setattr(publisher, "_publish", flaky)
    await publisher.put(answer_of(await finished(redis, keys), b"f" * 16))
    await publisher.flush()
    assert next(failures, None) is None
    assert len(await replies(redis, keys)) == 1


async def test_nothing_is_removed_when_the_reply_is_refused(
    redis: Redis, keys: Keys, full_memory: Callable[[Redis], AbstractAsyncContextManager[None]]
) -> None:
    """At OOM a plain pipeline would refuse the reply and delete the job: this is why it is a transaction."""
    publisher = Publisher(redis, keys)
    entry = await finished(redis, keys)
    answer = answer_of(entry, b"f" * 16)
    async with full_memory(redis):
        with pytest.raises(OutOfMemoryError) as caught:
            await publisher._publish([answer])
    assert is_transient(caught.value)  # so the publisher holds the answer and tries again
    assert await left(redis, keys) == (1, 1)
    await publisher._publish([answer])
    assert await left(redis, keys) == (0, 0)
    assert len(await replies(redis, keys)) == 1


async def test_what_is_confirmed_has_left_its_lane(redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then an entry is in hand: what is not counts as astray, and would run again."""
    confirmed: list[RawEntry] = []
    before: list[int] = []
    publisher = Publisher(redis, keys, confirmed.extend)
    publish, failures = publisher._publish, iter([RedisConnectionError("away")] * 2)

    async def flaky(answers: list[Answer]) -> None:
        for error in failures:
            before.append(len(confirmed))
            raise error
        await publish(answers)
        before.append(len(confirmed))

    monkeypatch.setattr(publisher, "_publish", flaky)
    entries = [await finished(redis, keys) for _ in range(3)]
    for entry in entries:
        await publisher.put(answer_of(entry, b"f" * 16))
    task = asyncio.create_task(publisher.run())
    await publisher.flush()
    task.cancel()
    assert before == [0, 0, 0]
    assert confirmed == [entry.raw for entry in entries]
    assert await left(redis, keys) == (0, 0)


async def given_up(redis: Redis, keys: Keys, deaths: int = 4) -> Entry:
    """A finished entry one row of which killed consumers."""
    entry = await finished(redis, keys)
    entry.raw = replace(entry.raw, deaths=deaths)
    entry.dead_letter, entry.dead_row = "it kills", 7
    return entry


async def test_a_dead_letter_says_what_was_given_up(redis: Redis, keys: Keys, publisher: Publisher) -> None:
    entry, other = await given_up(redis, keys), "9-9"
    await redis.hset(keys.trials, mapping={entry.raw.entry_id.decode(): "1,1", other: "2"})
    await publisher.put(answer_of(entry, b"f" * 16))
    await publisher.flush()
    letters: Any = await redis.xrange(keys.dead_letters)
    assert [fields for _, fields in letters] == [
        {
            **entry.raw.fields,
            b"why": b"it kills",
            b"src": entry.raw.entry_id,
            b"lane": b"interactive",
            b"n": b"4",
            b"row": b"7",
        }
    ]
    assert len((await replies(redis, keys))[0].vectors) == 2  # and its caller has the answer
    assert await redis.hkeys(keys.trials) == [other.encode()]
    assert await left(redis, keys) == (0, 0)


async def test_a_suspect_that_was_innocent_leaves_no_notes(redis: Redis, keys: Keys, publisher: Publisher) -> None:
    entry = await finished(redis, keys)
    entry.raw = replace(entry.raw, deaths=2)
    await redis.hset(keys.trials, entry.raw.entry_id.decode(), "1")
    await publisher.put(answer_of(entry, b"f" * 16))
    await publisher.flush()
    assert not await redis.exists(keys.trials, keys.dead_letters)


async def test_dead_letters_are_bounded_in_number_and_in_age(redis: Redis, keys: Keys) -> None:
    """About: Redis removes whole nodes of a stream, of a hundred entries each."""
    publisher = Publisher(redis, keys, bounds=DeadLetterBounds(most=300, ttl_s=3600))
    task = asyncio.create_task(publisher.run())
    seconds, _ = await redis.time()
    old_ms, young_ms = (seconds - 3700) * 1000, (seconds - 3500) * 1000
    async with redis.pipeline(transaction=False) as pipe:
        for number in range(250):
            pipe.xadd(keys.dead_letters, {"why": "old"}, id=f"{old_ms}-{number}")
        pipe.xadd(keys.dead_letters, {"why": "young"}, id=f"{young_ms}-0")
        await pipe.execute()
    await publisher.put(answer_of(await given_up(redis, keys), b"f" * 16))
    await publisher.flush()
    old: Any = await redis.xrange(keys.dead_letters, max=f"{old_ms}-999")
    young: Any = await redis.xrange(keys.dead_letters, min=f"{young_ms}-0")
    assert len(old) < 100
    assert len(young) == 2
    for _ in range(420):
        await publisher.put(answer_of(await given_up(redis, keys), b"f" * 16))
    await publisher.flush()
    assert 300 <= await redis.xlen(keys.dead_letters) <= 400
    task.cancel()
