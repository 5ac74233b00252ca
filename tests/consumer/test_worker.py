"""The whole consumer in this process, with a tiny random model, asked through a real producer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from redis.asyncio import Redis

from embedstream.consumer.batching import MicroBatch
from embedstream.consumer.budget import Budget
from embedstream.consumer.embedder import Embedder
from embedstream.consumer.heartbeat import Heartbeat
from embedstream.consumer.model import Model
from embedstream.consumer.outcome import Embedded
from embedstream.consumer.pace import Pace
from embedstream.consumer.row_queue import RowQueue
from embedstream.consumer.watchdog import Watchdog
from embedstream.consumer.worker import Clients, Limits, Worker
from embedstream.deploy.embedded import EmbeddedServer
from embedstream.producer import Lane, Producer, VectorType
from embedstream.shared import jobs, results
from embedstream.shared.cards import Announcement
from embedstream.shared.connections import connect, connect_reader
from embedstream.shared.errors import InvalidInput, JobFailed, NotServed, ResultTimeout, Unavailable
from embedstream.shared.jobs import Job, LongInputs
from embedstream.shared.keys import GROUP, Keys
from embedstream.shared.options import VectorOptions
from embedstream.shared.results import Status
from embedstream.shared.settings import PoolingName, Settings

from .fleet import waits

pytestmark = pytest.mark.integration


@pytest.fixture
def load(tiny_bert: Callable[..., Path], settings: Settings) -> Callable[..., Model]:
    """Loads a tiny BERT served as `m`."""

    def make(pooling: str = "mean", pooling_override: str | None = None, **changes: Any) -> Model:
        served: dict[str, Any] = {"pooling": pooling_override and PoolingName(pooling_override)}
        served |= {"model": str(tiny_bert(pooling)), "served_model_name": ("m",), "device": "cpu", "threads": 1}
        return Model.load(settings.model_copy(update={**served, "dtype": "float32", **changes}))

    return make


@asynccontextmanager
async def serving(
    model: Model,
    url: str,
    keys: Keys,
    name: str = "c",
    budget: int = 512,
    drain_timeout_s: float = 30,
    **changes: Any,
) -> AsyncIterator[Worker]:
    """A running worker, drained in the end."""
    said = Announcement(
        name, "m", ("m",), model.card.fingerprint.hex(), 32, model.recipe.max_length, "mean", "float32", "cpu", "r", 1
    )
    clients = Clients(connect(url), connect_reader(url), connect_reader(url))
    watchdog, pace = Watchdog(10), Pace(budget)
    heartbeat = Heartbeat(url, keys, model.card, said, 100, 2000, watchdog, pace.tokens_per_s)
    limits = Limits(drain_timeout_s, **changes)
    worker = Worker(
        *(model.card, model.tokenizer, Embedder(model), clients, keys, name, heartbeat, watchdog, pace),
        Budget(budget),
        limits,
    )
    task = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        worker.stop()
        try:
            await task
        finally:
            for client in (clients.lanes, clients.notices, clients.commands):
                await client.aclose()


@asynccontextmanager
async def asking(settings: Settings) -> AsyncIterator[Producer]:
    """A producer that has found the consumer."""
    async with Producer(settings=settings) as producer:
        await found(producer)
        yield producer


async def found(producer: Producer) -> None:
    async with asyncio.timeout(20):
        while producer.fleet.trouble is not None:
            await asyncio.sleep(0.02)


def alone(model: Model, ids: list[int], pooling: str = "mean") -> Any:
    """One sequence through the model by itself: its vector, not normalised."""
    with torch.inference_mode():
        hidden = model._module(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).last_hidden_state[0]
    return {"mean": hidden.mean(0), "cls": hidden[0], "lasttoken": hidden[-1]}[pooling].numpy()


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
async def test_vectors_are_those_of_single_runs(
    load: Callable[..., Model], settings: Settings, redis_url: str, keys: Keys, pooling: str
) -> None:
    model = load(pooling)
    random = np.random.default_rng(1)
    inputs = [random.integers(5, 40, random.integers(1, 48)).tolist() for _ in range(150)]
    async with serving(model, redis_url, keys), asking(settings) as producer:
        vectors = await producer.embed(inputs, normalize=False)
    expected = np.stack([alone(model, ids, pooling) for ids in inputs])
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


async def test_each_option_set_gets_its_own_answer_in_one_batch(
    load: Callable[..., Model], settings: Settings, redis_url: str, keys: Keys, redis: Redis
) -> None:
    model = load(matryoshka_dims="any")
    ids = [7, 8, 9, 10]
    sets = [
        (dimensions, normalize, dtype)
        for dimensions in (None, 8)
        for normalize in (True, False)
        for dtype in VectorType
    ]
    batches: list[MicroBatch] = []
    go = threading.Event()
    async with serving(model, redis_url, keys) as worker, asking(settings) as producer:
        embed = worker._embedder.embed

        def watched(batch: MicroBatch) -> Embedded:
            batches.append(batch)
            go.wait(20)
            return embed(batch)

        worker._embedder.embed = watched  # type: ignore[method-assign] # holds the first batch, and sees the next
        first = asyncio.create_task(producer.embed([ids]))
        while not batches:
            await asyncio.sleep(0.01)
        asked = [
            asyncio.create_task(producer.embed([ids], dimensions=size, normalize=unit, dtype=dtype))
            for size, unit, dtype in sets
        ]
        while not await waits(worker, len(sets) * len(ids)):
            await asyncio.sleep(0.01)
        go.set()
        answers = await asyncio.gather(*asked)
        await first
    for (size, unit, dtype), answer in zip(sets, answers, strict=True):
        expected = alone(model, ids)[:size]
        expected = expected / np.linalg.norm(expected) if unit else expected
        assert answer.dtype == dtype.numpy
        rounded = expected.astype(dtype.numpy).astype(np.float32)
        step = {1: 0.25, 2: 0.01, 4: 1e-5}[dtype.numpy.itemsize]  # float32 results differ in the last place
        np.testing.assert_allclose(answer[0].astype(np.float32), rounded, rtol=step, atol=1e-5)
    assert [len({entry.job.options for entry in batch.entries}) for batch in batches] == [1, len(sets)]


async def test_token_vectors_are_normalised_rows(
    load: Callable[..., Model], settings: Settings, redis_url: str, keys: Keys
) -> None:
    model = load()
    inputs = [[7, 8, 9], [10], [11, 12]]
    async with serving(model, redis_url, keys), asking(settings) as producer:
        matrices = await producer.embed_tokens(inputs)
        raw = await producer.embed_tokens(inputs, normalize=False)
    assert [matrix.shape for matrix in matrices] == [(3, 32), (1, 32), (2, 32)]
    for ids, matrix, plain in zip(inputs, matrices, raw, strict=True):
        with torch.inference_mode():
            hidden = model._module(torch.tensor([ids])).last_hidden_state[0].numpy()
        np.testing.assert_allclose(plain, hidden, atol=1e-5)
        np.testing.assert_allclose(matrix, hidden / np.linalg.norm(hidden, axis=1, keepdims=True), atol=1e-5)


async def test_pooling_all_serves_token_vectors_only(
    load: Callable[..., Model], settings: Settings, redis_url: str, keys: Keys
) -> None:
    model = load(pooling_override="all")
    async with serving(model, redis_url, keys), asking(settings) as producer:
        assert [matrix.shape for matrix in await producer.embed_tokens(["a b"])] == [(4, 32)]
        with pytest.raises(NotServed):
            await producer.embed(["a b"])


async def test_token_answers_above_a_mebibyte_arrive_whole(
    load: Callable[..., Model], settings: Settings, redis_url: str, keys: Keys
) -> None:
    model = load()
    inputs = [[5 + (number + place) % 30 for place in range(48)] for number in range(400)]
    async with serving(model, redis_url, keys), asking(settings) as producer:
        matrices = await producer.embed_tokens(inputs, dtype="float32")
        single = (await producer.embed_tokens([inputs[333]]))[0]
    assert {matrix.shape for matrix in matrices} == {(48, 32)}
    np.testing.assert_allclose(matrices[333], single, atol=1e-5)


async def test_two_consumers_share_the_work(
    load: Callable[..., Model], settings: Settings, redis_url: str, keys: Keys
) -> None:
    model = load()
    counts = {"one": 0, "two": 0}
    async with (
        serving(model, redis_url, keys, "one", budget=64) as one,
        serving(model, redis_url, keys, "two", budget=64) as two,
        asking(settings) as producer,
    ):
        for name, worker in (("one", one), ("two", two)):
            embed = worker._embedder.embed

            def counting(batch: MicroBatch, name: str = name, embed: Any = embed) -> Embedded:
                counts[name] += batch.n_rows
                return embed(batch)  # type: ignore[no-any-return] # the method it stands for

            worker._embedder.embed = counting  # type: ignore[method-assign] # to count
        answers = await asyncio.gather(*(producer.embed([[5 + n % 30] * (n % 40 + 1)]) for n in range(300)))
    assert len(answers) == 300
    assert sum(counts.values()) == 300
    assert min(counts.values()) > 30


async def test_an_idle_consumer_does_not_take_all(
    load: Callable[..., Model], settings: Settings, redis_url: str, keys: Keys, redis: Redis
) -> None:
    model = load()
    async with Producer(settings=settings) as producer, serving(model, redis_url, keys, "one", budget=256) as one:
        await found(producer)
        embed = one._embedder.embed
        go = threading.Event()

        def slow(batch: MicroBatch) -> Embedded:
            go.wait(20)
            return embed(batch)

        one._embedder.embed = slow  # type: ignore[method-assign] # a device that is busy
        for lane in Lane:
            go.clear()
            asked = asyncio.create_task(producer.embed([[5] * 40] * 64 * 8, lane=lane))
            await until(partial(in_hand, redis, keys, lane), 1)
            await asyncio.sleep(0.3)
            found_in_hand = await in_hand(redis, keys, lane)
            go.set()
            assert found_in_hand <= 2  # one on the device, one that waits
            assert len(await asked) == 64 * 8


async def test_a_redis_that_is_away_does_not_keep_it_from_stopping(load: Callable[..., Model], keys: Keys) -> None:
    model = load()
    with EmbeddedServer(Settings()) as server:
        settings = Settings(redis_url=server.url, key_prefix=keys.prefix)
        async with (
            Producer(settings=settings) as producer,
            serving(model, server.url, keys, drain_timeout_s=0.5) as worker,
        ):
            await found(producer)
            embed = worker._embedder.embed

            def cut_off(batch: MicroBatch) -> Embedded:
                server._process.kill()  # type: ignore[union-attr] # it is started
                return embed(batch)

            worker._embedder.embed = cut_off  # type: ignore[method-assign] # its answer finds nobody
            with pytest.raises((ResultTimeout, Unavailable)):
                await producer.embed("a", timeout_s=1)


async def test_a_burst_after_a_trickle_is_not_taken_whole(
    load: Callable[..., Model], settings: Settings, redis_url: str, keys: Keys, redis: Redis
) -> None:
    """Short queries say nothing of the size of what comes next."""
    model = load()
    async with Producer(settings=settings) as producer, serving(model, redis_url, keys, budget=256) as worker:
        await found(producer)
        for number in range(40):
            await producer.embed([[5 + number % 9]])
        embed = worker._embedder.embed
        go = threading.Event()

        def slow(batch: MicroBatch) -> Embedded:
            go.wait(20)
            return embed(batch)

        worker._embedder.embed = slow  # type: ignore[method-assign] # a device that is busy
        asked = asyncio.create_task(producer.embed([[5] * 40] * 64 * 40))
        await until(partial(in_hand, redis, keys), 1)
        await asyncio.sleep(0.3)
        taken = await in_hand(redis, keys)
        go.set()
        assert taken <= 8
        assert len(await asked) == 64 * 40


async def test_a_device_thread_that_dies_ends_the_worker(
    load: Callable[..., Model], settings: Settings, redis_url: str, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A consumer that answers nothing must not look alive."""
    monkeypatch.setattr(RowQueue, "take", lambda *_, **__: (_ for _ in ()).throw(MemoryError("no room")))

    async def serve_until_it_ends() -> None:
        async with serving(load(), redis_url, keys) as worker, asyncio.timeout(20):
            while not worker._heartbeat._stopping.is_set():
                await asyncio.sleep(0.01)

    with pytest.raises(MemoryError):
        await serve_until_it_ends()


