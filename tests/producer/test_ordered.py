"""Answers in the order of the inputs, whatever order the jobs are done in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from redis.asyncio import Redis

from embedstream.producer import InputFailure, Options, Producer
from embedstream.producer.held import Held
from embedstream.producer.ordered import jobs_in_order
from embedstream.shared import results
from embedstream.shared.connections import connect
from embedstream.shared.errors import InputTooLong, InvalidInput, JobFailed, StaleCard
from embedstream.shared.jobs import Job, decode
from embedstream.shared.keys import GROUP
from embedstream.shared.lanes import LANES
from embedstream.shared.options import VectorType
from embedstream.shared.results import ROW, ResultPart, Status
from embedstream.shared.settings import Settings


async def test_slices_follow_one_another(settings: Settings, stub: Any) -> None:
    async with Producer(settings=settings) as producer:
        prepared = await producer.prepare([[index % 900 + 1] for index in range(300)], Options())
        whole = await producer.run(prepared)
        seen = 0
        async for piece in producer.in_order(prepared):
            assert piece.first == seen
            assert (piece.vectors == whole.vectors[seen : seen + len(piece.tokens)]).all()
            seen += len(piece.tokens)
        assert seen == 300


@pytest.mark.parametrize("error", [InvalidInput("a", param="input"), InputTooLong("b", param="x"), JobFailed("c")])
def test_a_failure_is_an_error(error: Exception) -> None:
    if isinstance(error, InvalidInput):
        failure = InputFailure.of(error)
        assert failure.error().param == error.param  # type: ignore[attr-defined] # an InvalidInput again
    else:
        failure = InputFailure(Status.FAILED, str(error))
    assert type(failure.error()) is type(error)
    assert str(failure.error()) == str(error)


ROWS = 64


async def test_an_early_job_lets_all_that_wait_go(settings: Settings, stub: Any) -> None:
    """The first job comes last: until then everything is held, and the gauge tells how much."""
    first_may_come = asyncio.Event()
    sent_early = 0

    def late(job: Job, parts: list[ResultPart]) -> list[ResultPart] | None:
        nonlocal sent_early
        if job.index == 0 and not first_may_come.is_set():
            return None  # it comes later, when the producer looks for what it lacks
        sent_early += 1
        return parts

    stub.on_job = late
    quick = settings.model_copy(update={"reconcile_after_s": 0.3})
    async with Producer(settings=quick) as producer:
        prepared = await producer.prepare([[index % 900 + 1] for index in range(4 * ROWS)], Options())
        slices = producer.in_order(prepared)
        waiting = asyncio.ensure_future(anext(slices))
        while held() < 3 * ROWS * 16:
            await asyncio.sleep(0.01)
        assert not waiting.done()
        first_may_come.set()
        redis = connect(str(settings.redis_url))
        await redeliver(redis, stub)
        pieces = [await waiting, *[piece async for piece in slices]]
        await redis.aclose()
        assert [piece.first for piece in pieces] == [0, ROWS, 2 * ROWS, 3 * ROWS]
        whole = await producer.run(prepared)
        assert (np.concatenate([piece.vectors for piece in pieces]) == whole.vectors).all()
    assert held() == 0


async def test_slices_come_while_later_jobs_are_computed(settings: Settings, stub: Any) -> None:
    """A slice waits for nothing but those before it."""
    asked_for = asyncio.Event()
    inner = stub.serve

    async def serve(lane: bytes, entry_id: bytes, fields: dict[bytes, bytes]) -> None:
        if decode(fields[b"h"], fields[b"b"]).index == 2:
            await asked_for.wait()
        await inner(lane, entry_id, fields)

    stub.serve = serve
    async with Producer(settings=settings) as producer:
        prepared = await producer.prepare([[1]] * (3 * ROWS), Options())
        seen = []
        async for piece in producer.in_order(prepared):
            seen.append(piece.first)
            if piece.first == ROWS:  # two of three are here, and the last cannot have come
                asked_for.set()
        assert seen == [0, ROWS, 2 * ROWS]


async def test_what_waits_for_its_reader_is_held(settings: Settings, stub: Any) -> None:
    async with Producer(settings=settings) as producer:
        prepared = await producer.prepare([[1]] * (4 * ROWS), Options())
        slices = producer.in_order(prepared)
        await anext(slices)
        while held() < 3 * ROWS * 16:
            await asyncio.sleep(0.01)
        await slices.aclose()
        assert held() == 0


async def test_a_reader_that_leaves_calls_the_rest_off(settings: Settings, stub: Any, redis: Any, keys: Any) -> None:
    stub.on_job = lambda job, parts: parts if job.index == 0 else None
    async with Producer(settings=settings) as producer:
        prepared = await producer.prepare([[1]] * (2 * ROWS), Options())
        slices = producer.in_order(prepared)
        assert (await anext(slices)).first == 0
        await slices.aclose()
        while not await redis.xlen(keys.notices):
            await asyncio.sleep(0.01)


async def test_a_failure_after_the_first_slice_is_raised(settings: Settings, stub: Any) -> None:
    stub.on_job = failing_from(1)
    async with Producer(settings=settings) as producer:
        prepared = await producer.prepare([[1]] * (3 * ROWS), Options())
        slices = producer.in_order(prepared)
        with pytest.raises(JobFailed, match="no luck"):
            [piece async for piece in slices]


async def test_failed_inputs_stand_in_their_slices(settings: Settings, stub: Any) -> None:
    stub.on_job = failing_from(1)
    async with Producer(settings=settings) as producer:
        prepared = await producer.prepare([[1]] * (2 * ROWS + 5), Options(partial=True))
        pieces = [piece async for piece in producer.in_order(prepared)]
        assert [sorted(piece.failures) for piece in pieces] == [
            [],
            list(range(ROWS, 2 * ROWS)),
            list(range(2 * ROWS, 2 * ROWS + 5)),
        ]
        assert {failure.message for piece in pieces for failure in piece.failures.values()} == {"no luck"}
        assert [piece.vectors.shape for piece in pieces] == [(ROWS, 4), (ROWS, 4), (5, 4)]


@pytest.mark.parametrize("texts", [True, False])
async def test_a_model_replaced_before_the_first_slice(
    settings: Settings, start_stub: Any, card: Any, texts: bool
) -> None:
    old = await start_stub()
    async with Producer(settings=settings) as producer:
        prepared = await producer.prepare(["a b", "c"] if texts else [[1], [2]], Options())
        old.card = replace(
            card, revision="r2", fingerprint=b""
        )  # answers `stale_card` to what was made for the old one
        await start_stub(old.card)
        slices = producer.in_order(prepared)
        if texts:
            assert [piece.first async for piece in slices] == [0]
        else:
            with pytest.raises(StaleCard):
                [piece async for piece in slices]


async def test_two_revisions_are_never_mixed(settings: Settings, stub: Any) -> None:
    stub.on_job = lambda job, parts: [replace(part, fingerprint=bytes([job.index]) * 16) for part in parts]
    async with Producer(settings=settings) as producer:
        prepared = await producer.prepare(["a"] * (2 * ROWS), Options())
        with pytest.raises(StaleCard, match="Two revisions"):
            [piece async for piece in producer.in_order(prepared)]


@given(order=st.permutations(range(6)), parts=st.lists(st.integers(1, 3), min_size=6, max_size=6))
def test_jobs_in_any_order_give_parts_in_one(order: list[int], parts: list[int]) -> None:
    def part(job: int, number: int) -> ResultPart:
        rows = np.zeros(1, ROW)
        vectors = np.zeros((1, 2), np.float32)
        return ResultPart(b"", b"", job, 6, number, parts[job], 0, rows, vectors, VectorType.FLOAT32)

    async def coming() -> AsyncGenerator[ResultPart, None]:
        for job in order:
            for number in range(parts[job]):
                yield part(job, number)

    async def gather() -> list[tuple[int, int]]:
        with Held() as held:
            return [(part.job, part.part) async for part in jobs_in_order(coming(), held)]

    assert asyncio.run(gather()) == [(job, number) for job in range(6) for number in range(parts[job])]
    assert held() == 0


def held() -> float:
    return REGISTRY.get_sample_value("embedstream_held_result_bytes") or 0.0


def failing_from(first: int) -> Any:
    """The stub fails all rows of later jobs, for a reason of theirs."""

    def fail(job: Job, parts: list[ResultPart]) -> list[ResultPart]:
        if job.index < first:
            return parts
        (part,) = parts
        status = Status.FAILED
        return [
            results.failed(
                part.request_id, part.fingerprint, part.job, part.n_jobs, part.first_row, part.n_rows, status, "no luck"
            )
        ]

    return fail


async def redeliver(redis: Redis, stub: Any) -> None:
    """The stub looks once more into what it had dropped."""
    for lane in LANES:
        pending: Any = await redis.xpending_range(stub.keys.lane(lane), GROUP, "-", "+", 100)
        for entry in pending:
            found: Any = await redis.xrange(stub.keys.lane(lane), entry["message_id"], entry["message_id"])
            ((entry_id, fields),) = found
            await stub.serve(stub.keys.lane(lane), entry_id, fields)
