"""Padding: batches are filled up on the right, but not for the few models whose tokens feel it.

A mask keeps tokens from attending to padding. What a model does beside attention may look at it all the same:
MobileBERT puts each token's embedding beside that of the next one, FNet mixes all places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.integer[Any]]
Forward = Callable[[Ids, Ids], tuple[Tensor, Tensor]]
"""(total,) ids and (n,) lengths to the hidden states (n, max_len, dim) and the mask (n, max_len)."""

NOISE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
"""By how much the same token may differ between batches of different shapes, relative to the largest value."""


def feels_padding(forward: Forward, ids: Ids, filled: Tensor) -> bool:
    """Whether the hidden states of a sequence are others in a batch that is filled up to a longer one.

    Args:
        forward: of the model, filling up.
        ids: (tokens,) of the sequence.
        filled: (tokens, dim) its hidden states in such a batch.
    """
    alone = forward(ids, np.array([len(ids)]))[0][0]
    difference = (alone - filled).abs().max() / alone.abs().max()
    return bool(difference > NOISE[alone.dtype])


def without_padding(forward: Forward, ids: Ids, lengths: Ids) -> tuple[Tensor, Tensor]:
    """Run sequences of equal length together, and those of other lengths by themselves.

    Arguments and result are those of `forward`.
    """
    ends = np.cumsum(lengths)
    width = int(lengths.max())
    hidden: Tensor | None = None
    for length in np.unique(lengths).tolist():
        rows = np.flatnonzero(lengths == length)
        places = (ends[rows] - length)[:, None] + np.arange(length)
        part, _ = forward(ids[places.ravel()], lengths[rows])
        if hidden is None:
            hidden = part.new_zeros(len(lengths), width, part.shape[-1])
        hidden[torch.from_numpy(rows).to(part.device), :length] = part
    assert hidden is not None  # noqa: S101 (a batch has rows)
    mask = torch.from_numpy((np.arange(width) < lengths[:, None]).astype(np.int64))
    return hidden, mask.to(hidden.device)
