"""Results that are forwarded to an inbox: each is delivered, whoever dies, until its receiver acknowledges it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest
from redis.asyncio import Redis

from embedstream.producer import Delivery, Lane, Producer, SyncProducer
from embedstream.producer.inbox_keys import MAX_NOTE_BYTES, most_rows
from embedstream.shared import results
from embedstream.shared.errors import InvalidInput, Overloaded, Unavailable
from embedstream.shared.jobs import MAX_INPUTS, Job
from embedstream.shared.keys import FIELD_PARTS, Keys
from embedstream.shared.options import VectorType
from embedstream.shared.results import MAX_PART_BYTES, ROW, ResultPart, Status
from embedstream.shared.settings import Settings

pytestmark = pytest.mark.integration

MINE = "00112233445566778899aabbccddeeff"


@pytest.fixture
async def producer(settings: Settings) -> AsyncIterator[Producer]:
    async with Producer(settings=settings) as producer:
        yield producer


async def take(deliveries: AsyncGenerator[Delivery, None], n_inputs: int, *, ack: bool = True) -> list[Delivery]:
    """Deliveries of so many inputs."""
    taken: list[Delivery] = []
    async with asyncio.timeout(20):
        while sum(len(delivery.vectors) for delivery in taken) < n_inputs:
            taken.append(await anext(deliveries))
            if ack:
                await taken[-1].ack()
    return taken


def rows(taken: list[Delivery]) -> dict[Any, int]:
    """What each id's vector was made of."""
    pairs = [(name, int(row[0]) - 1) for one in taken for name, row in zip(one.ids or (), one.vectors, strict=True)]
    assert len(dict(pairs)) == len(pairs)  # none twice
    return dict(pairs)


async def is_empty(redis: Redis, keys: Keys) -> bool:
    """Whether nothing is left of what was forwarded to `indexer`."""
    pending: Any = await redis.xpending(keys.inbox("indexer"), "g")
    left = await redis.xlen(keys.inbox("indexer")), await redis.hlen(keys.inbox_notes("indexer")), pending["pending"]
    return left == (0, 0, 0)


async def test_another_process_receives_them(
    settings: Settings, producer: Producer, stub: Any, redis: Redis, keys: Keys
) -> None:
    ids = [f"row {number}" for number in range(200)]
    name = await producer.forward([[n] for n in range(1, 201)], "indexer", ids=ids, tag="day 1", dtype="float16")
    async with Producer(settings=settings) as other, aclosing(other.deliveries("indexer")) as deliveries:
        taken = await take(deliveries, 200)
    assert rows(taken) == {f"row {number}": number + 1 for number in range(200)}
    assert {(one.request_id, one.tag, one.attempt, one.vectors.dtype.name) for one in taken} == {
        (name, "day 1", 1, "float16")
    }
    assert sorted(one.first for one in taken) == [0, 64, 128, 192]
    assert {job.lane for job in stub.seen} == {Lane.BULK}
    assert {job.ttl_ms for job in stub.seen} == {3_600_000}
    assert await is_empty(redis, keys)


async def test_an_inbox_for_each_of_many_users_leaves_no_loop_behind(producer: Producer, stub: Any) -> None:
    await asyncio.gather(*(producer.forward([[1]], f"user-{number}") for number in range(20)))
    await producer.forward([[1]], "user-3")  # and again
    await asyncio.sleep(0.1)
    assert [task for task in asyncio.all_tasks() if task.get_name() == "producer-submit"] == []


async def test_texts_need_no_ids(producer: Producer, stub: Any) -> None:
    await producer.forward(["the queue", "a"], "indexer")
    (one,) = await take(producer.deliveries("indexer"), 2)
    np.testing.assert_array_equal(one.vectors, await producer.embed(["the queue", "a"]))
    assert (one.tag, one.ids) == ("", None)


async def test_the_sender_may_be_gone(settings: Settings, producer: Producer, stub: Any) -> None:
    await stub.pause()
    async with Producer(settings=settings) as sender:
        await sender.forward([[5]], "indexer", ids=[7])
    stub.resume()
    assert rows(await take(producer.deliveries("indexer"), 1)) == {7: 5}


