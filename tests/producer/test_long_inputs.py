"""Inputs longer than the model reads: refused, cut at either end, or embedded in pieces."""

from __future__ import annotations

from inspect import signature
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedstream.producer import LongInputs, Options, Producer, RequestOptions, SyncProducer, VectorType
from embedstream.producer.arguments import options_of
from embedstream.producer.prepare import MAX_WHOLE_CHARS
from embedstream.shared.errors import InputTooLong, InvalidInput, JobFailed
from embedstream.shared.jobs import MAX_INPUTS, MAX_TOKENS, Job
from embedstream.shared.options import VectorOptions
from embedstream.shared.recipe import Pooling, Recipe
from embedstream.shared.results import ResultPart, Status
from embedstream.shared.settings import LongInputsName, Settings

DIM, LIMIT = 4, 16
LONG = [list(range(1, 41)), [5], list(range(100, 116)), list(range(7, 24))]
"""Of 3, 1, 1 and 2 pieces."""


def vector(ids: list[int]) -> NDArray[np.float32]:
    """What the stub answers for one row."""
    return (np.arange(1, DIM + 1) * (1 + float(sum(ids) % 977))).astype(np.float32)


def in_pieces(ids: list[int], normalize: bool = False) -> NDArray[np.float32]:
    """The mean of the stub's vectors of an input's pieces, weighted by their lengths."""
    pieces = [ids[start : start + LIMIT] for start in range(0, len(ids), LIMIT)]
    total = np.sum([vector(piece).astype(np.float64) * len(piece) for piece in pieces], axis=0) / len(ids)
    if normalize and len(pieces) > 1:
        total = total / np.linalg.norm(total)
    return np.asarray(total, np.float32)


async def test_the_mean_of_the_pieces(settings: Settings, stub: Any) -> None:
    async with Producer(settings=settings) as producer:
        vectors = await producer.embed(LONG, long_inputs="chunk")
        np.testing.assert_allclose(vectors, [in_pieces(ids) for ids in LONG], rtol=1e-6)
        lengths = [size for job in stub.seen for size in job.lengths.tolist()]
        assert sorted(lengths) == sorted([16, 16, 8, 1, 16, 16, 1])
        plain = await producer.embed(LONG[1:3])
        assert vectors[1:3].tobytes() == plain.tobytes()
        scaled = await producer.embed(LONG, long_inputs="chunk", normalize=True)
        np.testing.assert_allclose(scaled, [in_pieces(ids, normalize=True) for ids in LONG], rtol=1e-6)


async def test_usage_is_that_of_the_uncut_input(settings: Settings, stub: Any) -> None:
    async with Producer(settings=settings) as producer:
        prepared = await producer.prepare(LONG, Options(long_inputs=LongInputs.CHUNK))
        assert (prepared.n_inputs, prepared.n_tokens, prepared.plan.n_rows) == (4, 74, 7)
        result = await producer.run(prepared)
        assert result.tokens.tolist() == [40, 1, 16, 17]
        assert result.truncated == 0


async def test_pieces_travel_in_float32_and_are_cast_in_the_end(settings: Settings, stub: Any) -> None:
    async with Producer(settings=settings) as producer:
        vectors = await producer.embed(LONG, long_inputs="chunk", dtype="float16")
        assert {job.options.dtype for job in stub.seen} == {VectorType.FLOAT32}
        assert vectors.dtype == np.float16
        whole = await producer.embed(LONG, long_inputs="chunk")
        assert vectors.tobytes() == whole.astype(np.float16).tobytes()
        stub.seen.clear()
        alone = await producer.embed(LONG[1:3], long_inputs="chunk", dtype="float16")
        assert {job.options.dtype for job in stub.seen} == {VectorType.FLOAT16}  # nothing to be joined
        assert alone.tobytes() == vectors[1:3].tobytes()


async def test_a_text_has_its_special_tokens_at_the_outer_ends(settings: Settings, stub: Any) -> None:
    text = "abcdefghij" * 4
    async with Producer(settings=settings) as producer:
        (made,) = await producer.embed(text, long_inputs="chunk")
        tokens = stub.tokenizer.encode([text])
        assert len(tokens.ids) == 42
        np.testing.assert_allclose(made, in_pieces(tokens.ids.tolist()), rtol=1e-6)
        (by_ids,) = await producer.embed([tokens.ids], long_inputs="chunk")
        assert made.tobytes() == by_ids.tobytes()


async def test_an_input_of_more_pieces_than_a_job_holds(settings: Settings, stub: Any) -> None:
    ids = [index % 900 + 1 for index in range(LIMIT * (2 * MAX_INPUTS + 3) + 5)]
    inputs = [[3], ids, [4]]
    async with Producer(settings=settings) as producer:
        expected = [in_pieces(ids) for ids in inputs]
        np.testing.assert_allclose(await producer.embed(inputs, long_inputs="chunk"), expected, rtol=1e-5)
        assert len(stub.seen) > 2
        prepared = await producer.prepare(inputs, Options(long_inputs=LongInputs.CHUNK))
        slices = [piece async for piece in producer.in_order(prepared)]
        assert [piece.first for piece in slices] == [0, 1]
        np.testing.assert_allclose(np.concatenate([piece.vectors for piece in slices]), expected, rtol=1e-5)
        streamed = [piece async for piece in producer.stream(inputs, long_inputs="chunk")]
        np.testing.assert_allclose(np.concatenate([piece.vectors for piece in streamed]), expected, rtol=1e-5)


