"""Maps over any number of items: each with its vector once, and no more of them in memory than it takes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sqlite3
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from operator import itemgetter
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from redis.asyncio import Redis

from embedstream.producer import InputFailure, Lane, Producer, SyncProducer, admission, mapper
from embedstream.producer.credit import FLOOR_TOKENS
from embedstream.producer.mapper import REQUEST_INPUTS
from embedstream.shared import jobs
from embedstream.shared.errors import InputTooLong, InvalidInput, Unavailable
from embedstream.shared.jobs import Job
from embedstream.shared.keys import FIELD_CANCELLED, Keys
from embedstream.shared.results import ResultPart
from embedstream.shared.settings import Settings

pytestmark = pytest.mark.integration

Starter = Callable[..., Awaitable[Any]]


@pytest.fixture
async def producer(settings: Settings) -> AsyncIterator[Producer]:
    async with Producer(settings=settings.model_copy(update={"reconcile_after_s": 0.2})) as producer:
        yield producer


class Source:
    """Endless arrays of token ids, counted as they are read."""

    def __init__(self, length: int = 1) -> None:
        self.n_read = 0
        self._length = length

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        for number in itertools.count():
            self.n_read += 1
            yield np.full(self._length, number % 900)


def first(vector: Any) -> int:
    """The sum of the ids that the stub has made a vector of."""
    return int(vector[0]) - 1


async def numbers(count: int) -> AsyncGenerator[int, None]:
    for number in range(count):
        if number % 100 == 0:
            await asyncio.sleep(0)
        yield number


def ids(number: int) -> list[int]:
    return [number % 900]


async def take(pairs: AsyncIterator[Any], into: list[Any]) -> None:
    async for pair in pairs:
        into.append(pair)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


class Held:
    """Of a stub: entries that it keeps to itself until it is told to answer them."""

    def __init__(self, stub: Any, holds: Callable[[Job], bool]) -> None:
        self.entries: list[tuple[Any, ...]] = []
        self._serve = stub.serve
        self._holds = holds
        stub.serve = self.serve

    async def serve(self, lane: bytes, entry_id: bytes, fields: dict[bytes, bytes]) -> None:
        if self._holds(jobs.decode(fields[b"h"], fields[b"b"])):
            self.entries.append((lane, entry_id, fields))
        else:
            await self._serve(lane, entry_id, fields)

    @property
    def n_inputs(self) -> int:
        """Of all that it keeps."""
        return sum(jobs.decode(fields[b"h"], fields[b"b"]).n_inputs for _, _, fields in self.entries)

    async def let_go(self) -> None:
        self._holds = lambda _: False
        for entry in self.entries:
            await self._serve(*entry)


def holding(stub: Any, number: int) -> Held:
    """Hold the job that begins with this token id, however many inputs it has: the first ones may not be full."""
    return Held(stub, lambda job: job.ids is not None and job.ids[0] == number)


async def test_every_item_comes_with_its_vector_in_order(producer: Producer, stub: Any) -> None:
    pairs = [(item, first(vector)) async for item, vector in producer.map(numbers(3000), text=ids)]
    assert pairs == [(number, number % 900) for number in range(3000)]
    assert {job.lane for job in stub.seen} == {Lane.BULK}


async def test_rows_have_their_text_in_a_column(producer: Producer, stub: Any) -> None:
    rows = [{"id": number, "text": "the queue"} for number in range(5)]
    pairs = [pair async for pair in producer.map(rows, text=itemgetter("text"))]
    assert [row["id"] for row, _ in pairs] == list(range(5))
    expected = await producer.embed("the queue")
    np.testing.assert_array_equal(np.stack([vector for _, vector in pairs]), np.repeat(expected, 5, axis=0))
    pairs[0][1][:] = 0  # the caller's own


async def test_options_travel(producer: Producer, stub: Any) -> None:
    options: Any = {"dimensions": 2, "dtype": "float16", "lane": "interactive", "timeout_s": 7}
    ((_, vector),) = [pair async for pair in producer.map(["a"], **options)]
    assert (vector.shape, vector.dtype) == ((2,), np.float16)
    assert stub.seen[0].lane is Lane.INTERACTIVE
    assert 6000 < stub.seen[0].ttl_ms <= 7000


async def test_order_is_kept_whatever_is_done_first(producer: Producer, stub: Any) -> None:
    held = holding(stub, 0)
    pairs = producer.map(range(700), text=ids)
    waiting = asyncio.ensure_future(anext(pairs))
    await until(lambda: held.n_inputs > 0 and sum(job.n_inputs for job in stub.seen) == 700 - held.n_inputs)
    assert not waiting.done()
    await held.let_go()
    assert [(await waiting)[0], *[item async for item, _ in pairs]] == list(range(700))


async def test_or_they_come_as_they_are_done(producer: Producer, stub: Any) -> None:
    held = holding(stub, 0)
    found = []
    async for item, vector in producer.map(range(700), text=ids, ordered=False):
        assert first(vector) == item
        found.append(item)
        if len(found) == 1:
            await held.let_go()
    assert found[0] > 0
    assert sorted(found) == list(range(700))


async def test_a_slow_source_waits_for_nothing(producer: Producer, stub: Any) -> None:
    has_it = asyncio.Event()

    async def source() -> AsyncIterator[int]:
        yield 5
        await has_it.wait()
        yield 6

    found = []
    async with asyncio.timeout(20):
        async for item, _ in producer.map(source(), text=ids):
            found.append(item)
            has_it.set()
    assert found == [5, 6]


async def test_a_source_that_flows_fills_its_requests(producer: Producer, stub: Any) -> None:
    async def source() -> AsyncIterator[int]:
        for number in range(2000):
            await asyncio.sleep(0)  # one item a turn of the loop
            yield number

    assert len([pair async for pair in producer.map(source(), text=ids)]) == 2000
    assert len(stub.seen) < 200


@pytest.mark.parametrize(("most_items", "length"), [(1000, 1), (100_000, 16)])
async def test_the_source_is_read_no_further_than_there_is_credit(
    producer: Producer, stub: Any, most_items: int, length: int
) -> None:
    await stub.pause()
    source = Source(length)
    pairs = producer.map(source, most_items=most_items)
    waiting = asyncio.ensure_future(anext(pairs))
    bound = min(most_items, FLOOR_TOKENS // length + 2 * REQUEST_INPUTS)
    await until(lambda: source.n_read >= bound // 2)
    await asyncio.sleep(0.3)  # it may read on now, and does not
    assert source.n_read <= bound
    waiting.cancel()
    await asyncio.wait([waiting])
    await pairs.aclose()


async def test_a_reader_that_stops_stops_the_source(producer: Producer, stub: Any) -> None:
    source = Source()
    pairs = producer.map(source, most_items=2000)
    for _ in range(10):
        await anext(pairs)
    await until(lambda: source.n_read == 2000)
    await asyncio.sleep(0.3)
    assert source.n_read == 2000
    for _ in range(3000):  # and it goes on with its reader
        await anext(pairs)
    assert source.n_read > 3000
    await pairs.aclose()


async def test_inputs_that_fail_alone_are_told_with_their_place(producer: Producer, stub: Any) -> None:
    items: list[Any] = ["a"] * 300
    items[3], items[270], items[280], items[290] = None, "a " * 20, [1, 2], [1000]
    found = [pair async for pair in producer.map(items, on_failure="yield")]
    assert [item for item, _ in found] == items
    failures = {place: vector for place, (_, vector) in enumerate(found) if isinstance(vector, InputFailure)}
    assert sorted(failures) == [3, 270, 290]
    assert "the input at index 3 is a NoneType" in failures[3].message
    assert "input at index 270 has 22 tokens" in failures[270].message
    assert "(input at index 290)" in str(failures[290].error())
    assert {job.texts is None for job in stub.seen} == {True}
    with pytest.raises(InvalidInput, match="index 3 "):
        [pair async for pair in producer.map(items)]
    items[3] = "a"
    found = []
    with pytest.raises(InputTooLong, match="input at index 270 "):
        await take(producer.map(items), found)
    assert len(found) == 270  # all before it


async def test_what_is_wrong_with_all_of_them_ends_it(producer: Producer, stub: Any) -> None:
    with pytest.raises(InvalidInput, match="dimensions"):
        await anext(producer.map(["a"], dimensions=5))
    with pytest.raises(InvalidInput, match="a single one is for embed"):
        producer.map("a")
    with pytest.raises(InvalidInput, match="choose from raise, yield"):
        producer.map(["a"], on_failure="skip")  # type: ignore[call-overload] # that is what is wrong
    with pytest.raises(InvalidInput, match="most_items is 0"):
        producer.map(["a"], most_items=0)
    with pytest.raises(InvalidInput, match="patience_s is nan"):
        producer.map(["a"], patience_s=float("nan"))


async def test_what_was_read_before_the_source_failed_is_embedded(producer: Producer, stub: Any) -> None:
    def source() -> Iterator[int]:
        yield from range(5)
        raise LookupError("the source")

    found: list[Any] = []
    with pytest.raises(LookupError, match="the source"):
        await take(producer.map(source(), text=ids), found)
    assert [item for item, _ in found] == [0, 1, 2, 3, 4]


async def test_refused_requests_are_sent_again(settings: Settings, stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MIN_RETRY_S", 0.02)
    monkeypatch.setattr(mapper.log, "warning", lambda event, **fields: said.append((event, fields["reason"])))
    said: list[tuple[str, str]] = []
    async with Producer(settings=settings.model_copy(update={"max_lane_bytes": 3000})) as producer:
        pairs = [(item, first(vector)) async for item, vector in producer.map(range(3000), text=ids)]
    assert pairs == [(number, number % 900) for number in range(3000)]
    assert any(event == "map.waits" and "--max-lane-bytes" in reason for event, reason in said)


async def test_it_waits_for_consumers_as_long_as_its_patience(
    settings: Settings, start_stub: Starter, producer: Producer
) -> None:
    with pytest.raises(Unavailable):
        await anext(producer.map(["a"], patience_s=0))
    waiting = asyncio.ensure_future(anext(producer.map([[5]], patience_s=60)))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await start_stub()
    assert first((await waiting)[1]) == 5


async def test_what_is_computed_again_is_seen_once(producer: Producer, stub: Any) -> None:
    def again(job: Job, parts: list[ResultPart]) -> list[ResultPart]:
        return parts * 2

    stub.on_job = again
    found = [(item, first(vector)) async for item, vector in producer.map(range(2000), text=ids, ordered=False)]
    assert sorted(found) == [(number, number % 900) for number in range(2000)]


async def test_jobs_that_are_lost_are_sent_again(producer: Producer, stub: Any, redis: Redis) -> None:
    held = Held(stub, lambda _: True)
    found: list[Any] = []
    mapping = asyncio.create_task(take(producer.map(range(700), text=ids), found))
    await until(lambda: len(held.entries) >= 3)
    lost = held.entries[:3]
    for lane, entry_id, _ in lost:
        await redis.xack(lane, "g", entry_id)
        await redis.xdel(lane, entry_id)
    held.entries = held.entries[3:]
    await held.let_go()
    async with asyncio.timeout(20):
        await mapping
    assert [(item, first(vector)) for item, vector in found] == [(number, number) for number in range(700)]


async def test_cut_connections_change_nothing(producer: Producer, stub: Any, redis: Redis) -> None:
    done = asyncio.Event()

    async def cut() -> int:
        """Cut the caller's connections; a consumer that loses its own is another matter."""
        cuts = 0
        while not done.is_set():
            clients: Any = await redis.client_list()
            for client in clients:
                if client["cmd"] in {"xread", "evalsha", "xtrim"}:
                    cuts += await redis.client_kill_filter(_id=client["id"])
            await asyncio.sleep(0.05)
        return cuts

    cutting = asyncio.create_task(cut())
    found = [(item, first(vector)) async for item, vector in producer.map(numbers(20_000), text=ids)]
    done.set()
    assert await cutting > 3
    assert found == [(number, number % 900) for number in range(20_000)]


