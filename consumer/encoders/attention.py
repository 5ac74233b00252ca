"""Attention inside each sequence of a packed batch.

Elsewhere than on devices with a kernel of their own, sequences of equal length are a matrix and run together, by a
kernel of torch for each group. The views that this takes copy nothing. A few short sequences run as if they were one,
and those of nearly equal length are filled up, where that is faster (`bundles.py`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from embedstream.consumer.copies import copies_of

from .bundles import Bundle, Softmax, attend_bundle, bundles_of
from .layout import Group, Layout


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which tokens of its sequence a token attends to, itself always included.

    Args:
        left: how many of those before it; None for all.
        right: how many of those behind it; None for all, 0 in causal attention.
        soft_cap: scores are bent to lie between minus and plus this number by tanh; None where they are not.
    """

    left: int | None = None
    right: int | None = None
    soft_cap: float | None = None

    def sees_all(self, length: int) -> bool:
        """Whether the windows cut nothing off a sequence of so many tokens."""
        return all(size is None or size >= length - 1 for size in (self.left, self.right))

    def is_causal(self, length: int) -> bool:
        """Whether a sequence of so many tokens is masked as in causal attention, and no more."""
        return self.right == 0 and (self.left is None or self.left >= length - 1)


class Kernel(StrEnum):
    """How attention of sequences of one length is computed."""

    FUSED = "fused"
    """`scaled_dot_product_attention` of torch, which keeps no scores."""
    MATMUL = "matmul"
    """Scores by one product of matrices, softmax, the values by another."""
    SOME = "some"
    """As MATMUL, in bundles of a few sequences of about one length: scores stay in the cache, and shapes come again in
    other batches. Where not all of a sequence is seen, or heads share keys, as FUSED."""
    SOME_ONEDNN = "some, oneDNN"
    """As SOME, with oneDNN's softmax. Torch's is slow in half formats for rows whose length is no multiple of what a
    vector register holds, which is nearly all of them."""
    FLOAT32 = "float32"
    """As FUSED, in float32: for half formats torch's fused kernel may be slower than that and the casts together."""


LENGTHS = (15, 61, 123, 251, 1021)
"""Lengths at which kernels are timed: as odd as most are. A sequence takes what is fastest at the nearest one."""
_BOUNDS = (30, 87, 176, 506)
"""The longest sequences that count as each of `LENGTHS` but the last: the geometric mean of it and the next one."""
FEW_TOKENS = 64
"""Up to which a call takes as long as what it consists of takes to be called, whatever the length of its sequences."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """What is a question of speed alone, and of the machine.

    Args:
        kernel: where all can be used; only MATMUL bends scores.
        scores_bytes: memory that MATMUL may take for scores at a time, at least that of one token's.
        by_length: kernels for each of `LENGTHS`, in place of the one for all, which is left those of few tokens.
    """

    kernel: Kernel = Kernel.FUSED
    scores_bytes: int = 16 * 1024 * 1024
    by_length: tuple[Kernel, ...] = ()

    def kernel_of(self, tokens: int, length: int) -> Kernel:
        """The kernel for a call with so many tokens, of sequences of about one length."""
        if not self.by_length or tokens <= FEW_TOKENS:
            return self.kernel
        return self.by_length[bisect_left(_BOUNDS, length)]


AS_USUAL = Tuning()
"""Without having measured anything."""


class Attend(Protocol):
    """Attention inside each sequence, on one type of device."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, pattern: Pattern, scale: float
    ) -> Tensor | None:
        """Arguments and result are those of `attend`; None for a pattern or shapes that it cannot do."""


_OF_DEVICE: dict[str, Attend] = {}
"""By type of device."""


def register(device_type: str, kernel: Attend) -> None:
    """Take a kernel for packed sequences on all devices of a type, such as `cuda`."""
    _OF_DEVICE[device_type] = kernel


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    pattern: Pattern,
    scale: float,
    tuning: Tuning = AS_USUAL,
) -> Tensor:
    """Softmax attention of each token to those of its own sequence that the pattern lets it see.

    Args:
        query: (total, heads, head_dim) in packed order; as in `key` and `value`, any strides whose last one is 1. On
            the way by groups it may have rows behind the last sequence, which belong to none.
        key: (total, key_heads, head_dim), where `heads` is a multiple of `key_heads`.
        value: (total, key_heads, value_dim).
        layout: of the batch.
        pattern: which tokens are seen.
        scale: factor of the scores, usually `head_dim ** -0.5`.
        tuning: of the path by groups of equal length.

    Returns:
        (total, heads, value_dim) contiguous, with zeros for rows of no sequence.

    Source: Vaswani et al. 2017, section 3.2 (arXiv:1706.03762); Ainslie et al. 2023 for grouped heads
    (arXiv:2305.13245); Beltagy et al. 2020, section 3.1, for windows (arXiv:2004.05150).
    """
    own = _OF_DEVICE.get(query.device.type)
    if own is not None:
        result = own(query, key, value, layout, pattern=pattern, scale=scale)
        if result is not None:
            return result
    return by_groups(query, key, value, layout, pattern=pattern, scale=scale, tuning=tuning)