async def test_token_vectors_of_all_pieces(settings: Settings, stub: Any) -> None:
    async with Producer(settings=settings) as producer:
        matrices = await producer.embed_tokens(LONG, long_inputs="chunk", dtype="float16")
        assert {job.options.dtype for job in stub.seen} == {VectorType.FLOAT16}
        for ids, matrix in zip(LONG, matrices, strict=True):
            assert (matrix == np.array([vector([one]) for one in ids], np.float16)).all()


@pytest.mark.parametrize("per_token", [False, True])
async def test_another_process_picks_the_result_up(settings: Settings, stub: Any, per_token: bool) -> None:
    async with Producer(settings=settings) as producer:
        name = await producer.submit(LONG, long_inputs="chunk", dtype="float16", normalize=True, per_token=per_token)
        whole = await producer.embed(LONG, long_inputs="chunk", dtype="float16", normalize=True)
    async with Producer(settings=settings) as other:
        if per_token:
            assert [len(matrix) for matrix in await other.result_tokens(name)] == [40, 1, 16, 17]
            with pytest.raises(InvalidInput, match="result_tokens"):
                await other.result(name)
        else:
            assert (await other.result(name)).tobytes() == whole.tobytes()
            assert (await other.result(name)).dtype == np.float16


async def test_an_id_stands_for_one_way_of_cutting(settings: Settings, stub: Any) -> None:
    name = "ab" * 16
    async with Producer(settings=settings) as producer:
        for _ in range(2):  # the same once more does no harm
            await producer.submit([LONG[0], [1]], long_inputs="chunk", request_id=name)
        for other in ([[1], LONG[0]], [[1], [2]]):
            with pytest.raises(InvalidInput, match="cut into other pieces"):
                await producer.submit(other, long_inputs="chunk", request_id=name)


async def test_a_result_is_not_read_in_pieces_that_were_submitted_later(settings: Settings, stub: Any) -> None:
    async with Producer(settings=settings) as producer:
        name = await producer.submit([[1], [2]])
        with pytest.raises(InvalidInput, match="cut into other pieces"):
            await producer.submit([[1], LONG[0]], long_inputs="chunk", request_id=name)
        assert (await producer.result(name)).tolist() == [vector([1]).tolist(), vector([2]).tolist()]


async def test_a_piece_that_fails_fails_the_request(settings: Settings, stub: Any) -> None:
    stub.on_job = failing(1, Status.FAILED)
    async with Producer(settings=settings) as producer:
        with pytest.raises(JobFailed, match="broken"):
            await producer.embed(LONG, long_inputs="chunk")


async def test_a_piece_that_fails_leaves_the_other_inputs(settings: Settings, stub: Any) -> None:
    stub.on_job = failing(1, Status.FAILED)
    async with Producer(settings=settings) as producer:
        options = Options(long_inputs=LongInputs.CHUNK, partial=True)
        result = await producer.run(await producer.prepare(LONG, options))
        assert list(result.failures) == [0]
        assert isinstance(result.failures[0].error(), JobFailed)
        assert result.tokens.tolist() == [0, 1, 16, 17]
        assert not result.vectors[0].any()
        np.testing.assert_allclose(result.vectors[1:], [in_pieces(ids) for ids in LONG[1:]], rtol=1e-6)


def failing(row: int, status: Status) -> Any:
    """The stub fails one row of each job."""

    def spoil(_: Job, parts: list[ResultPart]) -> list[ResultPart]:
        (part,) = parts
        rows = part.rows.copy()
        rows["status"][row], rows["vectors"][row], rows["message"][row] = status, 0, 1
        kept = np.delete(part.vectors, row, axis=0)
        return [type(part)(**{**fields(part), "rows": rows, "vectors": kept, "messages": ("broken",)})]

    return spoil


def fields(part: ResultPart) -> dict[str, Any]:
    return {name: getattr(part, name) for name in ResultPart.__slots__}


async def test_the_setting_is_the_default(settings: Settings, stub: Any) -> None:
    long = [list(range(1, 21))]
    for policy in LongInputsName:
        chosen = settings.model_copy(update={"long_inputs": policy})
        async with Producer(settings=chosen) as producer:
            with pytest.raises(InputTooLong):
                await producer.embed(long, long_inputs="error")
            if policy is LongInputsName.ERROR:
                with pytest.raises(InputTooLong, match="maximum context length is 16 tokens"):
                    await producer.embed(long)
                continue
            (made,) = await producer.embed(long)
            expected = in_pieces(long[0]) if policy is LongInputsName.CHUNK else vector(long[0][:16])
            np.testing.assert_allclose(made, expected, rtol=1e-6)
    with pytest.raises(InvalidInput, match="choose from error, truncate, chunk"):
        async with Producer(settings=settings) as producer:
            await producer.embed(long, long_inputs="cut")


