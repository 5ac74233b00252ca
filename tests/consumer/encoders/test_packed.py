from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    Qwen2Config,
    Qwen2Model,
    RobertaConfig,
    RobertaModel,
)

from embedstream.consumer.encoders.encoder import Ids
from embedstream.consumer.encoders.packed import Packed
from embedstream.consumer.encoders.padded import Padded
from embedstream.consumer.encoders.patterns import CannotPackError

POSITIONS = 24
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 50,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.5,
}
LENGTHS = np.array([5, 20, 1, 5, 13, 20, 2])


def made(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return kind(config).eval()


def bert() -> Any:
    return made(BertModel, BertConfig(**SIZES))


def alone(module: torch.nn.Module, ids: Ids, lengths: Ids = LENGTHS) -> torch.Tensor:
    padded = Padded(module)
    with torch.inference_mode():
        return torch.cat([padded(row, np.array([len(row)])) for row in np.split(ids, np.cumsum(lengths)[:-1])])


def ids_of(lengths: Ids = LENGTHS) -> Ids:
    ids: Ids = np.random.default_rng(0).integers(5, 50, lengths.sum()).astype(np.uint32)
    return ids


def same(packed: Packed, module: torch.nn.Module, ids: Ids, lengths: Ids = LENGTHS) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(packed(ids, lengths), alone(module, ids, lengths), atol=1e-5, rtol=0)


def test_a_batch_may_hold_more_tokens_than_the_model_has_positions() -> None:
    module = bert()
    assert LENGTHS.sum() > 2 * POSITIONS
    same(Packed(module, POSITIONS), module, ids_of())


def test_a_padding_token_that_a_text_spells_has_no_place_in_positions_of_roberta() -> None:
    module = made(RobertaModel, RobertaConfig(**SIZES, pad_token_id=1))
    ids = ids_of()
    ids[[0, 7, 8, 25, 31, 64]] = 1  # first, in the middle and last of sequences, and a whole one
    same(Packed(module, POSITIONS - 2), module, ids)


def test_a_window_is_met_by_a_longer_sequence() -> None:
    config = Qwen2Config(**SIZES, num_key_value_heads=1, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    module = made(Qwen2Model, config)
    assert config.layer_types == ["full_attention", "sliding_attention"]
    same(Packed(module, POSITIONS), module, ids_of())


def test_the_module_keeps_its_own_attention_between_calls_and_after_errors() -> None:
    module = bert()
    packed, padded = Packed(module, POSITIONS), Padded(module)
    before, ids = module.config._attn_implementation, ids_of()
    with torch.inference_mode():
        expected = padded(ids, LENGTHS)
        packed(ids, LENGTHS)
        assert module.config._attn_implementation == before
        assert torch.equal(padded(ids, LENGTHS), expected)
        with pytest.raises(IndexError):  # no such token
            packed(ids + 1000, LENGTHS)
    assert module.config._attn_implementation == before


def test_modules_that_share_a_configuration_do_not_notice() -> None:
    module = bert()
    other = made(BertModel, module.config)
    ids = ids_of()
    before = alone(other, ids)
    with torch.inference_mode():
        Packed(module, POSITIONS)(ids, LENGTHS)
    assert torch.equal(alone(other, ids), before)
    same(Packed(other, POSITIONS), other, ids)


def test_token_types_are_not_words_where_there_is_no_table_of_them() -> None:
    module = made(GPT2Model, GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=POSITIONS))
    same(Packed(module, POSITIONS), module, ids_of())


class TakesNoPositions(torch.nn.Module):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids


def test_a_model_that_takes_no_positions_is_refused() -> None:
    with pytest.raises(CannotPackError, match="no positions"):
        Packed(TakesNoPositions(), POSITIONS)


def test_relative_positions_in_scores_are_refused() -> None:
    module = bert()
    attention = module.encoder.layer[0].attention.self

    def with_bias(_: torch.nn.Module, args: object, kwargs: dict[str, object]) -> tuple[object, dict[str, object]]:
        return args, {**kwargs, "position_bias": torch.zeros(1)}

    attention.register_forward_pre_hook(with_bias, with_kwargs=True)
    with torch.inference_mode(), pytest.raises(CannotPackError, match="position_bias"):
        Packed(module, POSITIONS)(ids_of(), LENGTHS)
