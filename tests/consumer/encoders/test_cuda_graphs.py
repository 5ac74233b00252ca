"""Graphs of small batches without CUDA: a replay calls again what was captured, with the tensors of then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor
from transformers import BertConfig, BertModel, ModernBertConfig, ModernBertModel, XLMRobertaConfig, XLMRobertaModel

from embedstream.consumer.copies import copies_of
from embedstream.consumer.encoders import attention, cuda_graphs
from embedstream.consumer.encoders.attention import Pattern
from embedstream.consumer.encoders.cuda_attention import Call
from embedstream.consumer.encoders.cuda_graphs import Bounds, Graphed, Packable, with_graphs
from embedstream.consumer.encoders.layout import Layout
from embedstream.consumer.encoders.packed import Packed
from embedstream.consumer.encoders.padded import Padded

from .test_cuda_attention import slow

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 66,
}


class Again:
    """Stands for graphs of CUDA: nothing is looked at again but the tensors, as there."""

    def __init__(self, bytes_each: int = 100) -> None:
        self.captured = 0
        self.replayed = 0
        self._bytes_each = bytes_each

    def capture(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        hidden = run()
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            hidden.copy_(run())

        return replay, hidden

    def used_bytes(self) -> int:
        return self.captured * self._bytes_each


@pytest.fixture(autouse=True)
def _kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that takes lengths as tensors, as CUDA's kernels do."""

    def attend(query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, pattern: Pattern, scale: float) -> Tensor:
        left, right = (-1 if size is None else size for size in (pattern.left, pattern.right))
        return slow(query, key, value, Call(layout.cumulative(CPU), layout.max_length, (left, right), scale, 0.0))

    monkeypatch.setitem(attention._OF_DEVICE, "cpu", attend)


def bert() -> torch.nn.Module:
    return BertModel(BertConfig(**SIZES), add_pooling_layer=False)


def roberta() -> torch.nn.Module:
    return XLMRobertaModel(XLMRobertaConfig(**SIZES, pad_token_id=1), add_pooling_layer=False)


def modernbert() -> torch.nn.Module:
    layer_types = ["full_attention", "sliding_attention"]
    return ModernBertModel(ModernBertConfig(**SIZES, pad_token_id=0, local_attention=8, layer_types=layer_types))


@pytest.fixture
def encoder(request: pytest.FixtureRequest) -> Packed:
    torch.manual_seed(3)
    return Packed(getattr(request, "param", bert)().eval(), 64)


def made(lengths: list[int]) -> tuple[Any, Any]:
    return np.random.default_rng(5).integers(2, 40, sum(lengths)), np.array(lengths)


def graphed(encoder: Packable, capturing: Again, *, tokens: int = 64, memory_bytes: int = 10**6) -> Graphed:
    return Graphed(encoder, Bounds(tokens, memory_bytes, 64), CPU, capturing)


@pytest.mark.parametrize("encoder", [bert, roberta, modernbert], indirect=True)
@pytest.mark.parametrize("lengths", [[16], [3, 2, 1, 1], [1], [5, 30, 2], [33, 31]])
def test_a_replay_gives_what_the_encoder_gives(encoder: Packed, lengths: list[int]) -> None:
    ids, array = made(lengths)
    capturing = Again()
    both = graphed(encoder, capturing)
    before = capturing.replayed

    with torch.inference_mode():
        hidden, expected = both(ids, array), encoder(ids, array)

    assert capturing.replayed == before + 1
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)


def test_results_stay_when_the_graph_runs_again(encoder: Packed) -> None:
    both = graphed(encoder, Again())
    with torch.inference_mode():
        first = both(*made([11]))
        kept = first.clone()
        both(*made([2, 9]))

    assert torch.equal(first, kept)


def test_sizes_double_and_what_is_larger_or_of_too_many_sequences_runs_as_before(encoder: Packed) -> None:
    capturing = Again()
    both = graphed(encoder, capturing)
    before = capturing.replayed
    with torch.inference_mode():
        both(*made([40, 25]))  # 65 tokens
        both(*made([1] * 20))  # 64 tokens have room for 17 sequences

    assert capturing.captured == 3
    assert both.most_tokens == 64
    assert capturing.replayed == before
    assert both.name == "packed, graphs to 64 tokens"


