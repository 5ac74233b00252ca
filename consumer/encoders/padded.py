"""Batches are filled up on the right; for the few models whose tokens feel that, equal lengths run together.

A mask keeps tokens from attending to padding. What a model does beside attention may look at it all the same:
MobileBERT puts each token's embedding beside that of the next one, FNet mixes all places.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedstream.consumer.copies import copies_of

from .encoder import Encoder, Ids


class Padded:
    """Any model of transformers, with its own attention.

    Args:
        module: in evaluation mode, on its device.
    """

    name = "padded"
    fills_up = True

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._pad_id = _pad_id(module.config)

    def __call__(self, ids: Ids, lengths: Ids) -> Tensor:
        """See `Encoder`."""
        device = next(self._module.parameters()).device
        width = int(lengths.max())
        present = np.arange(width) < lengths[:, None]
        padded = np.full(present.shape, self._pad_id, np.int64)
        padded[present] = ids  # row by row, as the ids lie
        to_device = copies_of(device).to_device
        mask = to_device(present.astype(np.int64))
        given = {"input_ids": to_device(padded), "attention_mask": mask}
        output = self._module(**given, return_dict=True)  # a model's files may ask for a bare tuple
        hidden: Tensor = output.last_hidden_state
        if width * len(lengths) == len(ids):
            return hidden.flatten(0, 1)
        return hidden.flatten(0, 1)[to_device(np.flatnonzero(present))]


class EqualLengths:
    """Runs sequences of equal length together, and those of other lengths by themselves.

    Args:
        encoder: that runs them.
    """

    name = "equal lengths"
    fills_up = False

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def __call__(self, ids: Ids, lengths: Ids) -> Tensor:
        """See `Encoder`."""
        starts = np.cumsum(lengths) - lengths
        hidden: Tensor | None = None
        for length in np.unique(lengths).tolist():
            rows = np.flatnonzero(lengths == length)
            places = (starts[rows][:, None] + np.arange(length)).ravel()
            part = self._encoder(ids[places], lengths[rows])
            if hidden is None:
                hidden = part.new_empty(len(ids), part.shape[-1])
            hidden[copies_of(part.device).to_device(places)] = part
        assert hidden is not None  # noqa: S101 (a batch has rows)
        return hidden


def _pad_id(config: Any) -> int:
    pad_id = getattr(config, "pad_token_id", None)
    return pad_id if isinstance(pad_id, int) and pad_id >= 0 else 0
