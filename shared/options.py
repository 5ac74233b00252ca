"""What a caller may ask of its vectors; applied after the forward pass, per group of equal options."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import ml_dtypes
import numpy as np


class VectorType(StrEnum):
    """Number format of result vectors."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FP8_E4M3 = "fp8_e4m3"
    FP8_E5M2 = "fp8_e5m2"

    @property
    def numpy(self) -> np.dtype:
        """The little-endian numpy dtype (bfloat16 and fp8 from ml-dtypes)."""
        return _NUMPY[self]


_NUMPY: dict[VectorType, np.dtype] = {
    VectorType.FLOAT32: np.dtype("<f4"),
    VectorType.FLOAT16: np.dtype("<f2"),
    VectorType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    VectorType.FP8_E4M3: np.dtype(ml_dtypes.float8_e4m3fn),
    VectorType.FP8_E5M2: np.dtype(ml_dtypes.float8_e5m2),
}

VECTOR_TYPES: tuple[VectorType, ...] = tuple(VectorType)
"""A type's place here is its code on the wire."""


@dataclass(frozen=True, slots=True)
class VectorOptions:
    """How pooled vectors become result vectors. Rows with equal options share one pass over the batch.

    Args:
        dimensions: keep this many leading components, then normalise; None keeps all.
        normalize: scale to unit length; None does what the model's recipe says.
        dtype: number format of the result.
        per_token: one vector for each token instead of one for each input.
    """

    dimensions: int | None = None
    normalize: bool | None = None
    dtype: VectorType = VectorType.FLOAT32
    per_token: bool = False
