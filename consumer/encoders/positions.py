"""Where models see the tokens of a sequence."""

from __future__ import annotations

import sys

import numpy as np
import torch
from numpy.typing import NDArray

from .layout import Layout

_BY_ID = "create_position_ids_from_input_ids"
"""Of RoBERTa and what came from it: their positions leave padding tokens out, wherever in a text those stand."""


def padding_id_of_positions(module: torch.nn.Module) -> int | None:
    """The token that positions leave out, the first other one of a sequence having the number after it.

    Args:
        module: of transformers.

    Returns:
        None where positions are counted from 0, whatever the tokens are.
    """
    for part in module.modules():
        of_part = hasattr(part, _BY_ID) or hasattr(sys.modules[type(part).__module__], _BY_ID)
        padding_id = getattr(part, "padding_idx", None)
        if of_part and isinstance(padding_id, int) and not isinstance(part, torch.nn.Embedding):
            return padding_id
    return None


def positions_of(ids: NDArray[np.int64], layout: Layout, padding_id: int | None) -> NDArray[np.int64]:
    """As the model numbers the tokens of a sequence by itself.

    Args:
        ids: (total,) in packed order.
        layout: of the batch.
        padding_id: as `padding_id_of_positions` found it.

    Returns:
        (total,) in packed order.
    """
    if padding_id is None:
        return layout.positions
    counts = ids != padding_id
    if counts.all():
        return layout.positions + (padding_id + 1)
    so_far = np.cumsum(counts)
    before = so_far[layout.offsets[:-1]] - counts[layout.offsets[:-1]]
    positions: NDArray[np.int64] = (so_far - np.repeat(before, layout.lengths)) * counts + padding_id
    return positions
