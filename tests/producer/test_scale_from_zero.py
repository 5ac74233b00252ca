"""Requests that are sent while no consumer is alive, and wait for the first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from redis.asyncio import Redis

from embedstream.producer import Lane, Options, Producer
from embedstream.producer.prepare import MAX_TEXT_BYTES
from embedstream.producer.request import cut_into_jobs
from embedstream.shared.cards import ModelCard
from embedstream.shared.connections import connect
from embedstream.shared.errors import InputTooLong, InvalidInput, Overloaded, ResultTimeout, Unavailable
from embedstream.shared.jobs import LongInputs
from embedstream.shared.keys import FIELD_CANCELLED, Keys
from embedstream.shared.options import VectorOptions
from embedstream.shared.settings import Settings
from embedstream.shared.tokenization import TextTokenizer

pytestmark = pytest.mark.integration

Starter = Callable[..., Awaitable[Any]]


@pytest.fixture
def patient(settings: Settings) -> Settings:
    return settings.model_copy(update={"scale_from_zero_s": 30.0})


@pytest.fixture
async def producer(patient: Settings) -> AsyncIterator[Producer]:
    async with Producer(settings=patient, model="m") as producer:
        yield producer


def expected(card: ModelCard, texts: list[str]) -> Any:
    tokens = TextTokenizer(card.tokenizer, card.recipe).encode(texts)
    return [ids.sum() % 977 + 1 for ids in np.split(tokens.ids, tokens.offsets[1:-1])]


async def queued(redis: Redis, keys: Keys, count: int) -> None:
    async with asyncio.timeout(20):
        while await redis.xlen(keys.lane(Lane.INTERACTIVE)) < count:
            await asyncio.sleep(0.01)


async def test_texts_wait_for_the_first_consumer_there_ever_was(
    producer: Producer, redis: Redis, keys: Keys, start_stub: Starter, card: ModelCard
) -> None:
    texts = [f"text number {number % 10}" for number in range(130)]
    waiting = asyncio.create_task(producer.embed(texts, normalize=True, dtype="float16"))
    await queued(redis, keys, 3)
    stub = await start_stub()
    vectors = await waiting
    np.testing.assert_allclose(vectors[:, 0].astype(np.float64), expected(card, texts))
    assert vectors.dtype == np.float16
    assert [job.n_inputs for job in stub.seen] == [64, 64, 2]
    assert all(job.texts is not None and job.options.normalize for job in stub.seen)
    await producer.embed("a")  # known by now: token ids
    assert stub.seen[-1].ids is not None


async def test_a_known_model_is_waited_for_with_token_ids(
    patient: Settings, redis: Redis, redis_url: str, keys: Keys, card: ModelCard, stub_consumers: Any
) -> None:
    async with stub_consumers(redis_url, keys) as start:
        await start(card)
    async with Producer(settings=patient) as producer, stub_consumers(redis_url, keys) as start:
        waiting = asyncio.create_task(producer.embed([[5], [6]]))
        await queued(redis, keys, 1)
        await start(card)
        np.testing.assert_allclose((await waiting)[:, 0], [6, 7])


async def test_it_is_told_when_none_has_come(settings: Settings, redis: Redis, keys: Keys) -> None:
    async with Producer(settings=settings.model_copy(update={"scale_from_zero_s": 0.5}), model="m") as producer:
        with pytest.raises(Unavailable, match=r"within 0.5 s \(--scale-from-zero-s\)"):
            await producer.embed("a", timeout_s=60)
    entries: Any = await redis.xrange(keys.notices)
    lane: Any = await redis.xrange(keys.lane(Lane.INTERACTIVE))
    assert [fields[FIELD_CANCELLED] for _, fields in entries] == [fields[b"h"][4:20] for _, fields in lane]


async def test_a_consumer_that_was_there_is_given_until_the_deadline(
    settings: Settings, redis_url: str, keys: Keys, card: ModelCard, stub_consumers: Any
) -> None:
    settings = settings.model_copy(update={"scale_from_zero_s": 0.01})
    async with Producer(settings=settings) as producer:
        async with stub_consumers(redis_url, keys) as start:
            stub = await start(card)
            stub.on_job = lambda *_: None  # it dies with the job
            waiting = asyncio.create_task(producer.embed("a", timeout_s=3))
            async with asyncio.timeout(20):
                while not stub.seen:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.5)  # so long that its being there was noticed
        with pytest.raises(ResultTimeout):
            await waiting
        assert not producer.fleet.consumers


async def test_without_the_setting_it_is_refused_at_once(settings: Settings, redis: Redis, keys: Keys) -> None:
    async with Producer(settings=settings, model="m") as producer:
        with pytest.raises(Unavailable, match="No consumer has announced"):
            await producer.embed("a")
    assert not await redis.exists(keys.lane(Lane.INTERACTIVE))


async def test_the_policy_for_long_inputs_travels_along(producer: Producer, redis: Redis, keys: Keys) -> None:
    for given, policy, limit in (
        (None, LongInputs.ERROR, 0),
        (-1, LongInputs.TRUNCATE, 0),
        (7, LongInputs.TRUNCATE, 7),
    ):
        prepared = await producer.prepare(["a"], Options(truncate_prompt_tokens=given, add_special_tokens=False))
        (job,) = cut_into_jobs(prepared, bytes(16), 1000)
        assert (job.long_inputs, job.truncate_to, job.add_special_tokens) == (policy, limit, False)
        job.encode()


async def test_large_texts_fill_jobs_to_their_limit(producer: Producer) -> None:
    texts = ["é" * 60_000] * 5 + ["x" * MAX_TEXT_BYTES]
    jobs = cut_into_jobs(await producer.prepare(texts, Options()), bytes(16), 1000)
    assert [job.n_inputs for job in jobs] == [2, 2, 1, 1]
    assert [job.first_input for job in jobs] == [0, 2, 4, 5]
    for job in jobs:
        job.encode()


@pytest.mark.parametrize(
    ("inputs", "options", "kind"),
    [
        (["a", "x" * (MAX_TEXT_BYTES + 1)], Options(), InputTooLong),
        (["a", "b\ud800"], Options(), InvalidInput),
        ([], Options(), InvalidInput),
        (["a"], Options(truncate_prompt_tokens=0), InvalidInput),
        (["a"], Options(truncate_prompt_tokens=2**40), InvalidInput),
        (["a"], Options(VectorOptions(dimensions=0)), InvalidInput),
        (["a"], Options(VectorOptions(dimensions=2**40)), InvalidInput),
        ([[1]], Options(), Unavailable),
    ],
)
async def test_what_no_model_can_serve_is_refused(
    producer: Producer, inputs: Any, options: Options, kind: type[Exception]
) -> None:
    with pytest.raises(kind):
        await producer.prepare(inputs, options)


async def test_submitted_texts_wait_too(
    producer: Producer, redis: Redis, keys: Keys, start_stub: Starter, card: ModelCard
) -> None:
    name = await producer.submit(["the queue"])
    await queued(redis, keys, 1)
    with pytest.raises(ResultTimeout):
        await producer.result(name, timeout_s=0)
    await start_stub()
    np.testing.assert_allclose((await producer.result(name))[:, 0], expected(card, ["the queue"]))


async def test_several_models_must_still_be_named(
    patient: Settings, redis_url: str, prefix: str, card: ModelCard, stub_consumers: Any
) -> None:
    other = replace(card, model="n")
    async with (
        stub_consumers(redis_url, Keys(prefix, "m")) as start,
        stub_consumers(redis_url, Keys(prefix, "n")) as start_other,
    ):
        await start(card)
        await start_other(other)
        async with Producer(settings=patient) as producer:
            with pytest.raises(Unavailable, match="name one of them"):
                await producer.embed("a")
    client = connect(redis_url)
    assert not await client.exists(Keys(prefix, patient.served_names[0]).lane(Lane.INTERACTIVE))
    await client.aclose()


async def test_text_counts_against_the_limits_before_anything_is_known_of_the_model(
    patient: Settings, redis: Redis, keys: Keys
) -> None:
    settings = patient.model_copy(update={"max_undelivered_bytes": 3 * 1024 * 4})
    async with Producer(settings=settings, model="m") as producer:
        assert (await producer.prepare(["a" * 4001, "b" * 3], Options())).least_tokens == 1001
        waiting = asyncio.create_task(producer.embed(["a", "b"]))
        await queued(redis, keys, 1)
        with pytest.raises(Overloaded, match="8,192 bytes of results"):
            await producer.embed(["c", "d"])
        waiting.cancel()
        await asyncio.wait([waiting])
