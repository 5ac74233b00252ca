"""The modules after the pooling, as sentence-transformers saves them, against its own answers."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from embedstream.consumer.direct import Direct
from embedstream.consumer.heads import build_head
from embedstream.consumer.model import Model
from embedstream.shared.errors import ModelLoadError
from embedstream.shared.head_files import ACTIVATIONS, Cut, Dense, LayerNorm, Normalize, read_steps
from embedstream.shared.module_files import read_modules
from embedstream.shared.options import VectorOptions
from embedstream.shared.settings import Dtype, Settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its imports, none of which is ours
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base import modules as base
    from sentence_transformers.sentence_transformer import modules as theirs

CPU = torch.device("cpu")
TEXTS = ["the queue", "a", "", "passport renewal procedure, 42!", "x" * 90]
MakeModel = Callable[..., Path]


def made(
    path: Path,
    steps: Sequence[nn.Module] = (),
    *,
    pooling: Any = "mean",
    include_prompt: bool = True,
    safe: bool = True,
    **options: Any,
) -> Path:
    """A saved model: a tiny BERT, a pooling and some steps with random weights."""
    torch.manual_seed(1)
    for step in steps:
        for weights in step.parameters():
            nn.init.normal_(weights, std=0.3)
    folder = path.with_name(f"{path.name}-with-head")
    modules = [base.Transformer(str(path)), theirs.Pooling(32, pooling, include_prompt), *steps]
    SentenceTransformer(modules=modules, device="cpu", **options).save_pretrained(
        str(folder), create_model_card=False, safe_serialization=True
    )
    for place, step in enumerate(steps, 2):
        if not safe and isinstance(step, (base.Dense, theirs.LayerNorm)):
            step.save(str(folder / f"{place}_{type(step).__name__}"), safe_serialization=False)
            (folder / f"{place}_{type(step).__name__}" / "model.safetensors").unlink()
    return folder


def load(path: Path) -> Model:
    return Model.load(Settings(model=str(path), dtype=Dtype.FLOAT32, device="cpu", threads=1))


def reference(path: Path) -> SentenceTransformer:
    return SentenceTransformer(str(path), device="cpu", local_files_only=True)


def assert_equal(path: Path, options: VectorOptions | None = None, **theirs: Any) -> None:
    """What a consumer answers, all texts in one batch, is what sentence-transformers makes of each alone."""
    ours, them = Direct(load(path), 512).embed(TEXTS, options=options), reference(path)
    expected = np.stack([them.encode(text, show_progress_bar=False, **theirs) for text in TEXTS])
    assert expected.std(0).mean() > 1e-3  # not a model that gives the same to all
    for one, other in zip(ours.vectors, expected, strict=True):
        assert one is not None
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * max(1, np.abs(other).max()))


def rewrite(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def dense(size: int, to: int, activation: nn.Module | None = None, **options: Any) -> base.Dense:
    return base.Dense(size, to, activation_function=activation or nn.Tanh(), **options)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize(
    ("pooling", "steps"),
    [
        ("mean", lambda: [dense(32, 8)]),
        ("cls", lambda: [dense(32, 48, nn.GELU(), bias=False), base.Normalize()]),
        (("cls", "mean"), lambda: [dense(64, 16, nn.Identity()), theirs.LayerNorm(16), dense(16, 4, nn.ReLU())]),
        ("max", lambda: [theirs.LayerNorm(32), theirs.Dropout(0.5)]),
        ("weightedmean", lambda: [base.Normalize(), dense(32, 32, nn.SiLU(), use_residual=True)]),
        ("mean_sqrt_len_tokens", lambda: [dense(32, 8, nn.Identity(), use_residual=True), base.Normalize()]),
        (("lasttoken", "max", "mean"), lambda: [base.Normalize(), theirs.Dropout(0.1)]),
    ],
    ids=lambda value: "+".join((value,) if isinstance(value, str) else value) if not callable(value) else "",
)
def test_heads_equal_sentence_transformers(
    tiny_bert: MakeModel, pooling: Any, steps: Callable[[], list[nn.Module]], safe: bool
) -> None:
    assert_equal(made(tiny_bert(), steps(), pooling=pooling, safe=safe))


@pytest.mark.parametrize("normalized", [True, False])
def test_cut_vectors_equal_sentence_transformers(tiny_bert: MakeModel, normalized: bool) -> None:
    path = made(tiny_bert(), [base.Normalize()] if normalized else [], truncate_dim=12)
    assert json.loads((path / "config_sentence_transformers.json").read_text())["truncate_dim"] == 12
    assert_equal(path)


def test_shorter_sizes_equal_sentence_transformers(tiny_bert: MakeModel) -> None:
    path = made(tiny_bert(), [dense(32, 16), base.Normalize()])
    rewrite(path / "config.json", matryoshka_dimensions=[4, 8, 32])
    for dimensions in (4, 8, 16):
        options = VectorOptions(dimensions=dimensions)
        assert_equal(path, options, truncate_dim=dimensions, normalize_embeddings=True)


def test_the_oldest_layout_equals_sentence_transformers(tiny_bert: MakeModel) -> None:
    """The transformer in a folder of its own, class paths, flags and weights as version 0.3 wrote them."""
    path = made(tiny_bert(), [dense(64, 8)], pooling=("cls", "mean"), safe=False)
    transformer = path / "0_Transformer"
    transformer.mkdir()
    for file in [file for file in path.iterdir() if file.is_file() and "modules" not in file.name]:
        file.rename(transformer / file.name)
    (transformer / "config_sentence_transformers.json").unlink()
    (transformer / "sentence_bert_config.json").write_text('{"max_seq_length": 20, "do_lower_case": true}')
    flags = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    pooling = {f"pooling_mode_{flag}": place < 2 for place, flag in enumerate(flags)}
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **pooling}))
    kinds = ("Transformer", "Pooling", "Dense")
    listed = [
        {"idx": place, "name": str(place), "path": f"{place}_{kind}", "type": f"sentence_transformers.models.{kind}"}
        for place, kind in enumerate(kinds)
    ]
    (path / "modules.json").write_text(json.dumps(listed))
    assert_equal(path)


@pytest.mark.parametrize("pooling", ["mean", "cls", "weightedmean", ("max", "lasttoken")])
@pytest.mark.parametrize("include_prompt", [True, False])
def test_prompts_equal_sentence_transformers(tiny_bert: MakeModel, pooling: Any, include_prompt: bool) -> None:
    prompts = {"query": "the queue: ", "document": ""}
    path = made(
        tiny_bert(), pooling=pooling, include_prompt=include_prompt, prompts=prompts, default_prompt_name="query"
    )
    assert_equal(path)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_each_activation_equals_that_of_sentence_transformers(tmp_path: Path, name: str) -> None:
    step = dense(4, 4, getattr(nn, name)())
    (tmp_path / "2_Dense").mkdir()
    step.save(str(tmp_path / "2_Dense"))
    head = read_one(tmp_path, "Dense")
    pooled = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)) * 3
    with torch.inference_mode():
        expected = base.Dense.load(str(tmp_path / "2_Dense"))({"sentence_embedding": pooled})["sentence_embedding"]
        torch.testing.assert_close(head(pooled), expected, rtol=0, atol=1e-6)


def read_one(path: Path, kind: str) -> Callable[[Tensor], Tensor]:
    """The head of a model with one step in a folder `2_…`."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling", f"2_{kind}": kind}
    listed = [{"type": f"sentence_transformers.models.{name}", "path": folder} for folder, name in kinds.items()]
    (path / "modules.json").write_text(json.dumps(listed))
    return build_head(read_steps(read_modules(path).head), CPU)


