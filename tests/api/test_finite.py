from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from embedstream.api import finite
from embedstream.producer import VectorType
from embedstream.shared import metrics


@given(
    st.sampled_from(VectorType).flatmap(
        lambda kind: st.tuples(st.just(kind), hnp.arrays(np.dtype(f"<u{kind.numpy.itemsize}"), (5, 3)))
    )
)
def test_the_bits_tell_what_numpy_tells(drawn: tuple[VectorType, NDArray[np.generic]]) -> None:
    kind, words = drawn
    vectors = words.view(kind.numpy)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        expected = np.flatnonzero(~np.isfinite(vectors.astype(np.float64)).all(axis=1))
    np.testing.assert_array_equal(finite.not_finite(vectors, kind), expected)


@pytest.mark.parametrize("step", [1, 4, 1000])
async def test_which_inputs_have_no_vector(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "_SCANNED_COMPONENTS", step)
    vectors = np.ones((6, 2), np.float32)
    vectors[2, 1], vectors[3, 0], vectors[4, 0] = np.nan, np.inf, -np.inf
    assert await finite.failed_inputs(vectors, VectorType.FLOAT32, None) == [2, 3, 4]
    tokens = np.array([1, 3, 0, 2], np.uint32)  # rows 0, 1 to 3, none, 4 and 5
    assert await finite.failed_inputs(vectors, VectorType.FLOAT32, tokens) == [1, 3]


@pytest.mark.parametrize("kind", [VectorType.FLOAT16, VectorType.FP8_E4M3, VectorType.FP8_E5M2, VectorType.BFLOAT16])
async def test_what_is_too_large_for_its_format_is_counted(kind: VectorType) -> None:
    largest = float(np.finfo(np.float32).max)
    with np.errstate(over="ignore"):
        vectors = np.array([[1.0, 2.0], [largest, 1.0], [largest, largest]], np.float32).astype(kind.numpy)
    counter = metrics.CAST_OVERFLOWS.labels(kind)
    before = counter._value.get()
    assert await finite.failed_inputs(vectors, kind, None) == []
    assert counter._value.get() - before == 2