async def test_it_stops_while_it_waits_for_redis(load: Callable[..., Model], keys: Keys) -> None:
    async with serving(load(), "unix:///nowhere/v.sock", keys) as worker:
        await asyncio.sleep(0.2)
        worker.stop()


async def test_a_vector_that_is_not_finite_fails_alone(
    load: Callable[..., Model], settings: Settings, redis_url: str, keys: Keys
) -> None:
    model = load()
    with torch.no_grad():
        embeddings: Any = model._module.get_submodule("embeddings.word_embeddings")
        embeddings.weight[9] = float("nan")
    async with serving(model, redis_url, keys), asking(settings) as producer:
        good = asyncio.create_task(producer.embed([[7, 8]]))
        with pytest.raises(JobFailed, match="not finite"):
            await producer.embed([[7, 9]])
        assert np.isfinite(await good).all()


async def test_a_failing_batch_is_answered(
    load: Callable[..., Model], settings: Settings, redis_url: str, keys: Keys
) -> None:
    model = load()
    async with serving(model, redis_url, keys) as worker, asking(settings) as producer:
        embed = worker._embedder.embed

        def broken(batch: MicroBatch) -> Embedded:
            worker._embedder.embed = embed  # type: ignore[method-assign] # once
            raise ValueError("a private text")

        worker._embedder.embed = broken  # type: ignore[method-assign] # once
        with pytest.raises(JobFailed, match=r"ValueError\.$"):
            await producer.embed(["a"])
        assert (await producer.embed(["a"])).shape == (1, 32)