def test_without_steps_nothing_changes() -> None:
    pooled = torch.randn(2, 3)
    assert build_head((), CPU)(pooled) is pooled


def test_steps_follow_one_another() -> None:
    head = build_head((Normalize(), Cut(1)), CPU)
    torch.testing.assert_close(head(torch.tensor([[3.0, 4.0], [0.0, 0.0]])), torch.tensor([[0.6], [0.0]]))


def test_weights_in_other_formats_are_computed_in_float32(tmp_path: Path) -> None:
    weights = {"linear.weight": torch.ones(2, 2, dtype=torch.bfloat16)}
    save_file(weights, tmp_path / "model.safetensors")
    step = Dense(tmp_path, 2, 2, bias=False, activation="Identity", residual=False)
    assert build_head([step], CPU)(torch.ones(1, 2)).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, None, r"norm/model\.safetensors is missing: the weights of norm"),
        ("model.safetensors", b"no weights", r"model\.safetensors is damaged"),
        ("pytorch_model.bin", b"no weights", "it is damaged, or a pickle that holds more than tensors"),
        ("pytorch_model.bin", [torch.ones(2)], "holds no table of tensors"),
        ("pytorch_model.bin", {"norm.weight": 3}, r"holds norm\.weight \[\]; its config\.json asks for"),
        ("model.safetensors", {}, "holds nothing; its"),
        ("model.safetensors", {"norm.weight": torch.ones(2)}, r"holds norm\.weight \[2\]; its config"),
        ("model.safetensors", {"norm.weight": torch.ones(2), "norm.bias": torch.ones(3)}, r"norm\.bias \[3\]"),
        (
            "model.safetensors",
            {"norm.weight": torch.ones(2), "norm.bias": torch.ones(2, dtype=torch.int64)},
            "not floating-point numbers",
        ),
    ],
)
def test_weights_that_cannot_be_used(tmp_path: Path, name: str | None, content: Any, message: str) -> None:
    folder = tmp_path / "norm"
    folder.mkdir()
    if isinstance(content, bytes):
        (folder / str(name)).write_bytes(content)
    elif name == "model.safetensors":
        save_file(content, folder / name)
    elif name is not None:
        torch.save(content, folder / name)
    with pytest.raises(ModelLoadError, match=message) as caught:
        build_head([LayerNorm(folder, 2)], CPU)
    assert "\n" not in str(caught.value)