async def test_a_number_cuts_whatever_the_policy_says(settings: Settings, stub: Any) -> None:
    async with Producer(settings=settings) as producer:
        ids = list(range(1, 41))
        for number, kept in ((-1, 16), (16, 16), (3, 3)):
            (made,) = await producer.embed([ids], truncate_prompt_tokens=number, long_inputs="chunk")
            assert (made == vector(ids[:kept])).all()
        with pytest.raises(InvalidInput, match="greater than max_model_len"):
            await producer.embed([ids], truncate_prompt_tokens=17, long_inputs="chunk")


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 16])
async def test_either_end_can_be_cut(settings: Settings, stub: Any, limit: int) -> None:
    text = "the queue abcdefghijkl"
    ids = stub.tokenizer.encode([text]).ids.tolist()
    async with Producer(settings=settings) as producer:
        for inputs in ([text], [ids]):
            cut: Any = {"truncate_prompt_tokens": limit}
            (right,) = await producer.embed(inputs, truncation_side="right", **cut)
            (left,) = await producer.embed(inputs, truncation_side="left", **cut)
            assert (right == vector(ids[:limit])).all()
            assert (left == vector(ids[-limit:])).all()
        if limit < 3:
            with pytest.raises(InvalidInput, match="must be -1 or at least 3"):
                await producer.embed(text, truncate_prompt_tokens=limit)
        else:
            (model,) = await producer.embed(text, truncate_prompt_tokens=limit)
            assert (model == vector([*ids[: limit - 1], ids[-1]])).all()
        with pytest.raises(InvalidInput, match="choose from left, right"):
            await producer.embed(text, truncation_side="middle")


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("inputs", ["a b", [[1, 2]]])
async def test_nothing_is_left_of_an_input_cut_to_nothing(
    settings: Settings, stub: Any, side: str | None, inputs: Any
) -> None:
    async with Producer(settings=settings) as producer:
        with pytest.raises(InvalidInput, match="at least") as caught:
            await producer.embed(inputs, truncate_prompt_tokens=0, truncation_side=side)
        assert caught.value.param == "truncate_prompt_tokens"


async def test_a_text_beyond_all_bounds_is_not_tokenised(settings: Settings, stub: Any) -> None:
    async with Producer(settings=settings) as producer:
        with pytest.raises(InputTooLong, match=f"at most {MAX_WHOLE_CHARS} are taken"):
            await producer.embed("a" * (MAX_WHOLE_CHARS + 1), long_inputs="chunk")
        with pytest.raises(InputTooLong, match=f"at most {MAX_WHOLE_CHARS} are taken"):
            await producer.embed("a" * (MAX_WHOLE_CHARS + 1), truncate_prompt_tokens=-1)
        text = "a " * 20_000  # far more than the bound of texts that are not to be cut
        prepared = await producer.prepare([text], Options(long_inputs=LongInputs.CHUNK))
        assert prepared.n_tokens == 20_002


def test_what_may_be_asked_of_a_request_is_what_options_are_made_of() -> None:
    taken = signature(options_of).parameters
    assert set(RequestOptions.__annotations__) < set(taken)
    assert {"truncation_side", "long_inputs"} <= set(RequestOptions.__annotations__)


def test_the_blocking_producer_takes_the_same_options(settings: Settings) -> None:
    with SyncProducer(settings=settings) as producer, pytest.raises(InvalidInput, match="choose from"):
        producer.embed("a", long_inputs="no such policy")


def test_every_job_keeps_the_limits_of_the_format() -> None:
    from embedstream.producer.request import Prepared, cut_into_jobs
    from embedstream.shared.cards import ModelCard
    from embedstream.shared.tokenization import Tokens

    recipe = Recipe(8192, (Pooling.MEAN,), normalize=True, dimension=DIM, vocab_size=100_000)
    card = ModelCard("m", recipe, "{}", "r")
    lengths = np.array([100_000, 3, 8192, 8193, 50_000], np.uint32)
    tokens = Tokens(np.zeros(int(lengths.sum()), np.uint32), lengths)
    options = Options(VectorOptions(dtype=VectorType.FLOAT16), long_inputs=LongInputs.CHUNK)
    prepared = Prepared(card, [[0]] * 5, tokens, options, piece_tokens=8192)
    jobs = cut_into_jobs(prepared, b"r" * 16, 1000)
    assert sum(job.n_tokens for job in jobs) == lengths.sum()
    assert [job.first_input for job in jobs] == np.cumsum([0, *(job.n_inputs for job in jobs)])[:-1].tolist()
    for job in jobs:
        assert job.lengths.max() <= 8192
        assert job.n_inputs == 1 or job.n_tokens <= MAX_TOKENS
        job.encode()