async def test_receivers_share_the_work(settings: Settings, producer: Producer, stub: Any) -> None:
    async with Producer(settings=settings) as other:
        found: dict[Any, int] = {}
        n_taken = [0, 0]

        async def receive(place: int, deliveries: AsyncGenerator[Delivery, None]) -> None:
            while len(found) < 1280:
                (one,) = await take(deliveries, 1)
                n_taken[place] += 1
                new = rows([one])
                assert not found.keys() & new.keys()
                found.update(new)

        receivers = [
            asyncio.create_task(receive(place, who.deliveries("indexer")))
            for place, who in enumerate((producer, other))
        ]
        await asyncio.sleep(0.2)  # both wait
        for first in range(0, 1280, 64):
            numbers = list(range(first, first + 64))
            await producer.forward([[n % 900] for n in numbers], "indexer", ids=numbers)
        async with asyncio.timeout(20):
            await asyncio.wait(receivers, return_when=asyncio.FIRST_COMPLETED)
        for task in receivers:
            task.cancel()
        await asyncio.wait(receivers)
    assert found == {number: number % 900 for number in range(1280)}
    assert min(n_taken) > 0


async def test_what_is_not_acknowledged_goes_to_another(
    settings: Settings, producer: Producer, stub: Any, redis: Redis, keys: Keys
) -> None:
    await producer.forward([[n] for n in range(1, 201)], "indexer", ids=list(range(200)))
    async with Producer(settings=settings) as other:
        deliveries = other.deliveries("indexer")
        held = await take(deliveries, 200, ack=False)
        await held[0].ack()
        await deliveries.aclose()
        taken = await take(producer.deliveries("indexer"), 200 - len(held[0].vectors))  # at once
    assert rows([*taken, held[0]]) == {number: number + 1 for number in range(200)}
    assert {one.attempt for one in taken} == {2}
    assert await is_empty(redis, keys)


RECEIVER = """
import asyncio, sys
from embedstream.producer import Producer
from embedstream.shared.settings import Settings

async def main():
    async with Producer(settings=Settings(redis_url=sys.argv[1], key_prefix=sys.argv[2])) as producer:
        async for delivery in producer.deliveries("indexer", claim_after_s=0.5):
            if delivery.first:
                print(*delivery.ids, flush=True)
                await asyncio.sleep(60)  # between receipt and acknowledgement
            await delivery.ack()

asyncio.run(main())
"""


async def test_a_receiver_that_is_killed_loses_nothing(
    settings: Settings, prefix: str, producer: Producer, stub: Any, redis: Redis, keys: Keys
) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", RECEIVER, str(settings.redis_url), prefix), stdout=asyncio.subprocess.PIPE
    )
    try:
        await producer.forward([[n] for n in range(1, 129)], "indexer", ids=list(range(128)))
        assert process.stdout is not None
        async with asyncio.timeout(30):
            said = await process.stdout.readline()
    finally:
        process.kill()
        await process.wait()
    taken = await take(producer.deliveries("indexer", claim_after_s=0.5), 64)
    assert list(rows(taken)) == [int(name) for name in said.split()] == list(range(64, 128))
    assert [one.attempt for one in taken] == [2]
    assert await is_empty(redis, keys)


async def test_a_receiver_that_is_slow_keeps_what_it_has(settings: Settings, producer: Producer, stub: Any) -> None:
    deliveries = producer.deliveries("indexer", claim_after_s=0.4)
    await producer.forward([[5]], "indexer", ids=[1])
    (held,) = await take(deliveries, 1, ack=False)
    async with Producer(settings=settings) as other:
        waiting = asyncio.ensure_future(anext(other.deliveries("indexer", claim_after_s=0.4)))
        await asyncio.sleep(1.5)
        assert not waiting.done()
        await held.ack()
        await held.ack()  # once more does no harm
        await producer.forward([[6]], "indexer", ids=[2])
        async with asyncio.timeout(20):
            assert rows([await waiting]) == {2: 6}
    await deliveries.aclose()


async def test_answers_that_come_twice_are_given_once(producer: Producer, stub: Any, redis: Redis, keys: Keys) -> None:
    stub.on_job = lambda _, parts: parts * 2
    await producer.forward([[5]], "indexer", ids=[1], request_id=MINE)
    await producer.forward([[6]], "indexer", ids=[2])
    while await redis.xlen(keys.inbox("indexer")) < 5:  # all of it, and the entry it was made with
        await asyncio.sleep(0.01)
    deliveries = producer.deliveries("indexer")
    assert rows(await take(deliveries, 2, ack=False)) == {1: 5, 2: 6}
    stub.on_job = lambda _, parts: parts
    await producer.forward([[7]], "indexer", ids=[3])
    assert rows(await take(deliveries, 1)) == {3: 7}


