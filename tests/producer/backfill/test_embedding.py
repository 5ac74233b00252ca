"""Windows to vectors: what is computed, in which order, how often, and what becomes of texts that fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from embedstream.producer import Lane, Options, Producer
from embedstream.producer.backfill.embedding import REQUEST_TEXTS, Embedding
from embedstream.producer.backfill.progress import Progress
from embedstream.producer.backfill.tokenizing import Tokenizing
from embedstream.producer.credit import Credit
from embedstream.shared.cards import ModelCard
from embedstream.shared.errors import Overloaded, StaleCard, Unavailable
from embedstream.shared.jobs import Job
from embedstream.shared.lanes import LANES
from embedstream.shared.options import VectorOptions, VectorType
from embedstream.shared.recipe import Pooling, Recipe
from embedstream.shared.results import ResultPart, Status
from embedstream.shared.settings import Settings
from embedstream.shared.tokenization import TextTokenizer

pytestmark = pytest.mark.integration

RECIPE = Recipe(16, (Pooling.MEAN,), normalize=False, dimension=4, vocab_size=1000)
"""That of the stub's card."""
OPTIONS = Options(lane=Lane.BULK, partial=True)


@pytest.fixture
async def producer(settings: Settings) -> AsyncIterator[Producer]:
    async with Producer(settings=settings) as producer:
        yield producer


@pytest.fixture(scope="module")
def tokenizing(wordpiece_json: str) -> Iterator[Tokenizing]:
    pool = Tokenizing(ModelCard("m", RECIPE, wordpiece_json, "r"), OPTIONS, 1)
    yield pool
    pool.close()


Maker = Callable[..., Embedding]


@pytest.fixture
def make(producer: Producer, card: ModelCard, tokenizing: Tokenizing) -> Maker:
    def make(options: Options = OPTIONS, *, patience_s: float = 60.0, progress: Progress | None = None) -> Embedding:
        credit = Credit(2.0, 10_000)
        return Embedding(producer, card, options, tokenizing, credit, progress or Progress(), patience_s)

    return make


def texts_of(*texts: str) -> pa.ChunkedArray:
    return pa.chunked_array([list(texts)], pa.large_string())


def expected(card: ModelCard, texts: list[str]) -> Any:
    tokens = TextTokenizer(card.tokenizer, card.recipe).encode(texts)
    sums = [ids.sum() % 977 for ids in np.split(tokens.ids, tokens.offsets[1:-1])]
    return np.stack([np.arange(1, 5) * (1.0 + total) for total in sums]).astype(np.float32)


def rows_seen(stub: Any) -> int:
    return sum(job.n_inputs for job in stub.seen)


async def test_vectors_stand_as_the_texts_do(make: Maker, stub: Any, card: ModelCard) -> None:
    texts = ["the queue", "a", "c", "the queueing", "b a b", "a"]
    result = await make().embed(texts_of(*texts))
    np.testing.assert_array_equal(result.vectors, expected(card, texts))
    assert result.vectors.dtype == np.float32
    assert not result.failures
    assert {job.lane for job in stub.seen} == {Lane.BULK}


async def test_equal_texts_are_computed_once_in_a_window_and_after_it(make: Maker, stub: Any, card: ModelCard) -> None:
    progress = Progress()
    embedding = make(progress=progress)
    first = await embedding.embed(texts_of("a", "b", "a", "a"))
    assert (first.texts, rows_seen(stub)) == (2, 2)
    texts = ["b", "c", "a", "c"]
    second = await embedding.embed(texts_of(*texts))
    np.testing.assert_array_equal(second.vectors, expected(card, texts))
    assert (second.texts, rows_seen(stub)) == (1, 3)
    assert (progress.computed_rows, progress.computed_texts) == (8, 3)


async def test_windows_under_way_share_texts(make: Maker, stub: Any, card: ModelCard) -> None:
    await stub.pause()
    embedding = make()
    windows = [["a", "b"], ["b", "c"], ["c", "a", "b"]]
    tasks = [asyncio.create_task(embedding.embed(texts_of(*texts))) for texts in windows]
    await asyncio.sleep(0.1)
    stub.resume()
    for texts, result in zip(windows, await asyncio.gather(*tasks), strict=True):
        np.testing.assert_array_equal(result.vectors, expected(card, texts))
    assert rows_seen(stub) == 3


async def test_a_window_that_shares_texts_of_a_failed_one_fails_too(make: Maker, stub: Any) -> None:
    stub.card = replace(stub.card, revision="other", fingerprint=b"")
    embedding = make()
    first = asyncio.create_task(embedding.embed(texts_of("a", "b")))
    second = asyncio.create_task(embedding.embed(texts_of("a")))
    for task in (first, second):
        with pytest.raises(BaseException) as raised:
            await task
        assert raised.group_contains(StaleCard) or isinstance(raised.value, StaleCard)


