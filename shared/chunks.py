"""Inputs longer than the model reads, embedded piece by piece: how they are cut, and how the pieces are joined.

An input's ids, special tokens at the outer ends, are cut into consecutive pieces with nothing in common; each piece is
a row like any other. The vector of the input is the mean of the pieces' vectors, weighted by their lengths; per-token
vectors follow one another.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .options import VectorOptions, VectorType
from .results import ROW, ROW_TRUNCATED, Status
from .tokenization import offsets

NOT_FINITE = "The mean of the vectors of the input's pieces is not finite (NaN or infinity)."
_LEAST_NORM = 1e-12  # as torch's `normalize` has it: a zero vector stays zero


def piece_counts(lengths: NDArray[np.integer], most: int) -> NDArray[np.uint32]:
    """Into how many pieces each input is cut.

    Args:
        lengths: (inputs,) tokens of each input.
        most: tokens of a piece, at least 1.

    Returns:
        (inputs,) 0 for an input without tokens.
    """
    return (-(-lengths.astype(np.int64) // most)).astype(np.uint32)


def piece_lengths(lengths: NDArray[np.integer], counts: NDArray[np.integer], most: int) -> NDArray[np.uint32]:
    """The lengths of all pieces, one input behind the other; only the last piece of an input is shorter than `most`.

    Args:
        lengths: (inputs,) tokens of each input.
        counts: (inputs,) its pieces.
        most: tokens of a piece, at least 1.
    """
    pieces = np.full(int(counts.sum(dtype=np.int64)), most, np.uint32)
    some = counts > 0
    last = np.cumsum(counts, dtype=np.int64)[some] - 1
    pieces[last] = lengths[some] - (counts[some].astype(np.int64) - 1) * most
    return pieces


def travelling(options: VectorOptions) -> VectorOptions:
    """What is asked of pieces when `options` are asked of their inputs: a mean is taken in float32, and cast then."""
    if options.per_token:
        return options
    return VectorOptions(options.dimensions, options.normalize, VectorType.FLOAT32, per_token=False)


def join(
    rows: NDArray[np.void],
    vectors: NDArray[Any],
    counts: NDArray[np.integer],
    options: VectorOptions,
    *,
    normalize: bool,
    not_finite: int,
) -> tuple[NDArray[np.void], NDArray[Any]]:
    """Make inputs of their rows.

    Args:
        rows: (pieces,) of dtype `ROW`, none of which goes on in another.
        vectors: (sum of the rows' vectors, dim) in the format of `travelling(options)`.
        counts: (inputs,) rows of each input.
        options: what the caller asked for.
        normalize: whether a mean of several pieces is scaled to unit length.
        not_finite: number of the message for an input whose mean is not finite.

    Returns:
        (inputs,) of dtype `ROW`, and the vectors of those that are good in the format asked for. An input fails of its
        first row that failed; one without rows is told as failed, without a message.
    """
    starts = offsets(counts)
    joined = np.zeros(len(counts), ROW)
    if not len(rows):
        joined["status"] = Status.FAILED
        return joined, np.empty((0, vectors.shape[1]), options.dtype.numpy)
    bad_before = offsets(rows["status"] != Status.OK)
    good = (bad_before[starts[1:]] == bad_before[starts[:-1]]) & (counts > 0)
    tokens_before, vectors_before = offsets(rows["tokens"]), offsets(rows["vectors"])
    joined["tokens"] = tokens_before[starts[1:]] - tokens_before[starts[:-1]]
    truncated_before = offsets(rows["flags"] & ROW_TRUNCATED)
    joined["flags"] = np.where(truncated_before[starts[1:]] > truncated_before[starts[:-1]], ROW_TRUNCATED, 0)
    for index in np.flatnonzero(~good).tolist():
        _fail(joined, rows[starts[index] : starts[index + 1]], index)
    if options.per_token:
        joined["vectors"] = np.where(good, vectors_before[starts[1:]] - vectors_before[starts[:-1]], 0)
        kept = vectors if good.all() else vectors[np.repeat(np.repeat(good, counts), rows["vectors"])]
        return joined, kept
    means = np.empty((len(counts), vectors.shape[1]), np.float32 if (counts > 1).any() else vectors.dtype)
    single = good & (counts == 1)
    means[single] = vectors[vectors_before[starts[:-1][single]]]
    for index in np.flatnonzero(good & (counts > 1)).tolist():
        first, end = int(starts[index]), int(starts[index + 1])
        means[index] = mean(vectors[vectors_before[first] : vectors_before[end]], rows["tokens"][first:end], normalize)
        if not np.isfinite(means[index]).all():
            good[index] = False
            joined["status"][index], joined["message"][index] = Status.FAILED, not_finite
    joined["vectors"] = good
    with np.errstate(over="ignore", invalid="ignore"):  # what a narrower format cannot hold becomes what it has for it
        return joined, means[good].astype(options.dtype.numpy, copy=False)


def mean(vectors: NDArray[Any], lengths: NDArray[np.integer], normalize: bool) -> NDArray[np.float32]:
    """The vector of one input from those of its pieces.

    Args:
        vectors: (pieces, dim) float32.
        lengths: (pieces,) tokens of each.
        normalize: whether the mean is scaled to unit length, as each of its pieces was.

    Returns:
        (dim,) float32: sum(length * vector) / sum(length).
    """
    weights = lengths.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # the caller looks whether it is finite
        # Not as a product that is summed up: that would be one more copy of the vectors.
        total: NDArray[np.float32] = np.einsum("i,ij->j", weights, vectors) / weights.sum()
        if normalize:
            total /= max(np.float32(np.linalg.norm(total)), np.float32(_LEAST_NORM))
    return total


def _fail(joined: NDArray[np.void], rows: NDArray[np.void], index: int) -> None:
    """An input fails as its first bad row did."""
    bad = np.flatnonzero(rows["status"] != Status.OK)
    joined["status"][index] = rows["status"][bad[0]] if len(bad) else Status.FAILED
    joined["message"][index] = rows["message"][bad[0]] if len(bad) else 0
