"""Hidden states to vectors: pure functions on tensors.

Everything is summed and returned in float32, whatever the model computes in. Batches are padded on the right. Each
function follows the Pooling module of sentence-transformers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize as scale_to_unit

from embedstream.shared.recipe import Pooling


def pool(pooling: Sequence[Pooling], hidden: Tensor, mask: Tensor, skip: Tensor | None = None) -> Tensor:
    """Pool by name; several ways give their vectors side by side.

    Args:
        pooling: at least one; ALL, which stands alone, gives a row for each token, the others one for each sequence.
        hidden: (batch, seq, dim), any float type.
        mask: (batch, seq), 1 for a token, 0 for padding on the right.
        skip: (batch,) leading tokens of each sequence that are left out, such as those of a prompt; None for none. ALL
            leaves nothing out.

    Returns:
        (batch, ways * dim) float32, or (tokens, dim) for ALL.
    """
    kept = mask if skip is None else mask * (_positions(mask) >= skip.unsqueeze(1))
    vectors = [_pool_one(way, hidden, mask, kept) for way in pooling]
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors, dim=-1)


def _pool_one(pooling: Pooling, hidden: Tensor, mask: Tensor, kept: Tensor) -> Tensor:
    match pooling:
        case Pooling.CLS:
            return cls_pool(hidden, kept)
        case Pooling.MEAN:
            return mean_pool(hidden, kept)
        case Pooling.LAST:
            return last_pool(hidden, kept)
        case Pooling.MAX:
            return max_pool(hidden, kept)
        case Pooling.MEAN_SQRT_LEN:
            return mean_sqrt_len_pool(hidden, kept)
        case Pooling.WEIGHTED_MEAN:
            return weighted_mean_pool(hidden, kept)
        case Pooling.ALL:
            return all_tokens(hidden, mask)


def cls_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """The first token's hidden state.

    Args:
        hidden: (batch, seq, dim), any float type.
        mask: (batch, seq), 1 for a token to pool, else 0.

    Returns:
        (batch, dim) float32. A row without tokens takes the first there is.

    Source: Devlin et al. 2018, section 3.2 (arXiv:1810.04805).
    """
    return _row_of_each(hidden, mask.int().argmax(1))


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Average the hidden states of the tokens.

    Args:
        hidden: (batch, seq, dim), any float type; summed in float32.
        mask: (batch, seq), 1 for a token to pool, else 0.

    Returns:
        (batch, dim) float32. A row without tokens is zero.

    Source: Reimers & Gurevych 2019, section 3 (arXiv:1908.10084).
    """
    return _sum(hidden, mask) / mask.sum(1, keepdim=True).clamp(min=1)


def mean_sqrt_len_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """The sum of the tokens' hidden states, divided by the square root of their number.

    Arguments and result are those of `mean_pool`.

    Source: `mean_sqrt_len_tokens` of sentence-transformers.
    """
    return _sum(hidden, mask) / mask.sum(1, keepdim=True).clamp(min=1).sqrt()


def weighted_mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Average weighted by position, the first token of the sequence counting once, the second twice, and so on.

    Arguments and result are those of `mean_pool`; a token left out does not change the weights of the others.

    Source: Muennighoff 2022, section 3.1 (arXiv:2202.08904).
    """
    weights = mask * (_positions(mask) + 1)
    # Not a product of hidden states with all weights: what stands in padding need not be finite.
    total = (_filled(hidden, mask).float() * weights.unsqueeze(-1)).sum(1)
    return total / weights.sum(1, keepdim=True).clamp(min=1)


def max_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """The largest value of each component over the tokens.

    Args:
        hidden: (batch, seq, dim), any float type.
        mask: (batch, seq), 1 for a token to pool, else 0.

    Returns:
        (batch, dim) float32. A row without tokens is minus infinity, which never leaves a consumer.

    Source: Reimers & Gurevych 2019, section 3 (arXiv:1908.10084).
    """
    return _filled(hidden, mask, -torch.inf).amax(1).float()


def last_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """The hidden state of the last token, as decoders are pooled.

    Args:
        hidden: (batch, seq, dim), any float type.
        mask: (batch, seq), 1 for a token to pool, else 0.

    Returns:
        (batch, dim) float32. A row without tokens is zero.

    Source: Wang et al. 2024, section 3.2 (arXiv:2401.00368).
    """
    last = (mask * _positions(mask)).argmax(1)
    return _row_of_each(hidden, last).masked_fill(mask.sum(1, keepdim=True) == 0, 0)


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


def _positions(mask: Tensor) -> Tensor:
    return torch.arange(mask.shape[1], device=mask.device).unsqueeze(0)


def _filled(hidden: Tensor, mask: Tensor, value: float = 0.0) -> Tensor:
    """Padding is filled, not multiplied, with zero: what stands there need not be finite."""
    return hidden.masked_fill(mask.unsqueeze(-1) == 0, value)


def _sum(hidden: Tensor, mask: Tensor) -> Tensor:
    return _filled(hidden, mask).sum(1, dtype=torch.float32)


def _row_of_each(hidden: Tensor, places: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), places].float()
