"""The embedder: micro-batch in, result vectors out, on the one thread that owns the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedstream.shared.options import VectorOptions, VectorType
from embedstream.shared.tokenization import offsets

from .batching import MicroBatch
from .copies import copies_of
from .model import Model
from .outcome import Embedded, RowVectors
from .pooling import cut_and_normalize, pool

_TORCH: dict[VectorType, torch.dtype] = {
    VectorType.FLOAT32: torch.float32,
    VectorType.FLOAT16: torch.float16,
    VectorType.BFLOAT16: torch.bfloat16,
    VectorType.FP8_E4M3: torch.float8_e4m3fn,
    VectorType.FP8_E5M2: torch.float8_e5m2,
}

_Coming = Callable[[], RowVectors]
"""Waits for what is on its way from the device."""

_MOST_AGAIN = 32
"""Rows of a group that are computed once more. One bad row spoils fewer; a model that computes no numbers at all is not
to take a pass for each row."""

_E4M3_ROUNDS_DOWN = 464.0
"""Halfway between the largest number, 448, and the next there would be; to the even one of the two that is 448."""


class Embedder:
    """Runs micro-batches. All calls come from one thread.

    Args:
        model: loaded and warm.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._copies = copies_of(model.device)
        self._ended_s = 0.0  # of the batch before

    @property
    def overlaps(self) -> bool:
        """Whether the device computes by itself once a batch is launched."""
        return self._copies.overlap

    def embed(self, batch: MicroBatch) -> Embedded:
        """Forward, pool in float32, then cut, normalise and cast once for each group of equal options."""
        return self.launch(batch)()

    def launch(self, batch: MicroBatch) -> Callable[[], Embedded]:
        """Begin with what `embed` does; see `EmbedsAhead`."""
        started_s = time.perf_counter()
        with torch.inference_mode():
            hidden = self._model.forward(batch.ids, batch.lengths, batch.adapter)
            whole = self._whole(hidden, batch)
            coming = [
                self._per_token(hidden, batch, options, rows)
                if options.per_token
                else self._finished(whole, options, rows)
                for options, rows in _groups(batch)
            ]

        def wait() -> Embedded:
            groups = [fetch() for fetch in coming]
            since_s = max(started_s, self._ended_s)  # as long as the batch before was under way, this one only waited
            if batch.n_rows > 1:
                for group in groups:
                    self._mend(group, batch)
            self._ended_s = time.perf_counter()
            return Embedded(groups, self._ended_s - since_s)

        return wait

    def _mend(self, group: RowVectors, batch: MicroBatch) -> None:
        """Compute rows that are not finite once more, each alone.

        Short sequences may share a call of attention, which hides them from each other by weights of zero: a NaN or an
        infinity of one is one of all then, for zero times it is no number.
        """
        for place in np.flatnonzero(~group.finite)[:_MOST_AGAIN].tolist():
            (own,) = self.launch(batch.alone(group.rows[place]))().groups
            if own.finite[0]:
                first, last = (place, place + 1) if group.bounds is None else group.bounds[place : place + 2]
                group.vectors[first:last] = own.vectors
                group.finite[place] = True

    def free(self) -> None:
        """Give back cached blocks of the device's memory, which may lie in pieces too small for the next batch."""
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _whole(self, hidden: Tensor, batch: MicroBatch) -> Tensor | None:
        """(rows, dim) float32: the vectors of all rows before they are cut; None where every job wants its tokens'."""
        if all(entry.job.options.per_token for entry in batch.entries):
            return None
        to_device, tokens = self._copies.to_device, batch.skip
        skip = to_device(tokens) if tokens.any() else None
        return self._model.head(pool(self._model.recipe.pooling, hidden, to_device(batch.lengths), skip))

    def _finished(self, whole: Tensor | None, options: VectorOptions, rows: NDArray[np.int64]) -> _Coming:
        assert whole is not None  # noqa: S101 (these options are of a job that wants whole vectors)
        fetch = self._finish(whole[self._copies.to_device(rows)], options)

        def wait() -> RowVectors:
            matrix, finite = fetch()
            return RowVectors(rows, matrix, None, finite)

        return wait

    def _per_token(self, hidden: Tensor, batch: MicroBatch, options: VectorOptions, rows: NDArray[np.int64]) -> _Coming:
        lengths = batch.lengths[rows]
        bounds = offsets(lengths)
        starts = offsets(batch.lengths)[rows]
        tokens = np.arange(bounds[-1]) + np.repeat(starts - bounds[:-1], lengths)
        fetch = self._finish(hidden[self._copies.to_device(tokens)].float(), options)

        def wait() -> RowVectors:
            matrix, finite = fetch()
            return RowVectors(rows, matrix, bounds, np.logical_and.reduceat(finite, bounds[:-1]))

        return wait

    def _finish(self, vectors: Tensor, options: VectorOptions) -> Callable[[], tuple[NDArray[Any], NDArray[np.bool_]]]:
        """(n, dim) float32 to the options' size, length and format, and which rows were finite before the cast."""
        recipe = self._model.recipe
        # Without a choice of the caller, token vectors are always normalised: late interaction compares directions.
        default = recipe.normalize or options.per_token
        normalize = default if options.normalize is None else options.normalize
        finished = cut_and_normalize(vectors, options.dimensions, normalize)
        finite = self._copies.to_host(torch.isfinite(finished).all(dim=1))
        matrix = self._copies.to_host(_cast(finished, options.dtype))
        return lambda: (_to_numpy(matrix(), options.dtype), finite().numpy())


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
        return matrix.numpy()
    return matrix.view(as_integers).numpy().view(dtype.numpy)
