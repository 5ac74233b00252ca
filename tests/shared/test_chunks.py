"""Long inputs in pieces: how they are cut, and what becomes of the pieces' vectors."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from embedstream.consumer import embedder
from embedstream.shared.chunks import join, mean, piece_counts, piece_lengths, travelling
from embedstream.shared.options import VectorOptions, VectorType
from embedstream.shared.results import ROW, ROW_TRUNCATED, Status

PLAIN = VectorOptions()


def rows_of(lengths: NDArray[Any], vectors: Any = 1) -> NDArray[np.void]:
    rows = np.zeros(len(lengths), ROW)
    rows["tokens"], rows["vectors"] = lengths, vectors
    return rows


@given(st.lists(st.integers(0, 60), max_size=20), st.integers(1, 20))
def test_pieces_are_consecutive_and_full(lengths: list[int], most: int) -> None:
    column = np.array(lengths, np.uint32)
    expected = [[min(most, size - start) for start in range(0, size, most)] for size in lengths]
    counts = piece_counts(column, most)
    assert counts.tolist() == [len(pieces) for pieces in expected]
    assert piece_lengths(column, counts, most).tolist() == [size for pieces in expected for size in pieces]


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=8),
    st.integers(1, 6),
    st.booleans(),
    st.sampled_from(VectorType),
    st.integers(0, 2**32 - 1),
)
def test_a_mean_weighs_by_length(counts: list[int], dim: int, normalize: bool, dtype: VectorType, seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 300, sum(counts)).astype(np.uint32)
    vectors = random.normal(size=(sum(counts), dim)).astype(np.float32)
    rows, column = rows_of(lengths), np.array(counts, np.uint32)
    joined, made = join(rows, vectors, column, PLAIN, normalize=normalize, not_finite=1)
    start = 0
    for index, count in enumerate(counts):
        some, weights = vectors[start : start + count], lengths[start : start + count].astype(np.float64)
        expected = (some * weights[:, None]).sum(0) / weights.sum()
        if count == 1:
            expected = some[0]  # as the model gave it, whatever its length
        elif normalize:
            expected /= np.linalg.norm(expected)
        np.testing.assert_allclose(made[index], expected, rtol=1e-4, atol=1e-5)
        assert joined["tokens"][index] == weights.sum()
        start += count
    assert (joined["status"] == Status.OK).all()
    assert (joined["vectors"] == 1).all()
    _, cast = join(rows, vectors, column, VectorOptions(dtype=dtype), normalize=normalize, not_finite=1)
    assert cast.dtype == dtype.numpy
    assert cast.tobytes() == made.astype(dtype.numpy).tobytes()


def test_the_mean_in_float32_to_the_bit() -> None:
    vectors = np.array([[1, 2], [4, 8], [-1, 0.5]], np.float32)
    lengths = np.array([256, 256, 7], np.uint32)
    weights = np.array([256, 256, 7], np.float32)
    expected = (vectors[0] * weights[0] + vectors[1] * weights[1] + vectors[2] * weights[2]) / np.float32(519)
    assert mean(vectors, lengths, normalize=False).tobytes() == expected.tobytes()
    assert np.linalg.norm(mean(vectors, lengths, normalize=True)) == pytest.approx(1, abs=1e-6)
    assert mean(np.zeros((2, 2), np.float32), lengths[:2], normalize=True).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", VectorType)
def test_the_cast_is_the_consumers(dtype: VectorType) -> None:
    """What travels in float32, for other inputs of its request are in pieces, gets the bits it would have got."""
    random = np.random.default_rng(5)
    edges = np.array([0.0, 448, 464, 465, 480, -500, 57344, -65520, 7e4])
    scaled = [random.normal(size=4096) * scale for scale in (1e-6, 0.01, 1, 300, 1e5)]
    values = np.concatenate([edges, *scaled]).astype(np.float32)
    ones, options = np.ones(len(values), np.uint32), VectorOptions(dtype=dtype)
    _, ours = join(rows_of(ones), values[:, None], ones, options, normalize=True, not_finite=1)
    theirs = embedder._cast(torch.from_numpy(values), dtype).view(torch.uint8).numpy().view(dtype.numpy)
    is_nan = np.isnan(theirs.astype(np.float32))  # of which there are several, and all mean the same
    assert (np.isnan(ours[:, 0].astype(np.float32)) == is_nan).all()
    assert ours[~is_nan].tobytes() == theirs[~is_nan].tobytes()
    assert is_nan[:6].tolist() == [dtype is VectorType.FP8_E4M3 and abs(value) > 464 for value in edges[:6]]


def test_a_piece_that_fails_fails_its_input() -> None:
    rows = rows_of(np.array([4, 4, 2, 4, 1, 3]))
    rows["status"][1], rows["message"][1], rows["vectors"][1] = Status.FAILED, 7, 0
    rows["status"][2], rows["message"][2], rows["vectors"][2] = Status.INVALID_INPUT, 8, 0
    rows["flags"][5] = ROW_TRUNCATED
    vectors = np.array([[0, 1], [2, 3], [4, 10.5], [6, 7]], np.float32)
    counts = np.array([3, 0, 2, 1], np.uint32)
    joined, made = join(rows, vectors, counts, PLAIN, normalize=False, not_finite=9)
    assert joined["status"].tolist() == [Status.FAILED, Status.FAILED, Status.OK, Status.OK]
    assert joined["message"].tolist() == [7, 0, 0, 0]
    assert joined["vectors"].tolist() == [0, 0, 1, 1]
    assert joined["flags"].tolist() == [0, 0, 0, ROW_TRUNCATED]
    assert made.tolist() == [[pytest.approx(2.4), 4.5], [6, 7]]


def test_a_mean_that_is_not_finite_fails() -> None:
    huge = np.full((3, 2), 3e38, np.float32)
    joined, made = join(
        rows_of(np.array([9, 9, 9])), huge, np.array([2, 1], np.uint32), PLAIN, normalize=False, not_finite=5
    )
    assert joined["status"].tolist() == [Status.FAILED, Status.OK]
    assert joined["message"].tolist() == [5, 0]
    assert (made == huge[2:]).all()


def test_token_vectors_follow_one_another() -> None:
    options = VectorOptions(dtype=VectorType.FLOAT16, per_token=True)
    assert travelling(options) is options
    rows = rows_of(np.array([2, 1, 1, 3]), np.array([2, 1, 0, 3]))
    rows["status"][2] = Status.FAILED
    vectors = np.arange(12, dtype=np.float16).reshape(6, 2)
    joined, made = join(rows, vectors, np.array([2, 1, 1], np.uint32), options, normalize=True, not_finite=1)
    assert joined["vectors"].tolist() == [3, 0, 3]
    assert made.tobytes() == vectors.tobytes()
    joined, made = join(rows, vectors, np.array([1, 2, 1], np.uint32), options, normalize=True, not_finite=1)
    assert joined["vectors"].tolist() == [2, 0, 3]
    assert (made == vectors[[0, 1, 3, 4, 5]]).all()


def test_pieces_travel_in_float32() -> None:
    asked = VectorOptions(dimensions=2, normalize=True, dtype=VectorType.FP8_E4M3)
    assert travelling(asked) == VectorOptions(dimensions=2, normalize=True)


def test_the_mean_of_many_pieces_copies_none_of_them() -> None:
    vectors = np.full((20_000, 64), 0.5, np.float32)
    lengths = np.full(len(vectors), 512, np.uint32)
    tracemalloc.start()
    try:
        total = mean(vectors, lengths, normalize=False)
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (total == 0.5).all()
    assert most_bytes < vectors.nbytes / 4