class Code:
    """What a pickle may bring: it makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._folder),)


def test_what_a_pickle_brings_is_never_run(tmp_path: Path) -> None:
    torch.save({"norm.weight": Code(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ModelLoadError, match=r"a pickle that holds more than tensors; it is needed as model\.safetensors"
    ):
        build_head([LayerNorm(tmp_path, 2)], CPU)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_is_told(tmp_path: Path) -> None:
    torch.save({"norm.weight": torch.ones(2), "norm.bias": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    with structlog.testing.capture_logs() as logs:
        build_head([LayerNorm(tmp_path, 2)], CPU)
    assert [(line["event"], line["log_level"]) for line in logs] == [("model.pickled_weights", "warning")]


def test_weights_that_are_no_numbers(tiny_bert: MakeModel) -> None:
    path = made(tiny_bert(), [dense(32, 8)])
    file = path / "2_Dense" / "model.safetensors"
    save_file(load_file(file) | {"linear.bias": torch.full((8,), torch.nan)}, file)
    with pytest.raises(ModelLoadError, match=r"what follows the pooling \(dense 32>8 tanh\) gave values that are not"):
        load(path)


def test_vectors_of_tokens_have_no_head(tiny_bert: MakeModel) -> None:
    path = made(tiny_bert(), [dense(32, 8)])
    options = VectorOptions(per_token=True, normalize=False)
    ours = Direct(load(path), 512).embed(TEXTS, options=options).vectors
    them = reference(path)
    for text, matrix in zip(TEXTS, ours, strict=True):
        expected = np.asarray(them.encode(text, output_value="token_embeddings", show_progress_bar=False))
        assert matrix is not None
        assert matrix.shape == expected.shape
        np.testing.assert_allclose(matrix, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))