async def test_a_map_that_is_closed_early_is_called_off(
    producer: Producer, stub: Any, redis: Redis, keys: Keys
) -> None:
    held = Held(stub, lambda _: len(stub.seen) >= 4)
    pairs = producer.map(Source(), most_items=2000)
    await anext(pairs)
    await until(lambda: len(held.entries) > 4)
    await pairs.aclose()
    session = producer._sessions.of(keys)
    assert session.replies.requests == {}
    assert [task.get_name() for task in asyncio.all_tasks() if "Mapper" in str(task.get_coro())] == []
    await until(lambda: not producer._notices._waiting)
    notices: Any = await redis.xrange(keys.notices)
    called_off = b"".join(fields[FIELD_CANCELLED] for _, fields in notices)
    for _, _, fields in held.entries:
        assert fields[b"h"][4:20] in called_off
    await held.let_go()
    async with asyncio.timeout(20):  # nobody waits for what comes now; it is read, and leaves
        while await redis.xlen(keys.lane(Lane.BULK)) or await redis.xlen(session.replies._stream) > 1:
            await asyncio.sleep(0.01)


async def test_a_producer_that_is_closed_ends_its_maps(settings: Settings, stub: Any) -> None:
    await stub.pause()
    async with Producer(settings=settings) as producer:
        waiting = asyncio.ensure_future(anext(producer.map([[5]])))
        await until(lambda: any(producer._sessions.requests()))
    with pytest.raises(Unavailable, match="closed"):
        await waiting
    with pytest.raises(Unavailable, match="not open"):
        await anext(Producer(settings=settings).map([[5]]))


