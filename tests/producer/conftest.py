"""A consumer without a model: it answers jobs with vectors that are a function of the token ids."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from redis.asyncio import Redis
from redis.exceptions import RedisError

from embedstream.consumer.heartbeat import Heartbeat
from embedstream.shared import jobs, results
from embedstream.shared.cards import Announcement, ModelCard
from embedstream.shared.connections import connect, connect_reader, create_group
from embedstream.shared.jobs import Job
from embedstream.shared.keys import GROUP, Keys
from embedstream.shared.lanes import LANES
from embedstream.shared.recipe import Pooling, Recipe
from embedstream.shared.results import ROW, ResultPart, Status
from embedstream.shared.tokenization import TextTokenizer

DIM = 4
RECIPE = Recipe(16, (Pooling.MEAN,), normalize=False, dimension=DIM, vocab_size=1000, matryoshka_dims=None)


def vector(ids: NDArray[Any], dim: int = DIM) -> NDArray[np.float32]:
    """What the stub answers for one input."""
    return (np.arange(1, dim + 1) * (1 + float(ids.sum() % 977))).astype(np.float32)


def answer(job: Job, fingerprint: bytes, tokenizer: TextTokenizer | None = None) -> ResultPart:
    """The stub's answer to a job."""
    lengths, ids = job.lengths, job.ids
    if job.texts is not None:
        assert tokenizer is not None
        tokens = tokenizer.encode(job.texts, add_special_tokens=job.add_special_tokens)
        lengths, ids = tokens.lengths, tokens.ids
    assert ids is not None
    rows = np.zeros(job.n_inputs, ROW)
    rows["tokens"] = lengths
    inputs = np.split(ids, np.cumsum(lengths)[:-1])
    if job.options.per_token:
        rows["vectors"] = lengths
        vectors = np.stack([vector(one[None]) for ids in inputs for one in ids])
    else:
        rows["vectors"] = 1
        vectors = np.stack([vector(ids, job.options.dimensions or DIM) for ids in inputs])
    dtype = job.options.dtype
    return ResultPart(
        job.request_id,
        fingerprint,
        job.index,
        job.count,
        0,
        1,
        job.first_input,
        rows,
        vectors.astype(dtype.numpy),
        dtype,
    )


class StubConsumer:
    """Answers what is on the lanes; `on_job` may change, drop or repeat what it would answer."""

    def __init__(self, redis: Redis, reader: Redis, keys: Keys, card: ModelCard) -> None:
        self.redis, self.reader, self.keys, self.card = redis, reader, keys, card
        self.tokenizer = TextTokenizer(card.tokenizer, card.recipe)
        self.on_job: Callable[[Job, list[ResultPart]], list[ResultPart] | None] = lambda _, parts: parts
        self.seen: list[Job] = []
        self.stopping = False
        self.going, self.idle = asyncio.Event(), asyncio.Event()
        self.going.set()

    async def pause(self) -> None:
        """Take no more from the lanes, once what was taken is answered."""
        self.going.clear()
        await self.idle.wait()

    def resume(self) -> None:
        """Take what is there."""
        self.idle.clear()
        self.going.set()

    async def run(self) -> None:
        while not self.stopping:
            if not self.going.is_set():
                self.idle.set()
                await self.going.wait()
            streams: dict[Any, Any] = {self.keys.lane(lane): ">" for lane in LANES}
            try:
                reply: Any = await self.reader.xreadgroup(GROUP, "stub", streams, 16, 200)
            except RedisError:
                await asyncio.sleep(0.05)
                continue
            for lane, entries in reply:
                for entry_id, fields in entries:
                    await self.serve(lane, entry_id, fields)

    async def serve(self, lane: bytes, entry_id: bytes, fields: dict[bytes, bytes]) -> None:
        job = jobs.decode(fields[b"h"], fields[b"b"])
        self.seen.append(job)
        if job.texts is None and job.fingerprint != self.card.fingerprint:
            stale = results.failed(
                job.request_id,
                self.card.fingerprint,
                job.index,
                job.count,
                job.first_input,
                job.n_inputs,
                Status.STALE_CARD,
                "another revision",
            )
            parts: list[ResultPart] | None = [stale]
        else:
            parts = self.on_job(job, [answer(job, self.card.fingerprint, self.tokenizer)])
        if parts is None:  # as if it had died with the job
            return
        async with self.redis.pipeline(transaction=True) as pipe:
            for part in parts:
                if fields[b"rt"]:
                    pipe.xadd(fields[b"rt"], {"p": results.frame([part.encode()])}, nomkstream=True)
                if job.result_ttl_s:
                    key = self.keys.result(job.request_id)
                    pipe.hset(key, f"{part.job}:{part.part}", part.encode())
                    pipe.expire(key, job.result_ttl_s)
            pipe.xack(lane, GROUP, entry_id)
            pipe.xdel(lane, entry_id)
            await pipe.execute()


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    client = connect(redis_url)
    yield client
    await client.aclose()