async def test_what_is_begun_is_answered_before_it_stops_and_the_rest_given_back(
    load: Callable[..., Model], settings: Settings, redis_url: str, keys: Keys, redis: Redis
) -> None:
    model = load()
    async with Producer(settings=settings) as producer:
        async with serving(model, redis_url, keys, budget=64) as worker:
            await found(producer)
            asked = [asyncio.create_task(producer.embed([[5] * 40] * 20, timeout_s=30)) for _ in range(10)]
            await until(lambda: in_hand(redis, keys), 1)
            worker.stop()
        left: Any = await redis.xpending_range(keys.lane(Lane.INTERACTIVE), GROUP, "-", "+", 100)
        assert {item["times_delivered"] for item in left} <= {0}  # nobody holds a drain against them
        assert not await redis.exists(keys.heartbeat("c"))
        async with serving(model, redis_url, keys, "d"):
            assert [len(rows) for rows in await asyncio.gather(*asked)] == [20] * 10


async def until(count: Callable[[], Awaitable[int]], least: int) -> None:
    async with asyncio.timeout(20):
        while await count() < least:
            await asyncio.sleep(0.005)


async def in_hand(redis: Redis, keys: Keys, lane: Lane = Lane.INTERACTIVE) -> int:
    pending: Any = await redis.xpending(keys.lane(lane), GROUP)
    return int(pending["pending"])


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    client = connect(redis_url)
    yield client
    await client.aclose()