def by_groups(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, pattern: Pattern, scale: float, tuning: Tuning
) -> Tensor:
    """`attend` on any device: a call for each bundle, or for each group of sequences of equal length."""
    how = _How(pattern, scale, tuning)
    output = query.new_empty(*query.shape[:2], value.shape[-1])
    plan = _plan_of(query, key, layout, how)
    for bundle, softmax in plan.bundles:
        attend_bundle(query, key, value, output, bundle, scale, softmax)
    for run in plan.runs:
        if len(run) == 1:
            _of_group(query, key, value, output, run[0], how)
        else:
            _joined(query, key, value, output, layout, run, how)
    if len(output) > layout.total:
        output[layout.total :] = 0
    return output


@dataclass(frozen=True, slots=True)
class _How:
    """What all sequences of a batch have in common."""

    pattern: Pattern
    scale: float
    tuning: Tuning


@dataclass(slots=True)
class _Plan:
    """What of a batch is computed together."""

    bundles: list[tuple[Bundle, Softmax]]
    runs: list[tuple[Group, ...]]
    """Of the layout, what is in no bundle."""


def _plan_of(query: Tensor, key: Tensor, layout: Layout, how: _How) -> _Plan:
    """Made once for all layers that are alike."""
    name = "plan", query.shape[1], key.shape[1], query.dtype, how.pattern, how.tuning
    if name not in layout.kept:
        layout.kept[name] = _plan(query, key, layout, how)
    found: _Plan = layout.kept[name]
    return found


def _plan(query: Tensor, key: Tensor, layout: Layout, how: _How) -> _Plan:
    def kernel_of(run: tuple[Group, ...]) -> Kernel | None:
        """What it is computed by in a bundle; None in none."""
        if len(run) > 1 or how.pattern.soft_cap is not None or not how.pattern.sees_all(run[0].length):
            return None
        kernel = how.tuning.kernel_of(layout.total, run[0].length)
        return kernel if kernel in _SOFTMAX else None

    if query.shape[1] != key.shape[1]:
        return _Plan([], [*layout.runs])
    plan = _Plan([], [])
    for kernel, neighbours in groupby(layout.runs, kernel_of):
        runs = [*neighbours]
        if kernel is None:
            plan.runs += runs
            continue
        first, last = np.searchsorted(layout.offsets, [runs[0][0].start, runs[-1][-1].end])
        lengths, start = layout.lengths[first:last], runs[0][0].start
        bundles = bundles_of(lengths, start, heads=query.shape[1], dtype=query.dtype)
        plan.bundles += [(bundle, _SOFTMAX[kernel]) for bundle in bundles]
    return plan


# The functions below write to `output`, which has the shape of the queries but for `value_dim`.


def _of_group(query: Tensor, key: Tensor, value: Tensor, output: Tensor, group: Group, how: _How) -> None:
    """Sequences of equal length: a matrix of them."""
    q, k, v, place = (
        part[group.start : group.end].view(group.rows, group.length, *part.shape[1:]).transpose(1, 2)
        for part in (query, key, value, output)
    )
    _banded(q, k, v, place, how)


def _joined(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, layout: Layout, run: tuple[Group, ...], how: _How
) -> None:
    """A few short sequences as if they were one, hidden from each other."""
    start, end = run[0].start, run[-1].end
    name = start, query.device, how.pattern.left, how.pattern.right
    if name not in layout.kept:
        layout.kept[name] = copies_of(query.device).to_device(_own(layout, start, end, how.pattern).numpy())
    q, k, v, place = (part[start:end].transpose(0, 1).unsqueeze(0) for part in (query, key, value, output))
    _one_length(q, k, v, place, layout.kept[name], how)