@pytest.fixture
def card(wordpiece_json: str) -> ModelCard:
    return ModelCard("m", RECIPE, wordpiece_json, "r")


Starter = Callable[..., Awaitable[StubConsumer]]


@asynccontextmanager
async def stub_consumers(url: str, keys: Keys) -> AsyncIterator[Callable[[ModelCard], Awaitable[StubConsumer]]]:
    """Gives a function that starts stub consumers, and stops them in the end."""
    redis = connect(url)
    tasks: list[tuple[asyncio.Task[None], StubConsumer]] = []
    beats: list[Heartbeat] = []

    async def start(card: ModelCard) -> StubConsumer:
        for lane in LANES:
            await create_group(redis, keys.lane(lane), GROUP)
        recipe = card.recipe
        said = Announcement(
            f"stub-{len(beats)}",
            card.model,
            (card.model, "alias"),
            card.fingerprint.hex(),
            recipe.dimension,
            recipe.max_length,
            recipe.pooling_name,
            "float32",
            "cpu",
            card.revision,
            1,
        )
        heartbeat = Heartbeat(url, keys, card, said, 100, 2000)
        await asyncio.to_thread(heartbeat.start)
        beats.append(heartbeat)
        stub = StubConsumer(redis, connect_reader(url), keys, card)
        tasks.append((asyncio.create_task(stub.run()), stub))
        return stub

    try:
        yield start
    finally:
        for task, stub in tasks:
            stub.stopping = True  # not by cancelling: redis-py may swallow that
            stub.resume()
            await asyncio.wait([task])
            await stub.reader.aclose()
        for heartbeat in beats:
            await asyncio.to_thread(heartbeat.stop)
        await redis.aclose()


@pytest.fixture(name="stub_consumers")
def _stub_consumers() -> Any:
    """`async with stub_consumers(url, keys) as start`."""
    return stub_consumers


@pytest.fixture
async def start_stub(redis_url: str, keys: Keys, card: ModelCard) -> AsyncIterator[Starter]:
    """Starts stub consumers: `await start_stub()`, or `await start_stub(another_card)`."""
    async with stub_consumers(redis_url, keys) as start:
        yield lambda serve=card: start(serve)


@pytest.fixture
def start_stub_on(keys: Keys, card: ModelCard) -> Callable[[str], AbstractAsyncContextManager[StubConsumer]]:
    """A stub consumer on another server: `async with start_stub_on(url)`."""

    @asynccontextmanager
    async def start_on(url: str) -> AsyncIterator[StubConsumer]:
        async with stub_consumers(url, keys) as start:
            yield await start(card)

    return start_on


@pytest.fixture
async def stub(start_stub: Starter) -> StubConsumer:
    """One stub consumer of the model `m`."""
    return await start_stub()
