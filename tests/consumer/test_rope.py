"""Models whose positions change with the longest text of a batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.parity import families, layout

from embedstream.consumer.model import Model
from embedstream.shared.errors import ModelLoadError
from embedstream.shared.settings import Dtype, Settings

TRAINED, LONGEST = 600, 700  # more than a warm-up tries
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 500.0}


def settings(folder: Path, **others: Any) -> Settings:
    return Settings(model=str(folder), served_model_name=("m",), dtype=Dtype.FLOAT32, device="cpu", threads=1, **others)


def make(folder: Path, name: str, rope: dict[str, Any], **fields: Any) -> Path:
    path = layout.write(next(family for family in families.FAMILIES if family.name == name), folder)
    config = {**json.loads((path / "config.json").read_text()), **fields, "rope_parameters": rope}
    (path / "config.json").write_text(json.dumps(config))
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": LONGEST}))
    return path


def test_long_rope_does_not_reach_the_neighbours(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": TRAINED}
    rope = {"rope_type": "longrope", "rope_theta": 500.0, **factors}
    path = make(tmp_path, "Phi-3", rope, max_position_embeddings=LONGEST, original_max_position_embeddings=TRAINED)
    model = Model.load(settings(path))
    row = np.resize(model.tokenizer.encode(["the queue of texts"]).ids, LONGEST)
    alone = model.forward(row[:400], np.array([400]))
    beside = model.forward(np.concatenate([row[:400], row]), np.array([400, LONGEST]))
    torch.testing.assert_close(beside[:400], alone, rtol=1e-5, atol=1e-5)
    assert Model.load(settings(path, max_model_len=TRAINED)).feels_padding is False


def test_dynamic_positions_are_refused_where_they_change(tmp_path: Path) -> None:
    path = make(tmp_path, "Qwen3", DYNAMIC, max_position_embeddings=TRAINED)
    with pytest.raises(ModelLoadError, match=r"\(rope_type dynamic\) beyond 600 tokens, .* set --max-model-len 600$"):
        Model.load(settings(path))
    assert Model.load(settings(path, max_model_len=TRAINED)).recipe.max_length == TRAINED
