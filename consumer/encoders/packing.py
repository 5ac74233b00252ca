"""What encoders without padding share: a batch goes to the device in packed order, and comes back in its own."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedstream.consumer.copies import copies_of

from .encoder import Ids
from .layout import Layout
from .positions import positions_of


class Packing(ABC):
    """An encoder (see `Encoder`) that computes all tokens of a batch as one row.

    Args:
        device: that computes.
        padding_id: as `positions_of` takes it.
    """

    fills_up = False

    def __init__(self, device: torch.device, padding_id: int | None) -> None:
        self._copies = copies_of(device)
        self._padding_id = padding_id

    def __call__(self, ids: Ids, lengths: Ids) -> Tensor:
        """See `Encoder`."""
        layout = Layout(lengths)
        return layout.unpack(self.run(self._copies.to_device(self.tokens(ids, layout)), layout))

    def tokens(self, ids: Ids, layout: Layout) -> NDArray[np.int64]:
        """What `run` takes of a batch, on the host.

        Args:
            ids: (total,) as the batch came.
            layout: of it.

        Returns:
            (2, total) ids and positions, in packed order.
        """
        tokens = np.empty((2, layout.total), np.int64)
        tokens[0] = layout.pack(ids)
        tokens[1] = positions_of(tokens[0], layout, self._padding_id)
        return tokens

    @abstractmethod
    def run(self, tokens: Tensor, layout: Layout) -> Tensor:
        """All that is computed on the device.

        Args:
            tokens: (2, total) of `tokens`, on the device.
            layout: of the batch.

        Returns:
            (total, dim) hidden states in packed order.
        """