async def test_of_an_entry_only_what_is_left_is_given_again(
    settings: Settings, producer: Producer, stub: Any, redis: Redis, keys: Keys
) -> None:
    """Consumers put answers to several jobs into one entry."""
    held: list[bytes] = []

    def hold(_: Job, parts: list[ResultPart]) -> list[ResultPart]:
        held.extend(part.encode() for part in parts)
        return []

    stub.on_job = hold
    for number in (5, 6):
        await producer.forward([[number]], "indexer", ids=[number])
    while len(held) < 2:
        await asyncio.sleep(0.01)
    fields: Any = {FIELD_PARTS: results.frame(held)}
    await redis.xadd(keys.inbox("indexer"), fields)
    async with Producer(settings=settings) as other, aclosing(other.deliveries("indexer")) as deliveries:
        first, _ = await take(deliveries, 2, ack=False)
        await first.ack()
    taken = await take(producer.deliveries("indexer"), 1)
    assert rows([first, *taken]) == {5: 5, 6: 6}
    assert await is_empty(redis, keys)


async def test_answers_in_one_entry_may_be_acknowledged_at_one_time(
    producer: Producer, stub: Any, redis: Redis, keys: Keys
) -> None:
    await producer.forward([[5]], "indexer", ids=[5], request_id=MINE)
    await producer.forward([[6]], "indexer", ids=[6])
    while await redis.xlen(keys.inbox("indexer")) < 3:
        await asyncio.sleep(0.01)
    entries: Any = await redis.xrange(keys.inbox("indexer"))
    both: Any = {FIELD_PARTS: b"".join(fields[FIELD_PARTS] for _, fields in entries)}
    await redis.xadd(keys.inbox("indexer"), both)
    await redis.xdel(keys.inbox("indexer"), *(entry_id for entry_id, _ in entries))
    async with aclosing(producer.deliveries("indexer")) as deliveries:
        taken = await take(deliveries, 2, ack=False)
        await asyncio.gather(*(one.ack() for one in taken))
        assert await is_empty(redis, keys)


async def test_what_is_no_answer_stops_nobody(producer: Producer, stub: Any, redis: Redis, keys: Keys) -> None:
    await producer.forward([[5]], "indexer", ids=[1], request_id=MINE)
    rows_of_two = np.zeros(2, ROW)
    rows_of_two["vectors"] = 2  # as of a request for a vector of each token
    tokens = ResultPart(
        *(b"r" * 16, b"f" * 16, 0, 1, 0, 1, 0, rows_of_two, np.ones((4, 4), np.float32)), VectorType.FLOAT32
    )
    told: Any = {f"{(b'r' * 16).hex()}:0": b"64 {}"}
    await redis.hset(keys.inbox_notes("indexer"), mapping=told)
    for junk in (b"x", b"\xff" * 99, results.frame([b"ER" + bytes(99)]), results.frame([tokens.encode()])):
        fields: Any = {FIELD_PARTS: junk}
        await redis.xadd(keys.inbox("indexer"), fields)
    other: Any = {"q": b""}
    await redis.xadd(keys.inbox("indexer"), other)
    await producer.forward([[6]], "indexer", ids=[2])
    assert rows(await take(producer.deliveries("indexer"), 2)) == {1: 5, 2: 6}
    assert await redis.xlen(keys.inbox("indexer")) == 0


