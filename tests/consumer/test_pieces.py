"""A job whose long inputs are to be embedded in pieces: it is cut, computed and joined at the consumer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedstream.consumer.entries import Entry, RawEntry
from embedstream.consumer.intake import Intake
from embedstream.shared.cards import ModelCard
from embedstream.shared.chunks import mean
from embedstream.shared.jobs import Job, LongInputs, text_lengths
from embedstream.shared.lanes import Lane
from embedstream.shared.options import VectorOptions, VectorType
from embedstream.shared.recipe import Pooling, Recipe
from embedstream.shared.results import ResultPart, Status, split
from embedstream.shared.tokenization import TextTokenizer

LIMIT = 8
RECIPE = Recipe(LIMIT, (Pooling.MEAN,), normalize=False, dimension=2, vocab_size=200)
REPLY = "t:{m}:r:me"
TEXTS = ("a b c d e f g h i j k l m n o p", "a", "a b c d e f g")
"""Of 18, 3 and 9 tokens."""


@pytest.fixture
def tokenizer(wordpiece_json: str) -> TextTokenizer:
    return TextTokenizer(wordpiece_json, RECIPE)


@pytest.fixture
def intake(wordpiece_json: str, tokenizer: TextTokenizer) -> Intake:
    return Intake(ModelCard("m", RECIPE, wordpiece_json, "r"), tokenizer, "t:{m}:r:")


@pytest.fixture
def job() -> Job:
    return Job(b"r" * 16, 0, 1, 5, 1000, text_lengths(TEXTS), texts=TEXTS, long_inputs=LongInputs.CHUNK)


async def taken(intake: Intake, job: Job) -> Entry:
    header, body = job.encode()
    raw = RawEntry(Lane.INTERACTIVE, b"5000-0", {b"h": header, b"b": body, b"rt": REPLY.encode()})
    entry = await intake.accept(raw, 5000)
    assert isinstance(entry, Entry)
    return entry


def vector(ids: NDArray[Any]) -> NDArray[np.float32]:
    return np.array([ids.sum(), ids[0]], np.float32)


def compute(entry: Entry) -> ResultPart:
    """What a device does for all rows that wait."""
    dtype = entry.job.options.dtype.numpy
    pieces = np.split(entry.tokens.ids, entry.tokens.offsets[1:-1])
    for row in entry.waiting_rows().tolist():
        if entry.job.options.per_token:
            matrix = np.stack([vector(pieces[row][place:]) for place in range(len(pieces[row]))])
            entry.store_tokens(row, matrix.astype(dtype))
        else:
            entry.store(np.array([row]), vector(pieces[row])[None].astype(dtype))
    assert entry.done
    return entry.result(b"f" * 16)


def expected(ids: NDArray[Any], normalize: bool = False) -> NDArray[np.float32]:
    pieces = [ids[start : start + LIMIT] for start in range(0, len(ids), LIMIT)]
    if len(pieces) == 1:
        return vector(ids)
    return mean(np.stack([vector(piece) for piece in pieces]), np.array([len(piece) for piece in pieces]), normalize)


@pytest.mark.parametrize("normalize", [None, True])
@pytest.mark.parametrize("dtype", [VectorType.FLOAT32, VectorType.FLOAT16])
async def test_the_answer_has_a_row_for_each_input(
    intake: Intake, tokenizer: TextTokenizer, job: Job, normalize: bool | None, dtype: VectorType
) -> None:
    entry = await taken(intake, replace(job, options=VectorOptions(normalize=normalize, dtype=dtype)))
    assert entry.tokens.lengths.tolist() == [8, 8, 2, 3, 8, 1]
    assert entry.job.options.dtype is VectorType.FLOAT32
    result = compute(entry)
    rows = [tokenizer.encode([text]).ids for text in TEXTS]
    assert result.rows["tokens"].tolist() == [18, 3, 9]
    assert result.rows["vectors"].tolist() == [1, 1, 1]
    assert result.timing.compute_tokens == 30
    assert (result.dtype, result.first_row) == (dtype, 5)
    means = np.stack([expected(ids, bool(normalize)) for ids in rows]).astype(dtype.numpy)
    assert result.vectors.tobytes() == means.tobytes()


async def test_ids_are_cut_like_texts(intake: Intake, tokenizer: TextTokenizer, job: Job, wordpiece_json: str) -> None:
    tokens = tokenizer.encode(TEXTS)
    fingerprint = ModelCard("m", RECIPE, wordpiece_json, "r").fingerprint
    by_ids = replace(job, texts=None, ids=tokens.ids.astype(np.uint16), lengths=tokens.lengths, fingerprint=fingerprint)
    one, other = compute(await taken(intake, job)), compute(await taken(intake, by_ids))
    assert one.vectors.tobytes() == other.vectors.tobytes()


async def test_short_inputs_keep_their_format(intake: Intake, job: Job) -> None:
    texts = ("a", "b c")
    short = replace(job, texts=texts, lengths=text_lengths(texts), options=VectorOptions(dtype=VectorType.FLOAT16))
    entry = await taken(intake, short)
    assert (entry.pieces, entry.job.options.dtype) == (None, VectorType.FLOAT16)


async def test_token_vectors_follow_one_another(intake: Intake, job: Job) -> None:
    result = compute(await taken(intake, replace(job, options=VectorOptions(per_token=True))))
    assert result.rows["vectors"].tolist() == [18, 3, 9]
    assert len(result.vectors) == 30
    assert [part.n_rows for part in split(result)] == [3]


async def test_an_input_fails_with_its_pieces_alone(intake: Intake, job: Job) -> None:
    entry = await taken(intake, job)
    entry.fail(np.array([1, 5]), Status.FAILED, "no luck")
    result = compute(entry)
    assert result.rows["status"].tolist() == [Status.FAILED, Status.OK, Status.FAILED]
    assert [result.message(row) for row in (0, 2)] == ["no luck", "no luck"]
    assert len(result.vectors) == 1
    assert entry.places().tolist() == [5, 5, 5, 6, 7, 7]


async def test_an_input_without_tokens_fails_beside_long_ones(intake: Intake, job: Job) -> None:
    texts = ("", TEXTS[0])
    entry = await taken(intake, replace(job, texts=texts, lengths=text_lengths(texts), add_special_tokens=False))
    result = compute(entry)
    assert result.rows["status"].tolist() == [Status.INVALID_INPUT, Status.OK]
    assert "cannot be empty" in result.message(0)
    assert result.rows["tokens"].tolist() == [0, 16]


async def test_a_mean_that_is_not_finite_is_told(intake: Intake, job: Job) -> None:
    entry = await taken(intake, job)
    entry.store(entry.waiting_rows(), np.full((6, 2), 3e38, np.float32))
    result = entry.result(b"f" * 16)
    assert result.rows["status"].tolist() == [Status.FAILED, Status.OK, Status.FAILED]
    assert "not finite" in result.message(0)
