from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import structlog
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from embedstream.consumer.encoders.bert import BertEncoder
from embedstream.consumer.encoders.encoder import Ids
from embedstream.consumer.encoders.guarded import guarded
from embedstream.consumer.encoders.padded import EqualLengths, Padded
from embedstream.consumer.model import Model

LENGTHS = np.array([7, 2, 2, 5])
IDS = np.random.default_rng(0).integers(5, 40, LENGTHS.sum()).astype(np.uint32)


class Fails:
    """An encoder that cannot do what was never tried."""

    name = "hasty"
    fills_up = False

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __call__(self, ids: Ids, lengths: Ids) -> Tensor:
        raise self._error


class Works(Fails):
    def __call__(self, ids: Ids, lengths: Ids) -> Tensor:
        return torch.full((len(ids), 3), 7.0)


@pytest.fixture
def module() -> Any:
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    kind: Any = BertModel
    return kind(BertConfig(**sizes, vocab_size=40, max_position_embeddings=16)).eval()


def run(encoder: Any, ids: Ids = IDS) -> tuple[Tensor, list[Any]]:
    with torch.inference_mode(), structlog.testing.capture_logs() as logs:
        return encoder(ids, LENGTHS), logs


def test_a_batch_that_only_the_encoder_fails_at_is_computed_by_the_model_without_padding(module: Any) -> None:
    asked: list[tuple[int, ...]] = []
    module.register_forward_pre_hook(
        lambda _, args, kwargs: asked.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    hidden, (entry,) = run(guarded(Fails(ValueError("never tried: a text")), module))
    assert sorted(asked) == [(1, 5), (1, 7), (2, 2)]  # by the shape of what the model got
    torch.testing.assert_close(hidden, run(Padded(module))[0], atol=1e-5, rtol=0)
    assert entry == {**entry, "event": "encoder.failed", "encoder": "hasty", "rows": 4, "tokens": 16}
    assert entry["error"] == "ValueError"
    assert "a text" not in str(entry)


def test_what_the_model_fails_at_too_fails_as_its_own_error(module: Any) -> None:
    with pytest.raises(IndexError):
        run(guarded(Fails(ValueError()), module), IDS + 100)


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: launch failure")]
)
def test_no_way_leads_round_a_lack_of_memory_or_a_lost_device(module: Any, error: Exception) -> None:
    with pytest.raises(type(error)):
        run(guarded(Fails(error), module))


def test_it_is_the_encoder_as_long_as_that_works(module: Any) -> None:
    encoder = guarded(Works(ValueError()), module)
    hidden, logs = run(encoder)
    assert (hidden == 7).all()
    assert logs == []
    assert (encoder.name, encoder.fills_up) == ("hasty", False)


def test_the_model_itself_needs_no_guard(module: Any) -> None:
    for encoder in (Padded(module), EqualLengths(Padded(module))):
        assert guarded(encoder, module) is encoder


def test_a_model_has_one(minilm: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, lengths = IDS + 1000, LENGTHS
    expected = minilm.forward(ids, lengths)

    def fails(*_: object) -> Tensor:
        raise NotImplementedError

    monkeypatch.setattr(BertEncoder, "run", fails)
    with structlog.testing.capture_logs() as logs:
        torch.testing.assert_close(minilm.forward(ids, lengths), expected, atol=1e-5, rtol=0)
    assert [entry["event"] for entry in logs] == ["encoder.failed"]
