"""Hidden states to vectors: pure functions on tensors.

Everything is summed and returned in float32, whatever the model computes in. Batches are padded on the right.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize as scale_to_unit

from embedstream.shared.recipe import Pooling


def pool(pooling: Pooling, hidden: Tensor, mask: Tensor) -> Tensor:
    """Pool by name.

    Args:
        pooling: ALL gives a row for each token, the others one for each sequence.
        hidden: (batch, seq, dim), any float type.
        mask: (batch, seq), 1 for a token, 0 for padding on the right.

    Returns:
        (batch, dim) float32, or (tokens, dim) for ALL.
    """
    match pooling:
        case Pooling.CLS:
            return cls_pool(hidden)
        case Pooling.MEAN:
            return mean_pool(hidden, mask)
        case Pooling.LAST:
            return last_pool(hidden, mask)
        case Pooling.ALL:
            return all_tokens(hidden, mask)


def cls_pool(hidden: Tensor) -> Tensor:
    """The first token's hidden state.

    Args:
        hidden: (batch, seq, dim), any float type.

    Returns:
        (batch, dim) float32.

    Source: Devlin et al. 2018, section 3.2 (arXiv:1810.04805).
    """
    return hidden[:, 0].float()


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Average the hidden states of the real tokens.

    Args:
        hidden: (batch, seq, dim), any float type; summed in float32.
        mask: (batch, seq), 1 for a token, 0 for padding.

    Returns:
        (batch, dim) float32. A row without tokens is zero.

    Source: Reimers & Gurevych 2019, section 3 (arXiv:1908.10084).
    """
    # Padding is filled, not multiplied, with zero: what stands there need not be finite.
    total = hidden.masked_fill(mask.unsqueeze(-1) == 0, 0).sum(1, dtype=torch.float32)
    return total / mask.sum(1, keepdim=True).clamp(min=1)


def last_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """The hidden state of the last real token, as decoders are pooled.

    Args:
        hidden: (batch, seq, dim), any float type.
        mask: (batch, seq), 1 for a token, 0 for padding on the right; at least one token a row.

    Returns:
        (batch, dim) float32.

    Source: Wang et al. 2024, section 3.2 (arXiv:2401.00368).
    """
    last = mask.sum(1).long() - 1
    return hidden[torch.arange(len(hidden), device=hidden.device), last].float()


def all_tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    """The hidden states of all real tokens, sequence after sequence.

    Args:
        hidden: (batch, seq, dim), any float type.
        mask: (batch, seq), 1 for a token, 0 for padding.

    Returns:
        (tokens, dim) float32.
    """
    return hidden[mask != 0].float()


def cut_and_normalize(vectors: Tensor, dimensions: int | None, normalize: bool) -> Tensor:
    """Keep the leading components, then scale to unit length: a shortened vector has length 1 again.

    Args:
        vectors: (n, dim) float32.
        dimensions: components to keep; None keeps all.
        normalize: whether to scale.

    Returns:
        (n, dimensions) float32. A zero vector stays zero.

    Source: Kusupati et al. 2022, section 3 (arXiv:2205.13147).
    """
    kept = vectors if dimensions is None else vectors[:, :dimensions]
    return scale_to_unit(kept, dim=-1) if normalize else kept
