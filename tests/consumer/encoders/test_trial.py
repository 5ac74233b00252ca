"""The trial of encoders: what it holds, and what it sees that half formats could hide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from embedstream.consumer.encoders import packed
from embedstream.consumer.encoders.attention import attend
from embedstream.consumer.encoders.encoder import Ids
from embedstream.consumer.encoders.linear import SIZES, size_of
from embedstream.consumer.encoders.packed import Packed
from embedstream.consumer.encoders.trial import Trial
from embedstream.consumer.model import Model

TABLE, PAD, LONGEST = 512, 3, 256
IDS, LENGTHS = np.concatenate([np.arange(5, 9), np.arange(10, 10 + LONGEST)]), np.array([4, LONGEST])
HALVES = (torch.bfloat16, torch.float16)


def made(**others: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    options = {"vocab_size": 300, "max_position_embeddings": TABLE, "pad_token_id": PAD, **sizes, **others}
    kind: Any = BertModel
    module: torch.nn.Module = kind(BertConfig(**options)).eval()
    return module


@pytest.fixture(autouse=True)
def _in_inference_mode() -> Iterator[None]:
    with torch.inference_mode():
        yield


def test_it_has_every_kind_of_sequence_and_batches_of_all_sizes() -> None:
    trial = Trial(made(), IDS, LENGTHS)
    lengths = [len(row) for row in trial.rows]
    assert lengths[:2] == LENGTHS.tolist()
    assert {1, LONGEST} <= set(lengths)
    assert len(set(lengths)) < len(lengths)
    assert np.concatenate(trial.rows[:2]).tolist() == IDS.tolist()  # and no padding token, which others have
    assert PAD in np.concatenate(trial.rows[2:])
    whole, *smaller = trial.batches
    assert whole == list(range(len(trial.rows)))
    assert TABLE < sum(lengths) <= TABLE + LONGEST
    steps = np.diff(lengths)
    assert (steps < 0).any()
    assert (steps > 0).any()
    assert {size_of(sum(lengths[place] for place in places)) for places in trial.batches} == set(range(len(SIZES)))
    assert smaller[0] == [lengths.index(1)]


@pytest.mark.parametrize(("table", "beyond"), [(64, True), (840, True), (860, False), (100_000, False)])
def test_a_table_that_cannot_be_gone_beyond_costs_no_further_sequences(table: int, beyond: bool) -> None:
    trial = Trial(made(max_position_embeddings=max(table, LONGEST)), IDS, LENGTHS)
    lengths = [len(row) for row in trial.rows]
    assert (sum(lengths) > table) is beyond
    assert beyond or lengths.count(LONGEST) == 1


@pytest.mark.parametrize("longest", [1, 2, 5])
def test_models_that_read_next_to_nothing_have_one_as_well(longest: int) -> None:
    lengths = np.array([min(4, longest), longest])
    module = made(max_position_embeddings=64)
    trial = Trial(module, IDS[: lengths.sum()], lengths)
    assert max(map(len, trial.rows)) == longest
    assert trial.of(Packed(module, longest)).is_rounding(torch.float32)


class OneComponentOff:
    """As the model, but for a component that is small beside another one."""

    name = "off"
    fills_up = False

    def __init__(self, module: torch.nn.Module) -> None:
        self._packed = Packed(module, LONGEST)

    def __call__(self, ids: Ids, lengths: Ids) -> Tensor:
        hidden = self._packed(ids, lengths).clone()
        hidden[:, 1:8] *= 1.2
        return hidden


@pytest.mark.parametrize("dtype", HALVES)
def test_a_component_that_is_large_in_all_tokens_hides_nothing(dtype: torch.dtype) -> None:
    module: Any = made()
    module.encoder.layer[0].output.LayerNorm.bias[0] = 100.0  # as many models have one
    module.to(dtype)
    trial = Trial(module, IDS, LENGTHS)
    assert trial.of(Packed(module, LONGEST)).is_rounding(dtype)
    found = trial.of(OneComponentOff(module))
    assert found.component < 0.02
    assert not found.is_rounding(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # the finest and the coarsest
def test_scores_a_tenth_too_large_show_in_minilm(
    dtype: torch.dtype, minilm: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind: Any = BertModel
    module = kind(minilm._modules[""].config, add_pooling_layer=False).eval()
    module.load_state_dict(minilm._modules[""].state_dict(), strict=False)
    module.to(dtype)
    trial = Trial(module, *minilm._probe())
    encoder = Packed(module, LONGEST)
    assert trial.of(encoder).is_rounding(dtype)
    monkeypatch.setattr(packed, "attend", lambda *args, scale, **others: attend(*args, scale=1.1 * scale, **others))
    assert not trial.of(encoder).is_rounding(dtype)


def test_what_is_no_number_differs_without_limit() -> None:
    class Nothing(OneComponentOff):
        def __call__(self, ids: Ids, lengths: Ids) -> Tensor:
            return super().__call__(ids, lengths) * (torch.nan if len(ids) == 1 else 1)

    module = made()
    found = Trial(module, IDS, LENGTHS).of(Nothing(module))
    assert (found.component, found.token) == (torch.inf, torch.inf)
    assert str(found) == "hidden states differ by inf in a component, by inf in a token"
