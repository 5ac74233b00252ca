"""The CUDA paths on a CUDA device: kernels, copies, graphs, and the whole way of a text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from embedstream.consumer.copies import copies_of
from embedstream.consumer.direct import Direct
from embedstream.consumer.encoders.attention import Pattern, Tuning, by_groups
from embedstream.consumer.encoders.cuda_attention import CudaAttention, find_kernels, install
from embedstream.consumer.encoders.cuda_graphs import Bounds, Graphed, with_graphs, without_waiting
from embedstream.consumer.encoders.layout import Layout
from embedstream.consumer.encoders.packed import Packed
from embedstream.consumer.model import Model
from embedstream.shared.settings import Dtype, Settings

LENGTHS = np.array([300, 77, 77, 12, 5, 1, 1])
ERROR = {torch.float16: 0.01, torch.bfloat16: 0.06}
SIZES: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("key_heads", [8, 2])
@pytest.mark.parametrize(
    "pattern",
    [Pattern(), Pattern(right=0), Pattern(left=16, right=16), Pattern(left=32, right=0), Pattern(soft_cap=2.0)],
    ids=str,
)
def test_each_installed_kernel_attends_as_torch_does_by_groups(
    device: torch.device, dtype: torch.dtype, key_heads: int, pattern: Pattern
) -> None:
    torch.manual_seed(1)
    total = int(LENGTHS.sum())
    query, key, value = (torch.randn(total, heads, 32, device=device, dtype=dtype) for heads in (8, *[key_heads] * 2))
    layout = Layout(LENGTHS)
    major = torch.cuda.get_device_capability(device)[0]
    expected = by_groups(query, key, value, layout, pattern=pattern, scale=0.2, tuning=Tuning())
    tried = 0
    for kernel in find_kernels():
        attention = CudaAttention([kernel], lambda _: major)
        output = attention(query, key, value, layout, pattern=pattern, scale=0.2)
        if output is None:
            assert major not in kernel.capabilities or (pattern.soft_cap and not kernel.soft_caps), kernel.name
            continue
        tried += 1
        torch.testing.assert_close(output, expected, atol=ERROR[dtype], rtol=ERROR[dtype])
    assert tried or pattern.soft_cap or major < 8


def test_copies_arrive_whole_on_streams_of_their_own(device: torch.device) -> None:
    copies = copies_of(device)
    arrays = [np.random.default_rng(number).integers(0, 1000, 50_000) for number in range(20)]
    with without_waiting():
        fetches = [copies.to_host(copies.to_device(array) * 2) for array in arrays]

    for array, fetch in zip(arrays, fetches, strict=True):
        assert np.array_equal(fetch().numpy(), array * 2)


@pytest.fixture
def packed(device: torch.device) -> Packed:
    install()
    torch.manual_seed(2)
    module: torch.nn.Module = BertModel(BertConfig(**SIZES), add_pooling_layer=False)
    return Packed(module.eval().to(device, torch.float16), 512)


def made(lengths: list[int]) -> tuple[Any, Any]:
    return np.random.default_rng(4).integers(0, 400, sum(lengths)), np.array(lengths)


def test_small_batches_run_by_graphs_and_give_the_same(packed: Packed, device: torch.device) -> None:
    with torch.inference_mode():
        graphed = with_graphs(packed, Bounds(512, 2**30, 512), device)
        assert isinstance(graphed, Graphed)
        assert graphed.most_tokens == 512
        results = []
        for lengths in ([11], [1], [16], [100, 60, 9], [512], [300, 200, 5], [40, 30]):
            ids, array = made(lengths)
            results.append((graphed(ids, array), packed(ids, array)))
        for hidden, expected in results:  # compared at the end: a replay must not change what came before
            torch.testing.assert_close(hidden, expected, atol=0.02, rtol=0.02)


def test_a_pass_that_waits_for_the_device_is_not_captured_and_memory_can_still_be_freed(
    packed: Packed, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = packed.run

    def waiting(tokens: torch.Tensor, layout: Layout) -> torch.Tensor:
        hidden = run(tokens, layout)
        return hidden * float(hidden.isfinite().all())

    monkeypatch.setattr(packed, "run", waiting)
    assert with_graphs(packed, Bounds(64, 2**30, 512), device) is packed
    torch.cuda.empty_cache()
    ids, lengths = made([11, 5])
    with torch.inference_mode():
        assert packed(ids, lengths).isfinite().all()


def test_a_pass_is_launched_without_waiting_for_the_device(packed: Packed, device: torch.device) -> None:
    graphed = with_graphs(packed, Bounds(64, 2**30, 512), device)
    with torch.inference_mode():
        for lengths in ([11], [200, 100]):
            ids, array = made(lengths)
            graphed(ids, array)  # libraries set themselves up
            with without_waiting():
                graphed(ids, array)


@pytest.mark.parametrize("dtype", [Dtype.AUTO, Dtype.FLOAT32, Dtype.BFLOAT16])
def test_texts_get_the_vectors_that_they_get_on_a_cpu(dtype: Dtype) -> None:
    texts = ["a query", "hello " * 200, "x", *(f"text number {number} " * (number % 17 + 1) for number in range(60))]
    there = _vectors(Settings(model="all-MiniLM-L6-v2", dtype=dtype, device="cuda:0"), texts)
    here = _vectors(Settings(model="all-MiniLM-L6-v2", dtype=Dtype.FLOAT32, device="cpu"), texts)

    assert (there * here).sum(axis=1).min() > (0.99999 if dtype is Dtype.FLOAT32 else 0.999)


def _vectors(settings: Settings, texts: list[str]) -> Any:
    return np.stack(Direct(Model.load(settings), 4096).embed(texts).vectors)  # type: ignore[arg-type]  # none fails
