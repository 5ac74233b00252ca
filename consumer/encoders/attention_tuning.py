"""Which kernel computes attention, found by timing each at some lengths.

In float32 on AVX2 they are about as fast. With AMX the fused kernel of torch leaves most of the matrix unit idle at the
head sizes of small models, and two plain products may do better; no list of CPUs would say where.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedstream.consumer.measured import Measurements
from embedstream.shared.logs import get_logger

from .attention import AS_USUAL, LENGTHS, Kernel, Pattern, Tuning, by_groups
from .layout import Layout

log = get_logger()

_TOKENS = 1024
"""Of a timed batch, or one sequence where that is longer."""
_SPREAD = 0.4
"""Lengths of a timed batch differ by up to such a part from their mean: in real ones, too, hardly two are equal."""
_ROUNDS = 6
_ENOUGH_S = 0.02
"""Timing at a length ends after so long; a kernel that takes it all is timed twice."""
_GAIN: Mapping[Kernel, float] = {Kernel.FUSED: 1.0, Kernel.MATMUL: 0.9}
_GAIN_OF_OTHERS = 0.95
"""A kernel that is not the usual one must take this part of its time at most; less is noise. For products of half
formats oneDNN makes machine code for each shape it has not met, about a millisecond: those of MATMUL have the number of
sequences in them, so there are many."""
_TIMED = ("few", *LENGTHS)
_ALL = Pattern()


def tuned(
    measured: Measurements, device: torch.device, dtype: torch.dtype, *, heads: int, key_heads: int, head_dim: int
) -> Tuning:
    """What is fastest here, measured or known from before.

    Args:
        measured: where it is kept.
        device: that computes; only on a CPU there is a choice.
        dtype: of hidden states.
        heads: of the queries.
        key_heads: of keys and values.
        head_dim: components of each.
    """
    if device.type != "cpu":
        return AS_USUAL
    kernels = [kernel for kernel in Kernel if _may_differ(kernel, dtype, shares_keys=heads != key_heads)]
    name = f"attention-{heads}-{key_heads}x{head_dim}"
    found = _known(measured.get(name), kernels)
    if found is None:
        shape = dtype, heads, key_heads, head_dim
        found = tuple(_fastest(_times(kernels, layout, *shape)) for layout in _layouts())
        measured.put(name, [str(kernel) for kernel in found])
        log.debug("attention.measured", shape=name, kernels=dict(zip(_TIMED, map(str, found), strict=True)))
    few, *by_length = found
    return Tuning(few, by_length=tuple(by_length))


def heads_of(config: Any) -> tuple[int, int, int] | None:
    """Heads of the queries, heads of keys and values, and components of each, as a configuration of transformers says.

    None where it does not, or says it for each layer apart; then nothing can be measured before the first batch.
    """
    text = config.get_text_config()
    names = ("num_attention_heads", "hidden_size", "num_key_value_heads", "head_dim")
    try:
        heads, size, key_heads, head_dim = (getattr(text, name, None) for name in names)
    except RuntimeError:  # as transformers has it for what differs from layer to layer
        return None
    if not isinstance(heads, int) or not isinstance(size, int):
        return None
    found = (heads, key_heads or heads, head_dim or size // heads)
    return found if all(isinstance(number, int) for number in found) else None


def _may_differ(kernel: Kernel, dtype: torch.dtype, *, shares_keys: bool) -> bool:
    """Whether a kernel is not the same as the fused one."""
    match kernel:
        case Kernel.FLOAT32:
            return dtype is not torch.float32
        case Kernel.SOME | Kernel.SOME_ONEDNN:
            return not shares_keys
        case _:
            return True


def _known(found: Any, kernels: list[Kernel]) -> tuple[Kernel, ...] | None:
    """What was measured before, where it can be used."""
    if not isinstance(found, list) or len(found) != len(_TIMED) or not set(found) <= {*map(str, kernels)}:
        return None
    return tuple(map(Kernel, found))


def _fastest(seconds: Mapping[Kernel, float]) -> Kernel:
    return min(seconds, key=lambda kernel: seconds[kernel] / _GAIN.get(kernel, _GAIN_OF_OTHERS))


def _layouts() -> Iterator[Layout]:
    """A single query, as there are few tokens in, and full batches of about each length."""
    yield Layout(np.array([LENGTHS[0]]))
    for length in LENGTHS:
        rows = max(1, _TOKENS // length)
        parts = np.linspace(1 + _SPREAD, 1 - _SPREAD, rows) if rows > 1 else np.ones(1)
        yield Layout((length * parts).round().astype(np.int64))


def _times(
    kernels: list[Kernel], layout: Layout, dtype: torch.dtype, heads: int, key_heads: int, head_dim: int
) -> dict[Kernel, float]:
    """Seconds of the fastest run of each, in turn: so what else the machine does meets all of them."""
    query, key, value = _made_up(layout.total, dtype, heads, key_heads, head_dim)
    run = partial(by_groups, query, key, value, layout, pattern=_ALL, scale=head_dim**-0.5)
    seconds = dict.fromkeys(kernels, math.inf)
    started_s = time.perf_counter()
    with torch.inference_mode():
        for number in range(_ROUNDS):
            for kernel in [*seconds]:
                before_s = time.perf_counter()
                try:
                    run(tuning=Tuning(kernel))
                except RuntimeError as error:  # oneDNN refuses formats that the CPU has no instructions for
                    log.debug("attention.not_possible", kernel=str(kernel), reason=str(error).partition("\n")[0])
                    del seconds[kernel]
                    continue
                if number > 0:  # the first one meets cold caches
                    seconds[kernel] = min(seconds[kernel], time.perf_counter() - before_s)
            if number > 0 and time.perf_counter() - started_s > _ENOUGH_S * len(kernels):
                break
    return seconds


def _made_up(
    total: int, dtype: torch.dtype, heads: int, key_heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as a joined projection gives them: views of one matrix."""
    source = torch.Generator().manual_seed(0)
    joined = torch.randn(total, heads + 2 * key_heads, head_dim, generator=source).to(dtype)
    query, key, value = torch.split(joined, [heads, key_heads, key_heads], dim=1)
    return query, key, value