async def test_arrays_of_numpy_are_sources_too(producer: Producer, stub: Any) -> None:
    matrix = np.arange(12, dtype=np.uint16).reshape(6, 2)
    assert [first(vector) async for _, vector in producer.map(matrix)] == matrix.sum(axis=1).tolist()
    texts = np.array(["a", "the queue"], object)
    assert len([pair async for pair in producer.map(texts)]) == 2
    with pytest.raises(InvalidInput, match="index 0 is a uint16"):
        await anext(producer.map(matrix[0]))


def embed_all(producer: SyncProducer, path: str, found: list[Any]) -> None:
    """A cursor may be used in the thread alone in which it was made."""
    with sqlite3.connect(path) as database:
        rows = database.execute("SELECT id, number FROM rows ORDER BY id")
        found += [(row[0], first(vector)) for row, vector in producer.map(rows, text=lambda row: [row[1]])]
    database.close()


async def test_threads_read_their_own_sources(settings: Settings, stub: Any, tmp_path: Any) -> None:
    path = str(tmp_path / "rows.db")
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE rows (id INTEGER, number INTEGER)")
        database.executemany("INSERT INTO rows VALUES (?, ?)", [(n, n % 900) for n in range(3000)])
    database.close()
    found: list[list[Any]] = [[], [], []]

    def run() -> None:
        with SyncProducer(settings=settings) as producer:
            threads = [threading.Thread(target=embed_all, args=(producer, path, rows)) for rows in found]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    await asyncio.to_thread(run)
    assert found == [[(n, n % 900) for n in range(3000)]] * 3


