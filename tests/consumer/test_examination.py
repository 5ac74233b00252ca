from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs
from torch import Tensor

from embedstream.consumer.examination import Check, Examination, State, examine, told_by_loader
from embedstream.consumer.model import Model
from embedstream.shared.settings import Dtype, PoolingName, Settings


def settings(folder: Path, **changes: Any) -> Settings:
    return Settings(**{"model": str(folder), "dtype": Dtype.FLOAT32, "device": "cpu", "threads": 1, **changes})


def examined(folder: Path, **changes: Any) -> Examination:
    steps: list[str] = []
    found, _ = examine(settings(folder, **changes), steps.append)
    assert steps[0] == f"loading {folder}"
    return found


def check(found: Examination, name: str) -> Check:
    (one,) = [check for check in found.checks if check.name == name]
    return one


def test_a_good_model(tiny_bert: Callable[..., Path]) -> None:
    folder = tiny_bert("mean")
    found = examined(folder)
    assert found.passed
    assert [check.state for check in found.checks] == [State.OK] * 4
    assert found.facts["files"]["path"] == str(folder)
    assert {"pooling": "mean", "pooling_source": "modules.json", "normalize": True, "dimension": 32}.items() <= (
        found.facts["recipe"].items()
    )
    assert found.facts["recipe"]["special_tokens"] == "[CLS] … [SEP]"
    assert found.facts["recipe"]["max_length"] == 48
    assert found.facts["recipe"]["max_length_source"] == "sentence-transformers' settings (max_seq_length)"
    assert found.facts["files"]["origin"] == "folder"
    assert found.facts["architecture"]["class"] == "BertModel"
    weights = load_file(folder / "model.safetensors")
    numbers = sum(tensor.numel() for name, tensor in weights.items() if not name.startswith("pooler."))
    assert found.facts["architecture"]["parameters"] == numbers
    assert found.facts["timings"]["tokens_per_s"] > 0
    assert check(found, "finite vectors").found == "35 of 35 built-in texts, up to 48 tokens"


def test_the_names_are_those_of_the_log(tiny_bert: Callable[..., Path]) -> None:
    with capture_logs() as logged:
        found = examined(tiny_bert("mean"))
    (loaded,) = [line for line in logged if line["event"] == "model.loaded"]
    said = {name: value for section in found.facts.values() for name, value in section.items()}
    names = set(loaded) - {"event", "log_level"}
    assert names <= set(said)
    differ = [name for name in sorted(names - {"load_s"}) if json.dumps(said[name]) != json.dumps(loaded[name])]
    assert differ == []


def test_a_decoder(tiny_decoder: Callable[..., Path]) -> None:
    folder = tiny_decoder()
    assert examined(folder).facts["recipe"]["max_length_source"] == "tokenizer_config.json (model_max_length)"
    found = examined(folder, max_model_len=40)
    assert found.passed
    assert found.facts["recipe"]["special_tokens"] == "… <|endoftext|>"
    assert found.facts["recipe"]["max_length_source"] == "--max-model-len"


def test_a_model_served_with_vectors_of_tokens(tiny_bert: Callable[..., Path]) -> None:
    found = examined(tiny_bert("mean"), pooling=PoolingName.ALL)
    assert found.passed
    assert check(found, "recipe") == Check(
        "recipe", State.WARNING, "pooling all from --pooling, whatever the files say"
    )


def test_a_half_format_is_compared_with_float32(tiny_bert: Callable[..., Path]) -> None:
    found = examined(tiny_bert("mean"), dtype=Dtype.FLOAT16)
    assert found.passed
    assert "wanted in float16" in check(found, "alone and together").found
    numbers = check(found, "float16").numbers
    assert 0.999 <= numbers["cosine"] <= numbers["mean_cosine"] < 1


def test_a_half_format_that_loses_too_much(tiny_bert: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Model.forward

    def rough(self: Model, *batch: Any) -> Tensor:
        hidden = forward(self, *batch)
        return hidden.round() if self.dtype == "bfloat16" else hidden

    monkeypatch.setattr(Model, "forward", rough)
    found = examined(tiny_bert("mean"), dtype=Dtype.BFLOAT16)
    assert not found.passed
    assert check(found, "bfloat16").remedy == "serve it with --dtype float32, or with another half format"


def test_a_vector_that_is_not_finite(tiny_bert: Callable[..., Path]) -> None:
    folder = tiny_bert("mean")
    weights = load_file(folder / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("word_embeddings.weight")]
    unknown = 1  # what other scripts and emoji become
    weights[name][unknown] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    failed = check(examined(folder), "finite vectors")
    assert failed.state is State.FAILED
    assert failed.found.endswith("The model computed a vector that is not finite (NaN or infinity).")


def test_batches_that_change_vectors(tiny_bert: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Model.forward

    def leaking(self: Model, ids: NDArray[np.integer], lengths: NDArray[np.integer], *others: Any) -> Tensor:
        hidden = forward(self, ids, lengths, *others)
        return hidden + 1e-3 * (len(lengths) - 1) * hidden.roll(1, -1)

    monkeypatch.setattr(Model, "forward", leaking)
    failed = check(examined(tiny_bert("mean")), "alone and together")
    assert failed.state is State.FAILED
    assert failed.numbers["error"] > 3e-6


def test_a_recipe_that_is_a_guess(tiny_bert: Callable[..., Path]) -> None:
    folder = tiny_bert("mean")
    (folder / "modules.json").unlink()
    found = examined(folder)
    assert found.passed
    guessed = check(found, "recipe")
    assert guessed.state is State.WARNING
    assert "no modules.json" in guessed.found
    assert "--pooling" in guessed.remedy


def test_a_tokenizer_that_is_much_too_small(tiny_bert: Callable[..., Path]) -> None:
    folder = tiny_bert("mean")
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("word_embeddings.weight")]
    weights[name] = weights[name].repeat(3, 1)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": len(weights[name])}))
    doubtful = check(examined(folder), "tokenizer")
    assert doubtful.state is State.WARNING
    assert "it may be another model's" in doubtful.found


def test_warnings_of_the_loader_are_checks_once_each() -> None:
    left_out = {"event": "adapter.left_out", "adapter": "mine", "reason": "no adapter_model.safetensors"}
    pickled = {"event": "model.pickled_weights", "path": "/m/2_Dense", "advice": "save the model again"}
    checked = {"event": "model.pooling_assumed", "pooling": "mean"}
    assert told_by_loader([left_out, checked, pickled, left_out]) == [
        Check("adapter.left_out", State.WARNING, "adapter mine, reason no adapter_model.safetensors"),
        Check("model.pickled_weights", State.WARNING, "path /m/2_Dense", "save the model again"),
    ]
