from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from safetensors.torch import load_file, save_file
from transformers import CanineConfig, CanineModel

from embedstream.consumer.model import Model
from embedstream.shared.errors import ModelLoadError
from embedstream.shared.settings import Dtype, Settings

MakeModel = Callable[..., Path]
VOCABULARY = 88


def doubts(path: Path) -> list[str]:
    with structlog.testing.capture_logs() as logs:
        Model.load(Settings(model=str(path), dtype=Dtype.FLOAT32, device="cpu", threads=1))
    return [entry["reason"] for entry in logs if entry["event"] == "model.tokenizer_doubtful"]


def configure(path: Path, **fields: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def enlarge(path: Path, rows: int) -> None:
    """Give the model more embeddings than its tokenizer has ids."""
    name = "embeddings.word_embeddings.weight"
    weights = load_file(path / "model.safetensors")
    weights[name] = torch.cat([weights[name], torch.zeros(rows - VOCABULARY, 32)])
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    configure(path, vocab_size=rows)


@pytest.mark.parametrize(
    "ends",
    [
        {},
        {"cls_token_id": 2, "sep_token_id": 3},
        {"bos_token_id": 2, "eos_token_id": [50, 3]},
        {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 60},
    ],
)
def test_a_configuration_that_names_the_tokenizers_ends_or_none(tiny_bert: MakeModel, ends: dict[str, Any]) -> None:
    path = tiny_bert()
    configure(path, **ends)
    assert doubts(path) == []


def test_ends_that_the_configuration_does_not_name(tiny_bert: MakeModel) -> None:
    path = tiny_bert()
    configure(path, bos_token_id=0, eos_token_id=3)
    (doubt,) = doubts(path)
    assert doubt == "it puts the ids 2, 3 around a text, config.json names 0, 3: it may be another model's"


@pytest.mark.parametrize(("rows", "doubtful"), [(VOCABULARY + 9, False), (VOCABULARY + 10, True)])
def test_a_tokenizer_that_knows_few_of_the_embeddings(tiny_bert: MakeModel, rows: int, doubtful: bool) -> None:
    path = tiny_bert()
    enlarge(path, rows)
    assert doubts(path) == ([f"it knows 88 ids, the model {rows}: it may be another model's"] if doubtful else [])


def test_a_model_without_embeddings_of_tokens(tiny_bert: MakeModel) -> None:
    path = tiny_bert()
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 32,
    }
    (path / "config.json").unlink()
    CanineModel(CanineConfig(**sizes, num_hash_functions=4, num_hash_buckets=16)).save_pretrained(path)
    configure(path, vocab_size=VOCABULARY)
    with pytest.raises(ModelLoadError, match=r"^CanineModel has no table of embeddings"):
        Model.load(Settings(model=str(path), dtype=Dtype.FLOAT32, device="cpu", threads=1))