def test_many_short_sequences_take_a_larger_size(encoder: Packed) -> None:
    capturing = Again()
    both = graphed(encoder, capturing)
    before = capturing.replayed
    ids, lengths = made([1] * 8)  # 16 tokens have room for 5
    with torch.inference_mode():
        hidden, expected = both(ids, lengths), encoder(ids, lengths)

    assert capturing.replayed == before + 1
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)


def test_memory_bounds_what_is_captured(encoder: Packed) -> None:
    capturing = Again()
    assert graphed(encoder, capturing, memory_bytes=250).most_tokens == 32
    assert capturing.captured == 2  # what would not fit is not even tried: its memory would stay taken
    assert graphed(encoder, Again(), memory_bytes=50).most_tokens == 0
    assert graphed(encoder, Again(), tokens=8).most_tokens == 0


def test_attention_that_looks_at_lengths_on_the_host_is_not_captured(
    encoder: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(attention._OF_DEVICE, "cpu")
    both = graphed(encoder, Again())
    ids, lengths = made([11])
    with torch.inference_mode():
        assert torch.equal(both(ids, lengths), encoder(ids, lengths))

    assert both.most_tokens == 0
    assert both.name == "packed"


@pytest.mark.parametrize("rubbish", [False, True])
def test_a_graph_that_computes_something_else_is_not_used(rubbish: bool, encoder: Packed) -> None:
    class Forgetful(Again):
        def capture(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
            _, hidden = super().capture(run)
            return (lambda: hidden.fill_(torch.nan)) if rubbish else (lambda: None), hidden  # type: ignore[return-value]

    assert graphed(encoder, Forgetful()).most_tokens == 0


def test_attention_that_wants_lengths_elsewhere_is_not_captured(
    encoder: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, pattern: Pattern, scale: float) -> Tensor:
        del key, pattern, scale
        layout.cumulative(torch.device("meta"))
        return query + value

    monkeypatch.setitem(attention._OF_DEVICE, "cpu", attend)
    with capture_logs() as logs:
        assert graphed(encoder, Again()).most_tokens == 0
    assert "meta" in logs[0]["reason"]


@pytest.mark.parametrize(("max_length", "most_tokens"), [(3, 0), (4, 64), (7, 64), (8, 64)])
def test_sequences_too_short_to_fill_a_graph_are_not_captured(
    max_length: int, most_tokens: int, encoder: Packed
) -> None:
    with capture_logs() as logs:
        both = Graphed(encoder, Bounds(64, 10**6, max_length), CPU, Again())
    assert both.most_tokens == most_tokens
    assert ("too short" in logs[0].get("reason", "")) is (most_tokens == 0)


def test_a_lost_device_ends_it_and_what_cannot_be_captured_does_not(encoder: Packed) -> None:
    class Failing(Again):
        words = ""

        def capture(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
            if self.captured == 2:
                raise RuntimeError(self.words)
            return super().capture(run)

    for words in ("CUDA out of memory", "CUDA error: operation not permitted when stream is capturing"):
        failing = Failing()
        failing.words = words
        assert graphed(encoder, failing).most_tokens == 32
    failing = Failing()
    failing.words = "CUDA error: an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal"):
        graphed(encoder, failing)


def test_on_a_cpu_there_are_none(encoder: Packed) -> None:
    assert with_graphs(encoder, Bounds(64, 10**6, 64), CPU) is encoder


def test_on_cuda_there_are_none_without_sizes_or_for_padded_batches(
    encoder: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "CudaGraphs", lambda _: pytest.fail("nothing is to be captured"))
    padded = Padded(bert())
    assert with_graphs(padded, Bounds(64, 10**6, 64), torch.device("cuda")) is padded
    assert with_graphs(encoder, Bounds(8, 10**6, 64), torch.device("cuda")) is encoder


def test_an_encoder_of_which_nothing_could_be_captured_stays_as_it_is(
    encoder: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "CudaGraphs", lambda _: Again())
    monkeypatch.setattr(cuda_graphs, "copies_of", lambda _: copies_of(CPU))
    assert with_graphs(encoder, Bounds(64, 10**6, 64), torch.device("cuda")) is encoder  # there is no such device
