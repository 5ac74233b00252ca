"""Neighbours in the packed order of a batch that attention takes together, by two products of matrices and a softmax.

A few sequences at a time, so that their scores stay in the cache. Those of a bundle need not be of equal length: they
are filled up to the longest one where that takes less time than a call of its own for each length, and real batches
hold nearly as many lengths as texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Softmax: TypeAlias = Callable[[Tensor], Tensor]
"""Of the last dimension of (…, queries, keys) scores."""

MOST_TOKENS = 512
"""Of a bundle. Measured with 12 heads of 32, 61 to 201 tokens in bfloat16: twice as many are no faster, and one
sequence at a time takes 1.1 to 2 times as long."""
_CALL_SCORES = 8192
"""The operations for one bundle take as long as so many scores of each head. Measured on AVX512-BF16 with 12 heads of
32 and two threads, mixed texts of mean 8, 28, 57 and 121 tokens: 1.0, 0.9, 0.9 and 1.4 µs a token in bundles; 2.0, 2.2,
2.0 and 2.1 µs in groups of equal length. Half or twice as many scores make little difference."""
_STEP = 8
"""What is filled up has a multiple of so many tokens: oneDNN makes machine code for each size that it has not met."""


@dataclass(frozen=True, slots=True)
class Filling:
    """How sequences of several lengths become a matrix.

    Args:
        tokens: (rows x length,) the token that stands at each place. Behind the end of a sequence its last token is
            repeated, so that what other sequences hold, be it NaN, is never touched.
        places: (tokens of the bundle,) where each of them stands.
        bias: (rows x heads, 1, length) added to the scores: 0, and the lowest number at places behind the end.
    """

    tokens: Tensor
    places: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class Bundle:
    """Sequences that are computed together.

    Args:
        start: the first token, in packed order.
        end: the token behind the last one.
        rows: sequences.
        length: tokens of each, once they are filled up.
        filling: None where all are of that length.
    """

    start: int
    end: int
    rows: int
    length: int
    filling: Filling | None


def bundles_of(lengths: NDArray[np.int64], start: int, *, heads: int, dtype: torch.dtype) -> list[Bundle]:
    """Bundles of neighbours, for a CPU.

    Args:
        lengths: (n,) tokens of each sequence, in packed order: they rise or fall.
        start: the first token.
        heads: of the attention.
        dtype: of its scores.
    """
    ends = start + np.cumsum(lengths)
    found = []
    for first, last in _cuts(lengths):
        own = lengths[first:last]
        longest = int(own.max())
        equal = int(own.min()) == longest
        length = longest if equal else -(-longest // _STEP) * _STEP
        begin, end = int(ends[first] - lengths[first]), int(ends[last - 1])
        filling = None if equal else _filling(own, begin, length, heads, dtype)
        found.append(Bundle(begin, end, last - first, length, filling))
    return found


def _cuts(lengths: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """First sequence of each bundle, and the one behind its last, taken from the long end."""
    falling = lengths if lengths[0] >= lengths[-1] else lengths[::-1]
    squares, first, total = falling**2, 0, len(lengths)
    while first < total:
        most = max(1, MOST_TOKENS // int(falling[first]))
        hidden = np.cumsum(squares[first] - squares[first : first + most])
        rows = _power_of_two(int(np.searchsorted(hidden, _CALL_SCORES, side="right")))
        yield (first, first + rows) if falling is lengths else (total - first - rows, total - first)
        first += rows


def _power_of_two(most: int) -> int:
    """The largest one: bundles are of few sizes, as their lengths are."""
    return 1 << most.bit_length() - 1


def _filling(lengths: NDArray[np.int64], start: int, length: int, heads: int, dtype: torch.dtype) -> Filling:
    starts = start + np.cumsum(lengths) - lengths
    places = np.arange(length)
    behind = places >= lengths[:, None]
    tokens = starts[:, None] + np.minimum(places, lengths[:, None] - 1)
    bias = torch.zeros(behind.shape, dtype=dtype).masked_fill_(torch.from_numpy(behind), torch.finfo(dtype).min)
    return Filling(
        torch.from_numpy(tokens.ravel()),
        torch.from_numpy(np.flatnonzero(~behind)),
        bias.unsqueeze(1).repeat_interleave(heads, 0),
    )


def attend_bundle(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, bundle: Bundle, scale: float, softmax: Softmax
) -> None:
    """Attention of each token of a bundle to all of its own sequence.

    Args:
        query: (total, heads, head_dim) of the whole batch.
        key: as the query.
        value: (total, heads, value_dim).
        output: as the values; tokens of the bundle are written to it.
        bundle: that is computed.
        scale: factor of the scores.
        softmax: for the scores.
    """
    filling, tokens = bundle.filling, slice(bundle.start, bundle.end)
    if filling is None:
        q, k, v = (_matrices(part[tokens], bundle) for part in (query, key, value))
        scores = torch.baddbmm(query.new_zeros(()), q, k.transpose(-1, -2), beta=0, alpha=scale)
    else:
        q, k, v = (_matrices(part.index_select(0, filling.tokens), bundle) for part in (query, key, value))
        scores = torch.baddbmm(filling.bias, q, k.transpose(-1, -2), alpha=scale)
    computed = torch.bmm(softmax(scores), v).view(bundle.rows, -1, bundle.length, v.shape[-1]).transpose(1, 2)
    if filling is None:
        output[tokens].view(computed.shape).copy_(computed)
    else:
        torch.index_select(computed.flatten(0, 1), 0, filling.places, out=output[tokens])


def _matrices(part: Tensor, bundle: Bundle) -> Tensor:
    """(rows x heads, length, dim), copied as they lie: torch would copy them too, and keys by columns."""
    return part.view(bundle.rows, bundle.length, *part.shape[1:]).transpose(1, 2).contiguous().flatten(0, 1)
