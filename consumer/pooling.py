"""Hidden states to vectors: pure functions on tensors.

Sequences lie one behind the other, without padding. Everything is summed and returned in float32, whatever the model
computes in. Each function follows the Pooling module of sentence-transformers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag
from torch.nn.functional import normalize as scale_to_unit

from embedstream.shared.recipe import Pooling


def pool(pooling: Sequence[Pooling], hidden: Tensor, lengths: Tensor, skip: Tensor | None = None) -> Tensor:
    """Pool by name; several ways give their vectors side by side.

    Args:
        pooling: at least one; ALL, which stands alone, gives a row for each token, the others one for each sequence.
        hidden: (total, dim), any float type.
        lengths: (n,) int64, tokens of each sequence, at least 1, adding up to `total`.
        skip: (n,) leading tokens of each sequence that are left out, such as those of a prompt; None for none. ALL
            leaves nothing out.

    Returns:
        (n, ways * dim) float32, or (total, dim) for ALL.
    """
    vectors = [_pool_one(way, hidden, lengths, skip) for way in pooling]
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors, dim=-1)


def _pool_one(pooling: Pooling, hidden: Tensor, lengths: Tensor, skip: Tensor | None) -> Tensor:
    match pooling:
        case Pooling.CLS:
            return cls_pool(hidden, lengths, skip)
        case Pooling.MEAN:
            return mean_pool(hidden, lengths, skip)
        case Pooling.LAST:
            return last_pool(hidden, lengths, skip)
        case Pooling.MAX:
            return max_pool(hidden, lengths, skip)
        case Pooling.MEAN_SQRT_LEN:
            return mean_sqrt_len_pool(hidden, lengths, skip)
        case Pooling.WEIGHTED_MEAN:
            return weighted_mean_pool(hidden, lengths, skip)
        case Pooling.ALL:
            return hidden.float()


def cls_pool(hidden: Tensor, lengths: Tensor, skip: Tensor | None = None) -> Tensor:
    """The hidden state of the first token that is not left out.

    Args:
        hidden: (total, dim), any float type.
        lengths: (n,) int64, tokens of each sequence, at least 1.
        skip: (n,) leading tokens that are left out; None for none.

    Returns:
        (n, dim) float32. A sequence of which nothing is left takes its first token.

    Source: Devlin et al. 2018, section 3.2 (arXiv:1810.04805).
    """
    starts = _starts(lengths)
    return hidden[starts if skip is None else starts + skip * (skip < lengths)].float()


def mean_pool(hidden: Tensor, lengths: Tensor, skip: Tensor | None = None) -> Tensor:
    """Average the hidden states of the tokens.

    Args:
        hidden: (total, dim), any float type; summed in float32.
        lengths: (n,) int64, tokens of each sequence, at least 1.
        skip: (n,) leading tokens that are left out; None for none.

    Returns:
        (n, dim) float32. A sequence of which nothing is left is zero.

    Source: Reimers & Gurevych 2019, section 3 (arXiv:1908.10084).
    """
    return _sum(hidden, lengths, skip) / _kept(lengths, skip).clamp(min=1).unsqueeze(1)


def mean_sqrt_len_pool(hidden: Tensor, lengths: Tensor, skip: Tensor | None = None) -> Tensor:
    """The sum of the tokens' hidden states, divided by the square root of their number.

    Arguments and result are those of `mean_pool`.

    Source: `mean_sqrt_len_tokens` of sentence-transformers.
    """
    return _sum(hidden, lengths, skip) / _kept(lengths, skip).clamp(min=1).sqrt().unsqueeze(1)


def weighted_mean_pool(hidden: Tensor, lengths: Tensor, skip: Tensor | None = None) -> Tensor:
    """Average weighted by position, the first token of the sequence counting once, the second twice, and so on.

    Arguments and result are those of `mean_pool`; a token left out does not change the weights of the others.

    Source: Muennighoff 2022, section 3.1 (arXiv:2202.08904).
    """
    places = torch.arange(1, len(hidden) + 1, device=hidden.device)
    weights = places - torch.repeat_interleave(_starts(lengths), lengths, output_size=len(hidden))
    total = _sum(hidden, lengths, skip, weights.float())
    left_out = 0 if skip is None else (most := skip.minimum(lengths)) * (most + 1) // 2
    return total / (lengths * (lengths + 1) // 2 - left_out).clamp(min=1).unsqueeze(1)


def max_pool(hidden: Tensor, lengths: Tensor, skip: Tensor | None = None) -> Tensor:
    """The largest value of each component over the tokens.

    Args:
        hidden: (total, dim), any float type.
        lengths: (n,) int64, tokens of each sequence, at least 1.
        skip: (n,) leading tokens that are left out; None for none.

    Returns:
        (n, dim) float32. A sequence of which nothing is left is minus infinity, which never leaves a consumer.

    Source: Reimers & Gurevych 2019, section 3 (arXiv:1908.10084).
    """
    tokens, starts = _tokens(hidden, lengths, skip)
    largest = embedding_bag(tokens, hidden.float(), starts, mode="max")
    return largest.masked_fill((_kept(lengths, skip) == 0).unsqueeze(1), -torch.inf)


def last_pool(hidden: Tensor, lengths: Tensor, skip: Tensor | None = None) -> Tensor:
    """The hidden state of the last token, as decoders are pooled.

    Args:
        hidden: (total, dim), any float type.
        lengths: (n,) int64, tokens of each sequence, at least 1.
        skip: (n,) leading tokens that are left out; None for none.

    Returns:
        (n, dim) float32. A sequence of which nothing is left is zero.

    Source: Wang et al. 2024, section 3.2 (arXiv:2401.00368).
    """
    return hidden[lengths.cumsum(0) - 1].float().masked_fill((_kept(lengths, skip) == 0).unsqueeze(1), 0)


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


def _starts(lengths: Tensor) -> Tensor:
    return lengths.cumsum(0) - lengths


def _kept(lengths: Tensor, skip: Tensor | None) -> Tensor:
    """(n,) tokens of each sequence that are pooled."""
    return lengths if skip is None else (lengths - skip).clamp(min=0)


def _tokens(hidden: Tensor, lengths: Tensor, skip: Tensor | None) -> tuple[Tensor, Tensor]:
    """Places of the tokens that are pooled, and where those of each sequence begin among them."""
    tokens = torch.arange(len(hidden), device=hidden.device)
    if skip is None:
        return tokens, _starts(lengths)
    first = torch.repeat_interleave(_starts(lengths) + skip, lengths, output_size=len(hidden))
    return tokens[tokens >= first], _starts(_kept(lengths, skip))


def _sum(hidden: Tensor, lengths: Tensor, skip: Tensor | None, weights: Tensor | None = None) -> Tensor:
    # Of torch's sums over pieces of unequal length the fastest on a CPU by far: segment_reduce takes 15 times as long.
    tokens, starts = _tokens(hidden, lengths, skip)
    weights = None if weights is None else weights[tokens]
    return embedding_bag(tokens, hidden.float(), starts, mode="sum", per_sample_weights=weights)