async def test_short_rows_come_first_and_like_lengths_travel_together(make: Maker, stub: Any) -> None:
    texts = [" ".join("a" * (1 + number * 7 % 9)) + f" {number}" for number in range(300)]
    await make().embed(texts_of(*texts))
    lengths = np.concatenate([job.lengths for job in stub.seen])
    assert len(lengths) == 300
    assert (np.diff(lengths.astype(int)) >= 0).all()


async def test_a_window_of_many_requests(make: Maker, stub: Any, card: ModelCard) -> None:
    texts = [f"a {number}" for number in range(2 * REQUEST_TEXTS + 5)]
    result = await make().embed(texts_of(*texts))
    np.testing.assert_array_equal(result.vectors, expected(card, texts))
    assert len({job.request_id for job in stub.seen}) == 3


async def test_texts_that_fail_leave_the_others_their_vectors(make: Maker, stub: Any, card: ModelCard) -> None:
    def fail(job: Job, parts: list[ResultPart]) -> list[ResultPart]:
        (part,) = parts
        bad = part.rows["tokens"] == 5
        part.rows["status"][bad] = Status.FAILED
        part.rows["vectors"][bad] = 0
        return [replace(part, vectors=part.vectors[~bad])]

    stub.on_job = fail
    texts = ["a", "long " * 20, "x y z", "b", "long " * 20]
    result = await make().embed(texts_of(*texts))
    assert {place: why.status for place, why in result.failures.items()} == {
        1: Status.INPUT_TOO_LONG,
        2: Status.FAILED,
        4: Status.INPUT_TOO_LONG,
    }
    np.testing.assert_array_equal(result.vectors[[0, 3]], expected(card, ["a", "b"]))
    again = await make().embed(texts_of("b", *texts))
    assert set(again.failures) == {2, 3, 5}


async def test_failures_keep_their_places_over_slices(make: Maker, stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedstream.producer.backfill.embedding.SLICE_TEXTS", 2)
    result = await make().embed(texts_of("a", "b", "c", "long " * 20, "d"))
    assert list(result.failures) == [3]


async def test_failures_are_shared_like_vectors(make: Maker, stub: Any) -> None:
    embedding = make()
    await embedding.embed(texts_of("a", "long " * 20))
    result = await embedding.embed(texts_of("b", "long " * 20))
    assert list(result.failures) == [1]
    assert rows_seen(stub) == 2


async def test_only_failures(make: Maker, stub: Any) -> None:
    result = await make().embed(texts_of("long " * 20))
    assert list(result.failures) == [0]
    assert result.vectors.shape == (1, 4)
    assert rows_seen(stub) == 0


async def test_half_vectors(make: Maker, stub: Any, card: ModelCard) -> None:
    result = await make(replace(OPTIONS, vectors=VectorOptions(dtype=VectorType.FLOAT16))).embed(texts_of("a", "b"))
    assert result.vectors.dtype == np.float16
    np.testing.assert_array_equal(result.vectors, expected(card, ["a", "b"]).astype(np.float16))


async def test_a_full_queue_is_waited_for(
    make: Maker, stub: Any, card: ModelCard, producer: Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    run = producer.run

    async def refuse_twice(prepared: Any) -> Any:
        calls.append(prepared)
        if len(calls) < 3:
            raise Overloaded("full", retry_after_s=0.01)
        return await run(prepared)

    monkeypatch.setattr(producer, "run", refuse_twice)
    progress = Progress()
    result = await make(progress=progress).embed(texts_of("a"))
    np.testing.assert_array_equal(result.vectors, expected(card, ["a"]))
    assert (len(calls), progress.state) == (3, "")


async def test_patience_ends(make: Maker, stub: Any, producer: Producer, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress()

    async def nobody(prepared: Any) -> Any:
        raise Unavailable("nobody is there")

    monkeypatch.setattr(producer, "run", nobody)
    monkeypatch.setattr("embedstream.producer.backfill.embedding._PAUSE_S", 0.01)
    with pytest.raises(BaseException) as raised:
        await make(patience_s=0.05, progress=progress).embed(texts_of("a"))
    assert raised.group_contains(Unavailable)
    assert progress.state == "waiting: nobody is there"


async def test_no_more_than_the_credit_is_on_the_queue(make: Maker, stub: Any, producer: Producer) -> None:
    await stub.pause()
    embedding = make()
    embedding._credit = Credit(2.0, REQUEST_TEXTS)
    task = asyncio.create_task(embedding.embed(texts_of(*(f"a {number}" for number in range(12 * REQUEST_TEXTS)))))
    for _ in range(100):
        await asyncio.sleep(0.02)
        waiting = sum([await producer.redis.xlen(stub.keys.lane(lane)) for lane in LANES])
        if waiting:
            break
    await asyncio.sleep(0.2)
    waiting = sum([await producer.redis.xlen(stub.keys.lane(lane)) for lane in LANES])
    assert 0 < waiting <= REQUEST_TEXTS // 64 + 16  # jobs of 64 rows, and what the stub reads at once
    stub.resume()
    await task
    assert rows_seen(stub) == 12 * REQUEST_TEXTS