async def test_a_map_in_threads_reads_ahead_as_far_as_one_on_a_loop(settings: Settings, stub: Any) -> None:
    await stub.pause()
    source = Source()

    def run() -> tuple[int, int, list[int]]:
        with SyncProducer(settings=settings) as producer:
            pairs = producer.map(source, most_items=1000)
            some = [first(vector) for _, vector in itertools.islice(pairs, 10)]
            ahead = source.n_read
            pairs.close()
            return ahead, source.n_read, some

    running = asyncio.ensure_future(asyncio.to_thread(run))
    await until(lambda: source.n_read == 1000)  # while nothing is answered
    stub.resume()
    ahead, afterwards, some = await running
    assert some == list(range(10))
    assert ahead == afterwards <= 1000


async def test_what_goes_wrong_in_threads_is_raised_there(settings: Settings, stub: Any) -> None:
    def source() -> Iterator[int]:
        yield from range(5)
        raise LookupError("the source")

    def run() -> None:
        found: list[Any] = []
        with SyncProducer(settings=settings) as producer:
            pairs = producer.map(source(), text=ids)
            with pytest.raises(LookupError, match="the source"):
                found.extend(pairs)
            assert [item for item, _ in found] == [0, 1, 2, 3, 4]
            failed = list(producer.map(["a", None], on_failure="yield"))
            assert isinstance(failed[1][1], InputFailure)
            with pytest.raises(InvalidInput, match="index 1"):
                list(producer.map(["a", None]))
            left = producer.map(Source())
            next(left)
        with pytest.raises(RuntimeError, match="closed"):
            list(left)
        with pytest.raises(RuntimeError, match="not open"):
            producer.map(["a"])

    await asyncio.to_thread(run)


