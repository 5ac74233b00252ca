"""Inputs that fail alone leave the others their vectors, wherever they fail."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedstream.producer import LongInputs, Options, Prepared, Producer, StaleCard
from embedstream.producer.fleet import ServedModel
from embedstream.producer.prepare import MAX_TEXT_BYTES, MAX_WHOLE_CHARS, prepare, prepare_texts
from embedstream.producer.request import cut_into_jobs
from embedstream.shared import results
from embedstream.shared.cards import ModelCard
from embedstream.shared.errors import InputTooLong, InvalidInput, JobFailed, NotServed
from embedstream.shared.jobs import Job
from embedstream.shared.keys import Keys
from embedstream.shared.options import VectorOptions
from embedstream.shared.recipe import Pooling, Recipe
from embedstream.shared.results import ResultPart, Status
from embedstream.shared.settings import Settings
from embedstream.shared.tokenization import TextTokenizer

PARTIAL = Options(partial=True)
GOOD = "the queue"
LONG_TEXT, LONG_WORDS, SURROGATE = "a" * 10_000, "a b c d e f g h i j k l m n o p q", "x\ud800"


async def test_texts_that_cannot_be_served(settings: Settings, stub: Any) -> None:
    texts = [GOOD, LONG_TEXT, LONG_WORDS, SURROGATE, "", GOOD]
    async with Producer(settings=settings) as producer:
        with pytest.raises(InvalidInput):
            await producer.prepare(texts, Options())
        prepared = await producer.prepare(texts, PARTIAL)
        assert list(prepared.failures) == [1, 3, 2]
        assert [type(prepared.failures[index].error()) for index in (1, 2, 3)] == [
            InputTooLong,
            InputTooLong,
            InvalidInput,
        ]
        for index, words in ((1, "10000 characters"), (2, "has 19 tokens"), (3, r"U+D800")):
            assert words in prepared.failures[index].message
            assert f"index {index}" in prepared.failures[index].message
        assert [prepared.failures[index].param for index in (1, 2, 3)] == ["input_text", "input_tokens", "input"]
        result = await producer.run(prepared)
        good = await producer.embed([GOOD, "", GOOD])
        assert result.vectors[[0, 4, 5]].tobytes() == good.tobytes()
        assert not result.vectors[1:4].any()
        assert result.tokens.tolist() == prepared.tokens.lengths.tolist()
        assert result.tokens[1:4].tolist() == [0, 0, 0]
        assert prepared.n_tokens == result.tokens.sum()
        assert sum(job.n_inputs for job in stub.seen) == 6
        assert result.failures == prepared.failures


async def test_ids_that_cannot_be_served(settings: Settings, stub: Any) -> None:
    rows: Any = [[5], [1000], list(range(1, 18)), [], [-1, 3], [[1]], [7, 8], [2**40]]
    async with Producer(settings=settings) as producer:
        with pytest.raises(InvalidInput):
            await producer.prepare(rows, Options())
        prepared = await producer.prepare(rows, PARTIAL)
        expected = {
            1: "Token id 1000",
            2: "17 tokens",
            3: "empty",
            4: "Token id -1",
            5: "nested",
            7: "Token id 1099511627776",
        }
        assert set(prepared.failures) == set(expected)
        for index, words in expected.items():
            assert words in prepared.failures[index].message
            assert f"index {index}" in prepared.failures[index].message
        result = await producer.run(prepared)
        assert result.vectors[[0, 6]].tobytes() == (await producer.embed([[5], [7, 8]])).tobytes()
        assert result.tokens.tolist() == [1, 0, 0, 0, 0, 0, 2, 0]


TEXTS = [GOOD, "the", "", LONG_TEXT, LONG_WORDS, SURROGATE]
ROWS = [[5], [1000], list(range(1, 18)), list(range(1, 17)), [], [-1, 3], [7, 8]]


@given(data=st.data(), texts=st.booleans(), policy=st.sampled_from(LongInputs))
def test_an_input_is_refused_beside_others_as_it_is_alone(
    wordpiece_json: str, data: st.DataObject, texts: bool, policy: LongInputs
) -> None:
    recipe = Recipe(16, (Pooling.MEAN,), normalize=False, dimension=4, vocab_size=1000)
    card = ModelCard("m", recipe, wordpiece_json, "r")
    served = ServedModel(Keys("t", "m"), ("m",), card, TextTokenizer(wordpiece_json, recipe))
    choices: list[Any] = [*TEXTS] if texts else [*ROWS]
    inputs = data.draw(st.lists(st.sampled_from(choices), min_size=1, max_size=6))

    def prepared(some: Any, *, partial: bool) -> Prepared:
        return asyncio.run(prepare(some, Options(long_inputs=policy, partial=partial), served))

    together = prepared(inputs, partial=True)
    bounds = together.tokens.offsets
    for index, item in enumerate(inputs):
        ids = together.tokens.ids[bounds[index] : bounds[index + 1]].tolist()
        if index not in together.failures:
            assert ids == prepared([item], partial=False).tokens.ids.tolist()
            continue
        failure = together.failures[index]
        with pytest.raises(InvalidInput) as alone:
            prepared([item], partial=False)
        assert failure.message == str(alone.value).replace("index 0", f"index {index}")
        assert (type(failure.error()), failure.param, ids) == (type(alone.value), alone.value.param, [])


async def test_a_text_without_tokens(settings: Settings, stub: Any) -> None:
    async with Producer(settings=settings) as producer:
        with pytest.raises(InvalidInput, match="cannot be empty: the input at index 1"):
            await producer.embed(["a", ""], add_special_tokens=False)
        prepared = await producer.prepare(["a", ""], Options(add_special_tokens=False, partial=True))
        assert list(prepared.failures) == [1]


async def test_nothing_is_sent_when_all_inputs_fail(settings: Settings, stub: Any) -> None:
    async with Producer(settings=settings) as producer:
        prepared = await producer.prepare([[], [5000]], PARTIAL)
        result = await producer.run(prepared)
        assert (result.vectors.shape, result.tokens.tolist(), sorted(result.failures)) == ((2, 4), [0, 0], [0, 1])
        (piece,) = [piece async for piece in producer.in_order(prepared)]
        assert (piece.first, sorted(piece.failures)) == (0, [0, 1])
        assert list(producer._sessions._sessions) == []  # it had no need of the queue


async def test_what_is_about_the_whole_request_still_ends_it(settings: Settings, stub: Any) -> None:
    async with Producer(settings=settings) as producer:
        for options in (
            Options(VectorOptions(dimensions=9), partial=True),
            Options(truncate_prompt_tokens=17, partial=True),
            Options(truncate_prompt_tokens=2, partial=True),
        ):
            with pytest.raises(InvalidInput):
                await producer.prepare([GOOD], options)
        mixed: Any = [GOOD, [1]]
        for inputs in (mixed, mixed[:0]):
            with pytest.raises(InvalidInput):
                await producer.prepare(inputs, PARTIAL)
        for status, kind in ((Status.NOT_SERVED, NotServed), (Status.STALE_CARD, StaleCard)):
            stub.on_job = lambda job, _, status=status: [refused(job, status)]
            with pytest.raises(kind):
                await producer.run(await producer.prepare([[1]], PARTIAL))


@pytest.mark.parametrize("status", [Status.FAILED, Status.INVALID_INPUT, Status.INPUT_TOO_LONG])
async def test_rows_that_fail_at_the_consumer(settings: Settings, stub: Any, status: Status) -> None:
    stub.on_job = lambda job, parts: parts if job.index == 0 else [refused(job, status)]
    async with Producer(settings=settings) as producer:
        inputs = [[index + 1] for index in range(70)]
        prepared = await producer.prepare(inputs, PARTIAL)
        result = await producer.run(prepared)
        assert sorted(result.failures) == list(range(64, 70))
        assert {failure.status for failure in result.failures.values()} == {status}
        assert not result.vectors[64:].any()
        assert result.vectors[:64].all()
        with pytest.raises((JobFailed, InvalidInput), match="no luck"):
            await producer.run(await producer.prepare(inputs, Options()))


@pytest.mark.parametrize("announced", [True, False])
async def test_all_rows_of_the_first_job_fail(settings: Settings, stub: Any, announced: bool) -> None:
    """Nobody has told the size of a vector when its slice is made, unless the card did."""
    stub.on_job = lambda job, parts: (
        parts if job.index else [replace(refused(job, Status.FAILED), fingerprint=stub.card.fingerprint)]
    )
    async with Producer(settings=settings) as producer:
        inputs = ["a"] * 70
        prepared = await (producer.prepare(inputs, PARTIAL) if announced else prepare_texts(inputs, PARTIAL, "m"))
        result = await producer.run(prepared)
        assert (result.vectors.shape, sorted(result.failures)) == ((70, 4), list(range(64)))
        assert result.vectors[64:].all()


async def test_token_vectors_of_what_is_left(settings: Settings, stub: Any) -> None:
    async with Producer(settings=settings) as producer:
        options = Options(VectorOptions(per_token=True), partial=True)
        result = await producer.run(await producer.prepare([[1, 2], [], [3]], options))
        assert (result.tokens.tolist(), len(result.vectors)) == ([2, 0, 1], 3)


async def test_pieces_and_refusals_side_by_side(settings: Settings, stub: Any) -> None:
    async with Producer(settings=settings) as producer:
        options = Options(long_inputs=LongInputs.CHUNK, partial=True)
        texts = ["a" * (MAX_WHOLE_CHARS + 1), LONG_WORDS, SURROGATE, GOOD]
        result = await producer.run(await producer.prepare(texts, options))
        assert sorted(result.failures) == [0, 2]
        expected = await producer.embed([LONG_WORDS, GOOD], long_inputs="chunk")
        assert result.vectors[[1, 3]].tobytes() == expected.tobytes()


async def test_texts_for_a_model_nobody_has_announced() -> None:
    texts = [GOOD, SURROGATE, "a" * (MAX_TEXT_BYTES + 1), ""]
    with pytest.raises(InvalidInput, match="index 1"):
        await prepare_texts(texts, Options(), "m")
    prepared = await prepare_texts(texts, PARTIAL, "m")
    assert sorted(prepared.failures) == [1, 2]
    assert prepared.plan.counts.tolist() == [1, 0, 0, 1]
    assert prepared.tokens.lengths.tolist() == [len(GOOD), 0, 0, 0]
    assert texts_sent(prepared) == [GOOD, ""]


def texts_sent(prepared: Prepared) -> list[str]:
    return [text for job in cut_into_jobs(prepared, bytes(16), 1000) for text in job.texts or ()]


def refused(job: Job, status: Status) -> ResultPart:
    return results.failed(
        job.request_id, job.fingerprint, job.index, job.count, job.first_input, job.n_inputs, status, "no luck"
    )
