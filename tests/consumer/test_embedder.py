from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from embedstream.consumer.embedder import _cast, _to_numpy
from embedstream.shared.options import VectorType

VALUES = [0.0, 1.0, -0.3, 1e-4, 447.0, 448.0, 464.0, 464.1, -464.0, -465.0, 500.0, 1e6, -1e6, 57344.0, 65504.0, 1e38]


@pytest.mark.parametrize("dtype", list(VectorType))
def test_a_cast_is_that_of_ml_dtypes(dtype: VectorType) -> None:
    """Callers cast the means of long inputs by numpy: an input must not show who cast it."""
    vectors = np.array([VALUES], np.float32)
    with np.errstate(over="ignore"):
        expected = vectors.astype(dtype.numpy).astype(np.float32)
    got = _to_numpy(_cast(torch.from_numpy(vectors), dtype), dtype)
    assert got.dtype == dtype.numpy
    np.testing.assert_array_equal(got.astype(np.float32), expected)


def test_what_is_too_large_for_e4m3_is_not_a_number() -> None:
    got = _to_numpy(_cast(torch.tensor([[465.0, -1e6, 448.0]]), VectorType.FP8_E4M3), VectorType.FP8_E4M3)
    assert got.dtype == ml_dtypes.float8_e4m3fn
    assert [math.isnan(float(value)) for value in got[0]] == [True, True, False]
