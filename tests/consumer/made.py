"""What the consumer's tests are made of: entries, and a consumer whose device is a function of the ids."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from redis.asyncio import Redis

from embedstream.consumer.batching import MicroBatch, Waiting
from embedstream.consumer.budget import Budget
from embedstream.consumer.cost import CostModel
from embedstream.consumer.entries import Entry, RawEntry
from embedstream.consumer.heartbeat import Heartbeat
from embedstream.consumer.outcome import Embedded, Embeds, RowVectors
from embedstream.consumer.pace import Pace
from embedstream.consumer.watchdog import State, Watchdog
from embedstream.consumer.worker import Clients, Limits, Worker
from embedstream.shared import results
from embedstream.shared.cards import Announcement, ModelCard
from embedstream.shared.connections import connect, connect_reader
from embedstream.shared.jobs import Job
from embedstream.shared.keys import GROUP, Keys
from embedstream.shared.lanes import Lane
from embedstream.shared.recipe import Pooling, Recipe
from embedstream.shared.tokenization import TextTokenizer, Tokens

RECIPE = Recipe(max_length=64, pooling=(Pooling.MEAN,), normalize=False, dimension=3, vocab_size=1000)


def entry(
    lengths: list[int], lane: Lane = Lane.INTERACTIVE, number: int = 0, adapter: str = "", **of_job: Any
) -> Entry:
    """An entry whose ids tell where they come from: number of the entry, of the row, of the token."""
    columns = np.array(lengths, np.uint32)
    ids = np.concatenate(
        [np.arange(size, dtype=np.uint32) + number * 1_000_000 + row * 1000 for row, size in enumerate(lengths)]
    )
    job = Job(of_job.pop("request_id", bytes(16)), 0, 1, 0, of_job.pop("ttl_ms", 60_000), columns, ids=ids, **of_job)
    raw = RawEntry(lane, f"{number + 1}-0".encode(), {})
    return Entry(raw, job, "", Tokens(ids, columns), np.zeros(len(lengths), np.bool_), adapter=adapter)


def batch_of(*entries: Entry, costs: CostModel = CostModel()) -> MicroBatch:  # noqa: B008 - frozen
    """All rows of some entries in one batch, longest first."""
    waiting = Waiting({}, costs)
    waiting.add(entries)
    return waiting.take(np.argsort(waiting.lengths, kind="stable")[::-1])


def contents(batch: MicroBatch) -> list[tuple[Entry, int, list[int]]]:
    """For each row of a batch: its entry, its place there, its ids."""
    ends = np.cumsum(batch.lengths)
    return [
        (batch.entries[batch.owner[place]], int(batch.row[place]), batch.ids[end - batch.lengths[place] : end].tolist())
        for place, end in enumerate(ends)
    ]


def vectors(inputs: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    """(inputs, 3) what `Device` makes of some inputs."""
    return np.array([[sum(ids), len(ids), ids[0]] for ids in inputs], np.float32)


class Device:
    """Embeds as `vectors` says; a test may put something before it that fails, waits or ends it."""

    def __init__(self, before: Callable[[MicroBatch], None] = lambda _: None) -> None:
        self.before = before
        self.batches: list[list[list[int]]] = []

    @property
    def inputs(self) -> list[list[int]]:
        """All inputs that have reached it, in order."""
        return [ids for batch in self.batches for ids in batch]

    def free(self) -> None:
        """There is no device, and nothing to free."""

    def embed(self, batch: MicroBatch) -> Embedded:
        """Vectors for every row of the batch."""
        inputs = [ids for _, _, ids in contents(batch)]
        self.batches.append(inputs)
        self.before(batch)
        group = RowVectors(np.arange(batch.n_rows), vectors(inputs), None, np.ones(batch.n_rows, np.bool_))
        return Embedded([group], 0.001)


def card(tokenizer: str) -> ModelCard:
    """Of a model `m` with a vocabulary of 1000 and 3 components."""
    return ModelCard("m", RECIPE, tokenizer, "r")


@asynccontextmanager
async def consumer(
    url: str,
    keys: Keys,
    tokenizer: str,
    device: Embeds,
    name: str = "c",
    *,
    model: ModelCard | None = None,
    budget: int = 512,
    watchdog_s: float = 10,
    **limits: Any,
) -> AsyncIterator[Worker]:
    """A running consumer, drained in the end; what `run` raises comes out of the context. Without a card: of `card`."""
    model = model or card(tokenizer)
    said = Announcement(name, "m", ("m",), model.fingerprint.hex(), 3, 64, "mean", "float32", "toy", "r", 1)
    clients = Clients(connect(url), connect_reader(url), connect_reader(url))
    watchdog, pace = Watchdog(watchdog_s), Pace(budget)
    pace.observe(budget, budget, 0.001)  # else the first batch may take as long as it likes
    loop = asyncio.get_running_loop()
    worker: Worker

    def moved(state: State) -> None:
        if state is not State.LOST:  # there a process of its own ends
            loop.call_soon_threadsafe(worker.watchdog_says, state)

    heartbeat = Heartbeat(
        url,
        keys,
        model,
        said,
        interval_ms=50,
        ttl_ms=800,
        watchdog=watchdog,
        tokens_per_s=pace.tokens_per_s,
        moved=moved,
    )
    reading = TextTokenizer(tokenizer, model.recipe)
    limits_ = Limits(**{"drain_timeout_s": 20, "lease_check_s": 0.05, **limits})
    worker = Worker(model, reading, device, clients, keys, name, heartbeat, watchdog, pace, Budget(budget), limits_)
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


def job_of(tokenizer: str, inputs: Sequence[Sequence[int]], number: int = 0, **changes: Any) -> Job:
    """A job of token ids for the model of `card`."""
    lengths = np.array([len(ids) for ids in inputs], np.uint32)
    ids = np.concatenate([np.array(ids, np.uint16) for ids in inputs])
    given: dict[str, Any] = {"ttl_ms": 60_000, "fingerprint": card(tokenizer).fingerprint, **changes}
    return Job(number.to_bytes(16, "little"), 0, 1, 0, lengths=lengths, ids=ids, **given)


async def send(redis: Redis, keys: Keys, job: Job, lane: Lane = Lane.INTERACTIVE) -> bytes:
    """Put a job on a lane, to be answered on the stream `me`. Returns its id."""
    header, body = job.encode()
    sent: Any = await redis.xadd(keys.lane(lane), {"h": header, "b": body, "rt": keys.reply("me")})
    assert isinstance(sent, bytes)
    return sent


async def read_as(redis: Redis, keys: Keys, name: str, lane: Lane = Lane.INTERACTIVE, count: int = 1000) -> list[bytes]:
    """Read entries as a consumer that then does nothing with them. Returns their ids."""
    reply: Any = await redis.xreadgroup(GROUP, name, {keys.lane(lane): ">"}, count)
    return [entry_id for _, entries in reply for entry_id, _ in entries]


async def pending(redis: Redis, keys: Keys, lane: Lane = Lane.INTERACTIVE) -> dict[bytes, tuple[str, int]]:
    """Entry id -> (owner, delivery count)."""
    found: Any = await redis.xpending_range(keys.lane(lane), GROUP, "-", "+", 10_000)
    return {item["message_id"]: (item["consumer"].decode(), item["times_delivered"]) for item in found}


async def parts(redis: Redis, keys: Keys) -> list[results.ResultPart]:
    """All answers that have come on the stream `me`."""
    entries: Any = await redis.xrange(keys.reply("me"))
    return [results.decode(part) for _, fields in entries for part in results.unframe(fields[b"p"])]


async def answers(redis: Redis, keys: Keys, count: int) -> dict[int, results.ResultPart]:
    """Wait for the answers to so many different jobs: number of the job -> its first answer."""
    async with asyncio.timeout(30):
        while True:
            found: dict[int, results.ResultPart] = {}
            for part in await parts(redis, keys):
                found.setdefault(int.from_bytes(part.request_id, "little"), part)
            if len(found) >= count:
                return found
            await asyncio.sleep(0.01)


async def until(condition: Callable[[], Awaitable[Any]]) -> None:
    """Wait for something to become true."""
    async with asyncio.timeout(30):
        while not await condition():
            await asyncio.sleep(0.01)