async def test_a_connection_that_breaks_while_answers_are_opened_loses_none(
    producer: Producer, stub: Any, redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(40):
        await producer.forward([[number + 1]], "indexer", ids=[number])
    real, n_calls = producer.redis.hmget, 0

    async def broken_at_times(*arguments: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls % 3 == 2:
            raise ConnectionError("cut")
        return await real(*arguments)

    monkeypatch.setattr(producer.redis, "hmget", broken_at_times)
    assert rows(await take(producer.deliveries("indexer"), 40)) == {number: number + 1 for number in range(40)}
    assert await is_empty(redis, keys)


async def test_an_inbox_is_made_anew_when_that_fails_at_first(
    producer: Producer, stub: Any, redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    deliveries = producer.deliveries("indexer", claim_after_s=3600)
    waiting = asyncio.ensure_future(anext(deliveries))
    while not await redis.exists(keys.inbox("indexer")):
        await asyncio.sleep(0.01)
    real, n_calls = producer.redis.evalsha, 0

    async def away_at_first(*arguments: Any) -> Any:
        nonlocal n_calls
        n_calls += keys.inbox("indexer") in arguments
        if n_calls == 1:
            raise ConnectionError("away")
        return await real(*arguments)

    monkeypatch.setattr(producer.redis, "evalsha", away_at_first)
    await redis.delete(keys.inbox("indexer"), keys.inbox_notes("indexer"))
    async with asyncio.timeout(20):
        while n_calls < 2:
            await asyncio.sleep(0.01)
    await producer.forward([[5]], "indexer", ids=[1])
    async with asyncio.timeout(20):
        assert rows([await waiting]) == {1: 5}


async def test_senders_are_refused_when_receivers_fall_behind(
    producer: Producer, stub: Any, redis: Redis, keys: Keys
) -> None:
    producer._forwarding._most_bytes = 3000  # a vector has 16
    for number in range(2):
        await producer.forward([[5]] * 64, "indexer", ids=[f"{number} {place}" for place in range(64)])
    with pytest.raises(Overloaded, match=r"`indexer` have 2,048 bytes .* more than 3,000 ") as caught:
        await producer.forward([[5]] * 64, "indexer")
    assert caught.value.retry_after_s > 0
    await take(producer.deliveries("indexer"), 64)
    await producer.forward([[5]] * 64, "indexer")
    assert await redis.hget(keys.inbox_notes("indexer"), "bytes") == b"2048"
    await producer.forward([[5]] * 640, "other")  # an empty inbox takes every request


async def test_what_the_lane_refuses_leaves_no_trace(settings: Settings, stub: Any, redis: Redis, keys: Keys) -> None:
    await stub.pause()
    async with Producer(settings=settings.model_copy(update={"max_lane_bytes": 500})) as producer:
        await producer.forward([[5]] * 64, "indexer", request_id=MINE)
        with pytest.raises(Overloaded, match="max-lane-bytes"):
            await producer.forward([[5]] * 64, "indexer")
        with pytest.raises(Overloaded, match="max-lane-bytes"):
            await producer.forward([[5]] * 64, "indexer", request_id=MINE)  # once more: the first is still to come
        fields: Any = await redis.hkeys(keys.inbox_notes("indexer"))
        assert sorted(fields) == [f"{MINE}:0".encode(), b"bytes"]
        stub.resume()
        assert len(await take(producer.deliveries("indexer"), 64)) == 1


async def test_inputs_that_failed_are_told(producer: Producer, stub: Any) -> None:
    def fail(job: Job, parts: list[ResultPart]) -> list[ResultPart]:
        (part,) = parts
        part.rows["status"][1], part.rows["message"][1], part.rows["vectors"][1] = Status.FAILED, 1, 0
        vectors = part.vectors[[0, 2]]
        return [
            ResultPart(*(part.request_id, part.fingerprint, 0, 1, 0, 1, 0, part.rows, vectors, part.dtype, ("no",)))
        ]

    stub.on_job = fail
    await producer.forward([[5], [6], [7]], "indexer", ids=["a", "b", "c"])
    (one,) = await take(producer.deliveries("indexer"), 3)
    assert one.vectors[:, 0].tolist() == [6, 0, 8]
    assert {row: (failure.status, failure.message) for row, failure in one.failures.items()} == {
        1: (Status.FAILED, "no")
    }


async def test_what_cannot_be_forwarded_is_said(producer: Producer, stub: Any, redis: Redis, keys: Keys) -> None:
    calls: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"ids": ["a"]}, InvalidInput, "1 ids for 2 inputs"),
        ({"ids": ["a", b"b"]}, InvalidInput, "texts or integers"),
        ({"tag": "x" * MAX_NOTE_BYTES}, InvalidInput, f"at most {MAX_NOTE_BYTES}"),
        ({"to": "a:b"}, InvalidInput, "name of an inbox"),
        ({"inputs": [[1] * 40], "long_inputs": "chunk"}, InvalidInput, "in pieces"),
        ({"inputs": [[1] * 40]}, InvalidInput, "40"),
        ({"request_id": "x"}, InvalidInput, "32 hexadecimal digits"),
    ]
    for arguments, kind, message in calls:
        with pytest.raises(kind, match=message):
            await producer.forward(**{"inputs": [[1], [2]], "to": "indexer", **arguments})
    with pytest.raises(InvalidInput, match="name of an inbox"):
        await anext(producer.deliveries("a b"))
    with pytest.raises(InvalidInput, match="claim_after_s is 0"):
        await anext(producer.deliveries("indexer", claim_after_s=0))
    assert await redis.exists(keys.inbox("indexer"), keys.inbox_notes("indexer")) == 0


