"""Vectors that are no vectors: NaN or infinity among their components.

A consumer answers no float32 vector of that kind, so one that comes all the same is a failure. In a narrower number
format a component may have become too large for it on the way: that is the format's own word for it, and is counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedstream.shared import metrics
from embedstream.shared.errors import JobFailed
from embedstream.shared.options import VectorType

_SCANNED_COMPONENTS = 250_000  # at once: well under 1 ms

_ALL_SET: Mapping[VectorType, int] = {
    VectorType.FLOAT32: 0x7F800000,
    VectorType.FLOAT16: 0x7C00,
    VectorType.BFLOAT16: 0x7F80,
    VectorType.FP8_E4M3: 0x7F,  # it has no infinity, and one NaN
    VectorType.FP8_E5M2: 0x7C,
}
"""A component is NaN or infinite if these bits of it are all set."""


def not_finite(vectors: NDArray[Any], dtype: VectorType) -> NDArray[np.int64]:
    """The rows with NaN or infinity in them.

    Args:
        vectors: (vectors, dim) of `dtype`; few, for it is done at once.
        dtype: their number format.
    """
    bits = np.ascontiguousarray(vectors).view(np.dtype(f"u{dtype.numpy.itemsize}"))
    mask = bits.dtype.type(_ALL_SET[dtype])
    return np.flatnonzero(((bits & mask) == mask).any(axis=1))


async def failed_inputs(vectors: NDArray[Any], dtype: VectorType, tokens: NDArray[np.uint32] | None) -> list[int]:
    """Look through a whole result, and count what is too large for its number format.

    Args:
        vectors: (vectors, dim) of `dtype`.
        dtype: their number format.
        tokens: (inputs,) how many vectors each input has; None for one.

    Returns:
        The places of inputs whose vectors cannot be used.
    """
    step = max(1, _SCANNED_COMPONENTS // max(1, vectors.shape[1]))
    failed: set[int] = set()
    for first in range(0, len(vectors), step):
        failed |= set(failed_of(vectors[first : first + step], dtype, first, tokens))
        await asyncio.sleep(0)
    return sorted(failed)


def failed_of(block: NDArray[Any], dtype: VectorType, first: int, tokens: NDArray[np.uint32] | None) -> list[int]:
    """As `failed_inputs`, for some of the vectors.

    Args:
        block: (vectors, dim) of `dtype`, those from the place `first` on.
        dtype: their number format.
        first: place of the first one among all.
        tokens: (inputs,) how many vectors each input has; None for one.
    """
    rows = not_finite(block, dtype) + first
    if not len(rows):
        return []
    if dtype is not VectorType.FLOAT32:
        metrics.CAST_OVERFLOWS.labels(dtype).inc(len(rows))
        return []
    if tokens is not None:
        rows = np.unique(np.searchsorted(np.cumsum(tokens, dtype=np.int64), rows, side="right"))
    return [int(index) for index in rows]


def failure(index: int) -> JobFailed:
    """What is told of an input whose vectors cannot be used."""
    return JobFailed(f"A vector of the input at index {index} holds NaN or infinity.")