async def answer_to(redis: Redis, keys: Keys, job: Job, lane: Lane = Lane.INTERACTIVE) -> results.ResultPart:
    """Send a job as a producer without our library would, and read its answer."""
    stream = keys.reply("me")
    await redis.xadd(stream, {"p": ""})
    header, body = job.encode()
    await redis.xadd(keys.lane(lane), {"h": header, "b": body, "rt": stream})
    async with asyncio.timeout(20):
        while True:
            entries: Any = await redis.xrange(stream)
            parts = [results.decode(part) for _, fields in entries for part in results.unframe(fields[b"p"])]
            if parts:
                return parts[0]
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("lane", list(Lane))
async def test_text_jobs_are_tokenised_by_the_consumer(
    load: Callable[..., Model], settings: Settings, redis_url: str, keys: Keys, redis: Redis, lane: Lane
) -> None:
    model = load()
    texts = ("the queue", "a " * 100, "b")
    job = Job(b"q" * 16, 0, 1, 0, 60_000, jobs.text_lengths(texts), texts=texts, lane=lane, options=VectorOptions())
    async with serving(model, redis_url, keys), asking(settings) as producer:
        part = await answer_to(redis, keys, job, lane)
        expected = await producer.embed(["the queue", "b"])
    assert part.rows["status"].tolist() == [Status.OK, Status.INPUT_TOO_LONG, Status.OK]
    assert part.rows["tokens"][[0, 2]].tolist() == [4, 3]
    np.testing.assert_allclose(part.vectors, expected, atol=1e-6)
    assert part.fingerprint == model.card.fingerprint
    assert part.timing.inference_us > 0
    assert part.timing.compute_tokens == 7