async def test_an_inbox_that_redis_lost_is_made_anew(producer: Producer, stub: Any, redis: Redis, keys: Keys) -> None:
    deliveries = producer.deliveries("indexer", claim_after_s=3600)
    waiting = asyncio.ensure_future(anext(deliveries))
    while not await redis.exists(keys.inbox("indexer")):
        await asyncio.sleep(0.01)
    await redis.delete(keys.inbox("indexer"), keys.inbox_notes("indexer"))
    async with asyncio.timeout(20):
        while not await redis.exists(keys.inbox("indexer")):
            await asyncio.sleep(0.01)
    await producer.forward([[5]], "indexer", ids=[1])
    async with asyncio.timeout(20):
        assert rows([await waiting]) == {1: 5}


async def test_an_inbox_outlives_its_senders_for_a_while(
    producer: Producer, stub: Any, redis: Redis, keys: Keys
) -> None:
    await stub.pause()
    both = keys.inbox("indexer"), keys.inbox_notes("indexer")
    await producer.forward([[5]], "indexer", timeout_s=500)
    assert [4090 < await redis.ttl(key) <= 4100 for key in both] == [True, True]
    await producer.forward([[5]], "indexer", timeout_s=50)
    assert [await redis.ttl(key) > 4090 for key in both] == [True, True]  # never shortened


async def test_a_producer_that_is_closed_receives_no_more(
    settings: Settings, producer: Producer, stub: Any, redis: Redis, keys: Keys
) -> None:
    async with Producer(settings=settings) as other:
        await producer.forward([[5]], "indexer", ids=[1])
        (held,) = await take(other.deliveries("indexer"), 1, ack=False)
        waiting = asyncio.ensure_future(anext(other.deliveries("other")))
        # Until what the inbox was made with is forgotten: it would be handed back, and its receiver with it.
        while not await redis.exists(keys.inbox("other")) or await redis.xlen(keys.inbox("other")):
            await asyncio.sleep(0.01)
    with pytest.raises(Unavailable, match="closed"):
        async with asyncio.timeout(20):
            await waiting
    with pytest.raises(Unavailable, match="closed"):
        await held.ack()
    assert await redis.xinfo_consumers(keys.inbox("other"), "g") == []
    assert rows(await take(producer.deliveries("indexer"), 1)) == {1: 5}  # what it had goes to another


class Opening:
    """A client whose connection is still being opened when it is closed: as redis-py 8.1 then fails."""

    def __init__(self) -> None:
        self.reading, self.closed = asyncio.Event(), asyncio.Event()

    async def xreadgroup(self, *_: Any) -> None:
        self.reading.set()
        await self.closed.wait()
        raise AttributeError("'NoneType' object has no attribute 'writelines'")

    async def aclose(self) -> None:
        self.closed.set()


async def test_it_may_close_while_its_connection_opens(
    settings: Settings, stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening = Opening()
    monkeypatch.setattr("embedstream.producer.client.connect_reader", lambda *_, **__: opening)
    async with Producer(settings=settings) as other:
        waiting = asyncio.ensure_future(anext(other.deliveries("other")))
        async with asyncio.timeout(20):
            await opening.reading.wait()
    with pytest.raises(Unavailable, match="closed"):
        await waiting


async def test_what_is_no_fault_of_redis_is_not_tried_again(
    settings: Settings, stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening = Opening()
    opening.closed.set()
    async with Producer(settings=settings) as other:
        monkeypatch.setattr("embedstream.producer.client.connect_reader", lambda *_, **__: opening)
        with pytest.raises(AttributeError, match="writelines"):
            async with asyncio.timeout(20):
                await anext(other.deliveries("other"))


async def test_it_works_without_a_loop(settings: Settings, stub: Any, redis: Redis, keys: Keys) -> None:
    def run() -> None:
        with SyncProducer(settings=settings) as producer:
            producer.forward([[5], [6]], "indexer", ids=["a", "b"])
            for delivery in producer.deliveries("indexer"):
                assert (delivery.ids, delivery.vectors[:, 0].tolist()) == (("a", "b"), [6, 7])
                delivery.ack()
                break

    await asyncio.to_thread(run)
    assert await is_empty(redis, keys)


@pytest.mark.parametrize("dim", [4, 384, 4096, 100_000])
def test_the_answer_to_a_job_fits_one_part(dim: int) -> None:
    n_rows = min(MAX_INPUTS, most_rows(4 * dim))
    part = ResultPart(
        *(b"r" * 16, b"f" * 16, 0, 1, 0, 1, 0, np.zeros(n_rows, ROW), np.zeros((n_rows, dim), np.float32)),
        VectorType.FLOAT32,
        ("x" * 1024,) * n_rows,
    )
    assert len(results.split(part)) == 1
    assert len(part.encode()) <= MAX_PART_BYTES
    assert n_rows == MAX_INPUTS or (n_rows + 7) * 4 * dim > MAX_PART_BYTES
