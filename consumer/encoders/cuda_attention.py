"""Attention inside each sequence on CUDA: one kernel for the whole batch, told where each sequence begins.

Three libraries bring such kernels, all of the FlashAttention line: flash-attn 3 for Hopper, flash-attn 2, and torch
itself. They take float16 and bfloat16 alone, from Ampere on. What none of them can do is left to the path that runs
sequences of equal length together.

Source: Dao 2023 (arXiv:2307.08691); Shah et al. 2024 for Hopper (arXiv:2407.08608).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from embedstream.consumer.faults import Fault, fault_of
from embedstream.shared.logs import get_logger

from .attention import Pattern, register
from .layout import Layout

log = get_logger()

_AMPERE, _HOPPER, _BLACKWELL = 8, 9, 10
"""Compute capability, its first number."""
_MOST_HEAD_DIM = 256
_HEAD_DIM_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class Call:
    """What a kernel is told beside its tensors.

    Args:
        cumulative: (n + 1,) int32 on the device: where each sequence begins, and the end of the last one.
        max_length: tokens of the longest sequence, or more.
        window: tokens seen before and behind each one; -1 for all.
        scale: factor of the scores.
        soft_cap: scores are bent to lie between minus and plus this number; 0 where they are not.
    """

    cumulative: Tensor
    max_length: int
    window: tuple[int, int]
    scale: float
    soft_cap: float


@dataclass(frozen=True, slots=True)
class VarlenKernel:
    """Attention over packed sequences.

    Args:
        name: for logs.
        run: (query, key, value, call) to (total, heads, head_dim).
        capabilities: first numbers of the compute capability that it runs on.
        soft_caps: whether it bends scores.
    """

    name: str
    run: Callable[[Tensor, Tensor, Tensor, Call], Tensor]
    capabilities: range
    soft_caps: bool


class CudaAttention:
    """Chooses among kernels; the first one that can do it does it.

    Args:
        kernels: fastest first.
        capability: the first number of a device's compute capability.
    """

    def __init__(self, kernels: Sequence[VarlenKernel], capability: Callable[[torch.device], int]) -> None:
        self._kernels = kernels
        self._capability = capability
        self._refused: set[tuple[str, object]] = set()

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, pattern: Pattern, scale: float
    ) -> Tensor | None:
        """See `attention.attend`; None where no kernel can do it."""
        if not _fits(query, value):
            return None
        window = tuple(-1 if size is None else size for size in (pattern.left, pattern.right))
        cumulative = layout.cumulative(query.device)
        call = Call(cumulative, layout.max_length, (window[0], window[1]), scale, pattern.soft_cap or 0.0)
        # What a kernel refuses, it refuses for all batches of a model: so it is asked once.
        kind = (query.device, query.dtype, query.shape[1:], key.shape[1:], pattern)
        for kernel in self._kernels:
            if self._may(kernel, query.device, pattern) and (kernel.name, kind) not in self._refused:
                try:
                    return kernel.run(query, key, value, call)
                except Exception as error:
                    if fault_of(error) is not Fault.INPUT:  # too little memory, or a device that is lost
                        raise
                    self._refused.add((kernel.name, kind))
                    log.info("attention.kernel_refused", kernel=kernel.name, error=str(error).partition("\n")[0])
        return None

    def _may(self, kernel: VarlenKernel, device: torch.device, pattern: Pattern) -> bool:
        return self._capability(device) in kernel.capabilities and (pattern.soft_cap is None or kernel.soft_caps)


def _fits(query: Tensor, value: Tensor) -> bool:
    """Whether the kernels take these tensors: of key and query the shapes are equal anyway."""
    head_dim = query.shape[-1]
    return (
        query.dtype in (torch.float16, torch.bfloat16)
        and value.shape[-1] == head_dim <= _MOST_HEAD_DIM
        and head_dim % _HEAD_DIM_MULTIPLE == 0
    )


def find_kernels() -> list[VarlenKernel]:
    """The kernels that are installed, fastest first."""
    found = []
    for name, module, capabilities in (
        ("flash-attn 3", "flash_attn_interface", range(_HOPPER, _BLACKWELL)),
        ("flash-attn 2", "flash_attn", range(_AMPERE, 1000)),
    ):
        function = _installed(module, "flash_attn_varlen_func")
        if function is not None:
            found.append(VarlenKernel(name, partial(_run_flash_attn, function), capabilities, soft_caps=True))
    function = _installed("torch.nn.attention.varlen", "varlen_attn")
    if function is not None:
        found.append(VarlenKernel("torch", of_torch(function), range(_AMPERE, 1000), soft_caps=False))
    return found


def _installed(module: str, name: str) -> Callable[..., Any] | None:
    if find_spec(module) is None:
        return None
    try:
        function: Callable[..., Any] | None = getattr(import_module(module), name, None)
    except (ImportError, OSError) as error:  # built for another torch: its library finds no symbols
        log.warning("attention.kernel_broken", module=module, error=str(error).partition("\n")[0])
        return None
    return function


def _run_flash_attn(function: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
    result = function(
        query,
        key,
        value,
        cu_seqlens_q=call.cumulative,
        cu_seqlens_k=call.cumulative,
        max_seqlen_q=call.max_length,
        max_seqlen_k=call.max_length,
        softmax_scale=call.scale,
        causal=call.window[1] == 0,
        window_size=call.window,
        softcap=call.soft_cap,
    )
    output: Tensor = result[0] if isinstance(result, tuple) else result  # early versions of 3 give the sums as well
    return output


def of_torch(function: Callable[..., Any]) -> Callable[[Tensor, Tensor, Tensor, Call], Tensor]:
    """A kernel of torch's `varlen_attn`, whose causal attention is a window without a right side.

    Torch 2.11 runs grouped heads without a word; later versions want to be told.
    """
    told = "enable_gqa" in inspect.signature(function).parameters

    def run(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
        grouped = {"enable_gqa": True} if told and query.shape[1] != key.shape[1] else {}
        lengths = (call.cumulative, call.cumulative, call.max_length, call.max_length)
        output: Tensor = function(query, key, value, *lengths, scale=call.scale, window_size=call.window, **grouped)
        return output

    return run


@cache
def install() -> None:
    """Let packed batches on CUDA devices run by the kernels that are installed; once in a process."""
    register("cuda", CudaAttention(find_kernels(), lambda device: torch.cuda.get_device_capability(device)[0]))
