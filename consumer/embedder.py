"""The embedder: micro-batch in, result vectors out, on the one thread that owns the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedstream.shared.options import VectorOptions, VectorType
from embedstream.shared.tokenization import offsets

from .batching import MicroBatch
from .model import Model
from .outcome import Embedded, RowVectors
from .pooling import all_tokens, cut_and_normalize, pool

_TORCH: dict[VectorType, torch.dtype] = {
    VectorType.FLOAT32: torch.float32,
    VectorType.FLOAT16: torch.float16,
    VectorType.BFLOAT16: torch.bfloat16,
    VectorType.FP8_E4M3: torch.float8_e4m3fn,
    VectorType.FP8_E5M2: torch.float8_e5m2,
}

_E4M3_ROUNDS_DOWN = 464.0
"""Halfway between the largest number, 448, and the next there would be; to the even one of the two that is 448."""


class Embedder:
    """Runs micro-batches. All calls come from one thread.

    Args:
        model: loaded and warm.
    """

    def __init__(self, model: Model) -> None:
        self._model = model

    def embed(self, batch: MicroBatch) -> Embedded:
        """Forward, pool in float32, then cut, normalise and cast once for each group of equal options."""
        started_s = time.perf_counter()
        with torch.inference_mode():
            hidden, mask = self._model.forward(batch.ids, batch.lengths, batch.adapter)
            whole = self._whole(hidden, mask, batch)
            groups = [
                self._per_token(hidden, mask, batch, options, rows)
                if options.per_token
                else self._finished(whole, options, rows)
                for options, rows in _groups(batch)
            ]
        return Embedded(groups, time.perf_counter() - started_s)

    def free(self) -> None:
        """Give back cached blocks of the device's memory, which may lie in pieces too small for the next batch."""
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _whole(self, hidden: Tensor, mask: Tensor, batch: MicroBatch) -> Tensor | None:
        """(rows, dim) float32: the vectors of all rows before they are cut; None where every job wants its tokens'."""
        if all(entry.job.options.per_token for entry in batch.entries):
            return None
        tokens = batch.skip
        skip = torch.from_numpy(tokens).to(hidden.device) if tokens.any() else None
        return self._model.head(pool(self._model.recipe.pooling, hidden, mask, skip))

    def _finished(self, whole: Tensor | None, options: VectorOptions, rows: NDArray[np.int64]) -> RowVectors:
        assert whole is not None  # noqa: S101 (these options are of a job that wants whole vectors)
        matrix, finite = self._finish(whole[torch.from_numpy(rows).to(whole.device)], options)
        return RowVectors(rows, matrix, None, finite)

    def _per_token(
        self, hidden: Tensor, mask: Tensor, batch: MicroBatch, options: VectorOptions, rows: NDArray[np.int64]
    ) -> RowVectors:
        some = torch.from_numpy(rows).to(hidden.device)
        matrix, finite = self._finish(all_tokens(hidden[some], mask[some]), options)
        bounds = offsets(batch.lengths[rows])
        return RowVectors(rows, matrix, bounds, np.logical_and.reduceat(finite, bounds[:-1]))

    def _finish(self, vectors: Tensor, options: VectorOptions) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """(n, dim) float32 to the options' size, length and format, and which rows were finite before the cast."""
        recipe = self._model.recipe
        # Without a choice of the caller, token vectors are always normalised: late interaction compares directions.
        default = recipe.normalize or options.per_token
        normalize = default if options.normalize is None else options.normalize
        finished = cut_and_normalize(vectors, options.dimensions, normalize)
        finite = torch.isfinite(finished).all(dim=1).cpu().numpy()
        return _to_numpy(_cast(finished, options.dtype), options.dtype), finite


def _groups(batch: MicroBatch) -> Iterator[tuple[VectorOptions, NDArray[np.int64]]]:
    """Rows with equal options: (options, places in the batch)."""
    numbers: dict[VectorOptions, int] = {}
    of_entry = [numbers.setdefault(entry.job.options, len(numbers)) for entry in batch.entries]
    of_row = np.array(of_entry)[batch.owner]
    for options, number in numbers.items():
        yield options, np.flatnonzero(of_row == number)


def _cast(vectors: Tensor, dtype: VectorType) -> Tensor:
    """To a number format. What is too large for e4m3, which has no infinity, is NaN as in numpy and in the standard.

    Torch has made it the largest number since some version, and nobody would see that it was cut.
    """
    if dtype is VectorType.FP8_E4M3:
        vectors = vectors.masked_fill(vectors.abs() > _E4M3_ROUNDS_DOWN, torch.nan)
    return vectors.to(_TORCH[dtype])


def _to_numpy(matrix: Tensor, dtype: VectorType) -> NDArray[Any]:
    """To numpy, which has no bfloat16 or fp8 of its own: their bytes travel as integers and get their name back."""
    as_integers = {1: torch.uint8, 2: torch.int16}.get(dtype.numpy.itemsize)
    if as_integers is None:
        return matrix.cpu().numpy()
    return matrix.view(as_integers).cpu().numpy().view(dtype.numpy)
