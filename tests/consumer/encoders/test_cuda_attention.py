"""Attention on CUDA without CUDA: the kernels are replaced by a slow one that follows the libraries' own words."""

from __future__ import annotations

import inspect
import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from embedstream.consumer.encoders.attention import Pattern, Tuning, by_groups
from embedstream.consumer.encoders.cuda_attention import Call, CudaAttention, VarlenKernel, find_kernels, of_torch
from embedstream.consumer.encoders.layout import Layout

LENGTHS = np.array([9, 7, 7, 4, 1])
PATTERNS = [
    Pattern(),
    Pattern(right=0),
    Pattern(left=2, right=2),
    Pattern(left=3, right=0),
    Pattern(left=1, right=4),
]


def made(
    heads: int = 4, key_heads: int = 4, dim: int = 8, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    total = int(LENGTHS.sum())
    query, key, value = (
        torch.randn(total, count, dim, generator=generator).to(dtype) for count in (heads, key_heads, key_heads)
    )
    return query, key, value


def slow(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
    """Query by query, as flash-attn describes it: keys from i - left to i + right, both included, -1 for no bound."""
    output = torch.empty_like(query)
    group = query.shape[1] // key.shape[1]
    bounds = call.cumulative.tolist()
    assert call.cumulative.dtype == torch.int32
    for start, end in pairwise(bounds):
        assert end - start <= call.max_length
        for place in range(start, end):
            left, right = call.window
            first = start if left < 0 else max(start, place - left)
            last = end if right < 0 else min(end, place + right + 1)
            for head in range(query.shape[1]):
                keys, values = (part[first:last, head // group].double() for part in (key, value))
                scores = keys @ query[place, head].double() * call.scale
                if call.soft_cap:
                    scores = call.soft_cap * torch.tanh(scores / call.soft_cap)
                output[place, head] = (scores.softmax(0) @ values).to(output.dtype)
    return output


def kernel(name: str = "slow", run: Any = slow, *, soft_caps: bool = False) -> VarlenKernel:
    return VarlenKernel(name, run, range(8, 100), soft_caps)


def attention(*kernels: VarlenKernel, capability: int = 8) -> CudaAttention:
    return CudaAttention(kernels, lambda _: capability)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_windows_and_grouped_heads_mean_the_same_as_on_other_devices(pattern: Pattern, key_heads: int) -> None:
    query, key, value = made(key_heads=key_heads)
    layout = Layout(LENGTHS)

    output = attention(kernel())(query, key, value, layout, pattern=pattern, scale=0.3)

    expected = by_groups(query, key, value, layout, pattern=pattern, scale=0.3, tuning=Tuning())
    assert output is not None
    torch.testing.assert_close(output, expected, atol=0.02, rtol=0.02)


def test_scores_are_bent_by_a_kernel_that_can() -> None:
    query, key, value = made()
    layout, pattern = Layout(LENGTHS), Pattern(soft_cap=0.5)

    bending = attention(kernel(), kernel("other", soft_caps=True))
    output = bending(query, key, value, layout, pattern=pattern, scale=2.0)

    expected = by_groups(query, key, value, layout, pattern=pattern, scale=2.0, tuning=Tuning())
    assert output is not None
    torch.testing.assert_close(output, expected, atol=0.02, rtol=0.02)
    assert attention(kernel())(query, key, value, layout, pattern=pattern, scale=2.0) is None


@pytest.mark.parametrize(
    ("tensors", "capability"),
    [
        (made(dtype=torch.float32), 8),
        (made(dim=12), 8),
        (made(dim=264), 8),
        (made(), 7),
        ((*made()[:2], torch.zeros(28, 4, 16, dtype=torch.bfloat16)), 8),
    ],
    ids=["float32", "heads of 12", "heads of 264", "before Ampere", "values of another size"],
)
def test_what_the_kernels_cannot_do_is_left_to_others(tensors: tuple[Tensor, Tensor, Tensor], capability: int) -> None:
    answer = attention(kernel(run=_fail), capability=capability)

    assert answer(*tensors, Layout(LENGTHS), pattern=Pattern(), scale=1.0) is None


def _fail(*_: Any) -> Tensor:
    pytest.fail("was asked")


def test_a_kernel_that_refuses_is_asked_once() -> None:
    asked = []

    def refuse(*_: Any) -> Tensor:
        asked.append(1)
        raise RuntimeError("no head_dim of 8 here")

    both = attention(kernel("first", refuse), kernel("second"))
    for _ in range(3):
        assert both(*made(), Layout(LENGTHS), pattern=Pattern(), scale=1.0) is not None

    assert len(asked) == 1


@pytest.mark.parametrize("words", ["CUDA out of memory", "CUDA error: an illegal memory access was encountered"])
def test_too_little_memory_is_no_refusal(words: str) -> None:
    def fail(*_: Any) -> Tensor:
        raise RuntimeError(words)

    with pytest.raises(RuntimeError, match=words):
        attention(kernel(run=fail), kernel("second"))(*made(), Layout(LENGTHS), pattern=Pattern(), scale=1.0)


def test_torch_has_the_kernel_with_the_arguments_that_are_given() -> None:
    call = Call(torch.zeros(3, dtype=torch.int32), 5, (-1, 0), 0.25, 0.0)
    given: dict[str, Any] = {}

    def noted(*tensors: Any, **options: Any) -> Tensor:
        given.update(inspect.signature(varlen_attn).bind(*tensors, **options).arguments)
        return torch.zeros(())

    noted.__signature__ = inspect.signature(varlen_attn)  # type: ignore[attr-defined]  # inspect documents it
    of_torch(noted)(*made(key_heads=2), call)

    assert given["cu_seq_q"] is given["cu_seq_k"] is call.cumulative
    assert (given["max_q"], given["max_k"], given["scale"], given["window_size"]) == (5, 5, 0.25, (-1, 0))
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        assert given["enable_gqa"] is True


def test_torch_2_11_is_not_told_of_grouped_heads() -> None:
    def of_2_11(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        return_aux: Any = None,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        return slow(query, key, value, Call(cu_seq_q, max_q, window_size, scale or 1.0, 0.0))

    call = Call(Layout(LENGTHS).cumulative(torch.device("cpu")), 9, (-1, -1), 0.5, 0.0)

    output = of_torch(of_2_11)(*made(key_heads=2), call)

    assert torch.equal(output, slow(*made(key_heads=2), call))


def test_flash_attn_is_preferred_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def flash_attn_varlen_func(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        given.update(options)
        return query, query

    for name in ("flash_attn", "flash_attn_interface"):
        module = ModuleType(name)
        module.__spec__ = sys.__spec__
        module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)

    kernels = find_kernels()
    query, key, value = made()
    call = Call(torch.zeros(3, dtype=torch.int32), 5, (7, 0), 0.25, 30.0)

    assert [kernel.name for kernel in kernels] == ["flash-attn 3", "flash-attn 2", "torch"]
    assert [kernel.soft_caps for kernel in kernels] == [True, True, False]
    assert [8 in kernel.capabilities for kernel in kernels] == [False, True, True]
    assert [10 in kernel.capabilities for kernel in kernels] == [False, True, True]
    assert kernels[0].run(query, key, value, call) is query
    assert given["causal"]
    assert (given["window_size"], given["softcap"], given["max_seqlen_k"]) == ((7, 0), 30.0, 5)


def test_a_flash_attn_that_was_built_for_another_torch_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c104cuda')")
    monkeypatch.syspath_prepend(tmp_path)

    assert [kernel.name for kernel in find_kernels()] == ["torch"]