def _own(layout: Layout, start: int, end: int, pattern: Pattern) -> Tensor:
    """(end - start, end - start) True where a token of a run may see another one, which is of its own sequence."""
    places = torch.arange(start, end)
    owners = torch.searchsorted(torch.from_numpy(layout.offsets), places, right=True)
    return (owners.unsqueeze(1) == owners) & visible(places, places, pattern)


def _banded(query: Tensor, key: Tensor, value: Tensor, output: Tensor, how: _How) -> None:
    """Sequences of one length; where windows are far shorter, blocks of queries meet only the keys that they see."""
    length = query.shape[2]
    if how.pattern.sees_all(length) or how.pattern.is_causal(length):
        _one_length(query, key, value, output, None, how)
        return
    places = torch.arange(length, device=query.device)
    for first, last, seen_first, seen_last in _bands(length, how.pattern):
        mask = visible(places[first:last], places[seen_first:seen_last], how.pattern)
        block, seen = slice(first, last), slice(seen_first, seen_last)
        _one_length(query[:, :, block], key[:, :, seen], value[:, :, seen], output[:, :, block], mask, how)


_LEAST_BAND = 64
"""Queries of a block: fewer of them would cost more in calls than they save in scores."""


def _bands(length: int, pattern: Pattern) -> Iterator[tuple[int, int, int, int]]:
    """Blocks of queries, and of the keys that they see between them: (first, behind the last) of both."""
    left, right = (length if size is None else size for size in (pattern.left, pattern.right))
    step = max(_LEAST_BAND, min(left, length) + min(right, length))
    for first in range(0, length, step):
        last = min(first + step, length)
        yield first, last, max(0, first - left), min(length, last + right)


def visible(queries: Tensor, keys: Tensor, pattern: Pattern) -> Tensor:
    """(queries, keys) True where the pattern lets a query see a key; both are places in the same sequence."""
    distance = keys.unsqueeze(0) - queries.unsqueeze(1)
    seen = torch.ones_like(distance, dtype=torch.bool)
    if pattern.left is not None:
        seen &= distance >= -pattern.left
    if pattern.right is not None:
        seen &= distance <= pattern.right
    return seen


def _one_length(query: Tensor, key: Tensor, value: Tensor, output: Tensor, mask: Tensor | None, how: _How) -> None:
    """To (rows, heads, queries, value_dim) from (rows, heads, queries, head_dim) and (rows, key_heads, keys, …)."""
    causal = mask is None and how.pattern.right == 0 and query.shape[2] > 1
    kernel = how.tuning.kernel_of(query.shape[0] * query.shape[2], query.shape[2])
    if kernel is Kernel.MATMUL or how.pattern.soft_cap is not None:
        _by_matmul(query, key, value, output, mask, how, causal=causal)
        return
    if kernel is Kernel.FLOAT32:
        query, key, value = query.float(), key.float(), value.float()
    grouped = query.shape[1] != key.shape[1]
    result = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=how.scale, enable_gqa=grouped
    )
    output.copy_(result)


def _softmax(scores: Tensor) -> Tensor:
    return scores.softmax(-1)


def _softmax_of_onednn(scores: Tensor) -> Tensor:
    return torch.softmax(scores.to_mkldnn(), -1).to_dense()


_SOFTMAX: Mapping[Kernel, Softmax] = {Kernel.SOME: _softmax, Kernel.SOME_ONEDNN: _softmax_of_onednn}
"""Of the kernels that compute bundles."""


def _by_matmul(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, mask: Tensor | None, how: _How, *, causal: bool
) -> None:
    rows, heads, queries, _ = query.shape
    key_heads, keys = key.shape[1:3]
    if causal:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
    soft_cap = how.pattern.soft_cap
    of_query = heads * keys * query.element_size()
    some_rows = max(1, how.tuning.scores_bytes // (of_query * queries))
    some_queries = max(1, how.tuning.scores_bytes // of_query)
    for row in range(0, rows, some_rows):
        these = slice(row, row + some_rows)
        k, v = key[these].unsqueeze(2), value[these].unsqueeze(2)
        for first in range(0, queries, some_queries):
            part = slice(first, first + some_queries)
            q = query[these, :, part]
            q = q.view(len(q), key_heads, heads // key_heads, *q.shape[2:])
            scores = torch.matmul(q * how.scale, k.transpose(-1, -2))
            if soft_cap is not None:
                scores.div_(soft_cap).tanh_().mul_(soft_cap)
            if mask is not None:
                scores.masked_fill_(~mask[part], -torch.inf)
            output[these, :, part] = torch.matmul(scores.softmax(-1), v).flatten(1, 2)