async def test_a_map_in_threads_reads_no_item_too_many(settings: Settings, stub: Any) -> None:
    source = Source()

    def run() -> int:
        with SyncProducer(settings=settings) as producer:
            pairs = producer.map(source, most_items=10)
            most = max(source.n_read - n_taken for n_taken, _ in enumerate(itertools.islice(pairs, 100)))
            pairs.close()
            return most

    assert await asyncio.to_thread(run) == 10


async def test_what_is_no_source_leaves_nothing(settings: Settings, stub: Any) -> None:
    async def mappers() -> list[str]:
        return [str(task.get_coro()) for task in asyncio.all_tasks() if "Mapper" in str(task.get_coro())]

    def run() -> list[str]:
        with SyncProducer(settings=settings) as producer:
            for source in (5, numbers(3)):
                with pytest.raises(TypeError, match="not iterable"):
                    next(producer.map(source))  # type: ignore[call-overload] # what is tested
            assert producer._running is not None
            return producer._running.thread.call(mappers())

    assert await asyncio.to_thread(run) == []


async def test_a_source_that_swallows_its_cancellation_is_left_all_the_same(producer: Producer, stub: Any) -> None:
    left = asyncio.Event()

    async def source() -> AsyncGenerator[int, None]:
        try:
            yield 0
            for number in range(1, 1000):
                with contextlib.suppress(asyncio.CancelledError):  # as clients of databases do at times
                    await asyncio.sleep(3600 if number < 3 else 0)
                yield number
        finally:
            left.set()

    pairs = producer.map(source(), text=ids)
    await anext(pairs)
    async with asyncio.timeout(20):
        await pairs.aclose()
        await left.wait()


INTERRUPTED = """
import os, signal, sys, threading
from embedstream.producer import SyncProducer
from embedstream.shared.settings import Settings

with SyncProducer(settings=Settings(redis_url=sys.argv[1], key_prefix=sys.argv[2])) as producer:
    waits = (producer.map([[1]]), producer.stream([[1]]), producer.deliveries("indexer"))
    for begun in waits:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            next(iter(begun))
        except KeyboardInterrupt:
            begun.close()
            print("interrupted", flush=True)
"""


async def test_whoever_waits_can_be_interrupted(settings: Settings, prefix: str, stub: Any) -> None:
    await stub.pause()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-c", INTERRUPTED, str(settings.redis_url), prefix),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(60):
        said, _ = await process.communicate()
    assert (process.returncode, said.decode().split()) == (0, ["interrupted"] * 3)


async def test_the_collector_may_close_a_map_in_the_midst_of_a_call(settings: Settings, stub: Any) -> None:
    def run() -> None:
        with SyncProducer(settings=settings) as producer:
            pairs = producer.map(Source())
            next(pairs)
            assert producer._running is not None
            with producer._running.thread._lock:  # it runs wherever this thread makes an object
                pairs.close()

    await asyncio.to_thread(run)
