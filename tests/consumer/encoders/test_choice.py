from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, DebertaV2Config, DebertaV2Model, MobileBertConfig, MobileBertModel

from embedstream.consumer.encoders.choice import CANDIDATES, Maker, Wanted, choose_encoder
from embedstream.consumer.encoders.encoder import Encoder, Ids
from embedstream.consumer.encoders.packed import Packed
from embedstream.consumer.encoders.padded import EqualLengths, Padded
from embedstream.shared.settings import Settings

PAD = 3
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 60,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "pad_token_id": PAD,
}
LENGTHS = np.array([4, 40])
IDS = np.concatenate([np.arange(5, 9), np.arange(10, 50)])


class Nowhere:
    """Measurements of this process alone."""

    def get(self, name: str) -> None:
        return None

    def put(self, name: str, value: object) -> None:
        pass


def made(kind: Any, config: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    module: torch.nn.Module = kind(config).eval()
    return module


@pytest.fixture
def module() -> torch.nn.Module:
    return made(BertModel, BertConfig(**SIZES))


def wanted(module: torch.nn.Module) -> Wanted:
    return Wanted(module, 48, Nowhere(), Settings())


def choose(module: torch.nn.Module, *candidates: tuple[str, Maker], follows: bool = False) -> tuple[Encoder, list[Any]]:
    with structlog.testing.capture_logs() as logs:
        encoder = choose_encoder(
            wanted(module), IDS, LENGTHS, follows_longest=follows, candidates=candidates or CANDIDATES
        )
    return encoder, [entry for entry in logs if entry["event"] == "encoder.fell_back"]


class Changed:
    """A packed model whose hidden states are not what they should be."""

    name = "changed"
    fills_up = False

    def __init__(self, wanted: Wanted, change: Callable[[Tensor, Ids, Ids], Tensor]) -> None:
        self._packed = Packed(wanted.module, wanted.max_length)
        self._change = change
        self.batches: list[list[int]] = []

    def __call__(self, ids: Ids, lengths: Ids) -> Tensor:
        self.batches.append(lengths.tolist())
        return self._change(self._packed(ids, lengths), ids, lengths)


def changing(change: Callable[[Tensor, Ids, Ids], Tensor]) -> tuple[str, Maker]:
    return "changed", lambda wanted: Changed(wanted, change)


def packed(wanted: Wanted) -> Encoder:
    return Packed(wanted.module, wanted.max_length)


def test_the_first_that_agrees_is_taken(module: torch.nn.Module) -> None:
    encoder, fell_back = choose(module, ("of another kind", lambda _: None), ("packed", packed), ("unseen", fails))
    assert isinstance(encoder, Packed)
    assert fell_back == []


def fails(_: Wanted) -> Encoder:
    raise RuntimeError("no such thing")


def one_worse(hidden: Tensor, ids: Ids, lengths: Ids) -> Tensor:
    hidden = hidden.clone()
    hidden[-1, 0] += 2e-4 * hidden.abs().max()
    return hidden


def wrong_where_it_pads(hidden: Tensor, ids: Ids, lengths: Ids) -> Tensor:
    return hidden + 0.1 * torch.from_numpy(ids == PAD).unsqueeze(1)


def wrong_for_one_token(hidden: Tensor, ids: Ids, lengths: Ids) -> Tensor:
    return hidden + 0.1 * torch.from_numpy(np.repeat(lengths == 1, lengths)).unsqueeze(1)


def wrong_beyond_the_table(hidden: Tensor, ids: Ids, lengths: Ids) -> Tensor:
    return hidden + 0.1 if len(ids) > SIZES["max_position_embeddings"] else hidden


def wrong_where_few(hidden: Tensor, ids: Ids, lengths: Ids) -> Tensor:
    return hidden + 0.1 if 9 <= len(ids) <= 32 else hidden


def in_order_of_length(hidden: Tensor, ids: Ids, lengths: Ids) -> Tensor:
    rows = sorted(torch.split(hidden, lengths.tolist()), key=len)
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (one_worse, "differ by"),
        (wrong_where_it_pads, "differ by"),
        (wrong_for_one_token, "differ by"),
        (wrong_beyond_the_table, "differ by"),
        (wrong_where_few, "differ by"),
        (in_order_of_length, "differ by"),
        (lambda hidden, *_: hidden * torch.nan, "differ by inf"),
        (lambda hidden, *_: hidden[1:], "torch.float32 ("),
        (lambda hidden, *_: hidden.double(), "torch.float64"),
    ],
)
def test_one_that_differs_is_passed_over(
    module: torch.nn.Module, change: Callable[[Tensor, Ids, Ids], Tensor], reason: str
) -> None:
    encoder, fell_back = choose(module, changing(change), ("packed", packed))
    assert isinstance(encoder, Packed)
    (entry,) = fell_back
    assert entry == {**entry, "encoder": "changed", "model": "BertModel", "log_level": "info"}
    assert reason in entry["reason"]


def test_an_error_is_no_more_than_a_reason(module: torch.nn.Module) -> None:
    encoder, (entry,) = choose(module, ("broken", fails))
    assert isinstance(encoder, Padded)
    assert (entry["encoder"], entry["reason"]) == ("broken", "no such thing")


def test_half_formats_may_differ_by_what_they_round(module: torch.nn.Module) -> None:
    encoder, _ = choose(module.bfloat16(), ("packed", packed))
    assert isinstance(encoder, Packed)


def test_attention_of_its_own_makes_a_model_padded() -> None:
    config = DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"])
    encoder, (entry,) = choose(made(DebertaV2Model, config))
    assert isinstance(encoder, Padded)
    assert entry["reason"] == "it attends by code of its own"


def test_a_model_that_feels_its_neighbours_computes_equal_lengths_together() -> None:
    config = MobileBertConfig(**SIZES, embedding_size=16, intra_bottleneck_size=16)
    module: Any = made(MobileBertModel, config)
    torch.nn.init.normal_(module.embeddings.word_embeddings.weight[PAD].detach())  # published ones are not zero
    encoder, (entry,) = choose(module)
    assert isinstance(encoder, EqualLengths)
    assert "differ by" in entry["reason"]


def test_what_follows_the_longest_sequence_needs_no_trial(module: torch.nn.Module) -> None:
    encoder, fell_back = choose(module, ("unseen", fails), follows=True)
    assert isinstance(encoder, EqualLengths)
    assert fell_back == []