async def test_long_text_jobs_are_cut_when_asked(
    load: Callable[..., Model], settings: Settings, redis_url: str, keys: Keys, redis: Redis
) -> None:
    model = load()
    texts = ("a " * 100,)
    job = Job(
        b"q" * 16,
        0,
        1,
        0,
        60_000,
        jobs.text_lengths(texts),
        texts=texts,
        long_inputs=LongInputs.TRUNCATE,
        truncate_to=10,
    )
    async with serving(model, redis_url, keys), asking(settings) as producer:
        part = await answer_to(redis, keys, job)
        expected = await producer.embed(list(texts), truncate_prompt_tokens=10)
    assert part.rows["flags"].tolist() == [results.ROW_TRUNCATED]
    np.testing.assert_allclose(part.vectors, expected, atol=1e-6)


async def test_bad_options_of_a_foreign_producer_are_answered(
    load: Callable[..., Model], settings: Settings, redis_url: str, keys: Keys, redis: Redis
) -> None:
    job = Job(b"q" * 16, 0, 1, 0, 60_000, jobs.text_lengths(("a",)), texts=("a",), options=VectorOptions(dimensions=3))
    async with serving(load(), redis_url, keys), asking(settings) as producer:
        part = await answer_to(redis, keys, job)
        assert part.rows["status"].tolist() == [Status.INVALID_INPUT]
        assert "Matryoshka" in part.message(0)
        with pytest.raises(InvalidInput):
            await producer.embed(["a"], dimensions=3)


async def test_expired_jobs_never_reach_the_device(
    load: Callable[..., Model], settings: Settings, redis_url: str, keys: Keys, redis: Redis
) -> None:
    job = Job(b"q" * 16, 0, 1, 0, 1, np.array([1], np.uint32), ids=np.array([7], np.uint16))
    model = load()
    header, body = replace(job, fingerprint=model.card.fingerprint).encode()
    stream = keys.reply("me")
    await redis.xadd(stream, {"p": ""})
    await redis.xadd(keys.lane(Lane.BULK), {"h": header, "b": body, "rt": stream})
    await asyncio.sleep(0.05)
    async with serving(model, redis_url, keys), asyncio.timeout(20):
        while await redis.xlen(stream) < 2:
            await asyncio.sleep(0.01)
    entries: Any = await redis.xrange(stream)
    part = results.decode(*results.unframe(entries[1][1][b"p"]))
    assert part.rows["status"].tolist() == [Status.EXPIRED]
