"""What all encoders have in common."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.integer[Any]]

NOISE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
"""By how much the same token may differ between batches of different shapes, relative to the largest value."""


class Encoder(Protocol):
    """Runs a transformer. All calls come from the thread that owns the device."""

    @property
    def name(self) -> str:
        """For logs and people, such as `padded`."""

    @property
    def fills_up(self) -> bool:
        """Whether every sequence costs as much as the longest one of its batch."""

    def __call__(self, ids: Ids, lengths: Ids) -> Tensor:
        """Run a batch in inference mode.

        Args:
            ids: (total,) token ids, special tokens included, any integer type.
            lengths: (n,) tokens of each sequence, at least 1, adding up to `total`.

        Returns:
            (total, dim) the last hidden states, sequence after sequence, in the model's dtype and on its device.
        """


def differ(one: Tensor, other: Tensor) -> bool:
    """Whether hidden states of the same tokens differ by more than their number format rounds."""
    difference = (one - other).abs().max() / one.abs().max()
    return not bool(difference <= NOISE[one.dtype])  # NaN differs from everything
