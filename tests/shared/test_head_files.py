from __future__ import annotations

from typing import Any

import pytest

from embedstream.shared.errors import ModelLoadError
from embedstream.shared.head_files import Cut, Dense, LayerNorm, Normalize, read_steps, size_after
from embedstream.shared.module_files import read_modules

from .made_files import Make

DENSE = {"in_features": 32, "out_features": 8, "activation_function": "torch.nn.modules.linear.Identity"}


def test_steps(make: Make) -> None:
    files = make(
        modules=("Transformer", "Pooling", "LayerNorm", "Dense", "Dropout", "Normalize", "Dense"),
        others={
            "2_LayerNorm/config.json": {"dimension": 32},
            "3_Dense/config.json": {**DENSE, "bias": False, "module_input_name": "sentence_embedding"},
            "6_Dense/config.json": {"in_features": 8, "out_features": 8, "use_residual": True, "something_new": 1},
        },
    )
    path = files.path
    steps = read_steps(read_modules(path).head)
    assert steps == (
        LayerNorm(path / "2_LayerNorm", 32),
        Dense(path / "3_Dense", 32, 8, bias=False, activation="Identity", residual=False),
        Normalize(),
        Dense(path / "6_Dense", 8, 8, bias=True, activation="Tanh", residual=True),
    )
    assert ", ".join(map(str, (*steps, Cut(4)))) == (
        "layer norm, dense 32>8 identity no bias, normalize, dense 8>8 tanh residual, cut to 4"
    )
    assert size_after(steps, 32, path) == 8
    assert size_after((*steps, Cut(4)), 32, path) == 4


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("Dense", None, "is missing"),
        ("Dense", {"out_features": 8}, "in_features is None, not a size"),
        ("Dense", {**DENSE, "out_features": 0}, "out_features is 0, not a size"),
        ("Dense", {**DENSE, "in_features": True}, "in_features is True, not a number"),
        ("Dense", {**DENSE, "bias": 1}, "bias is 1, neither true nor false"),
        (
            "Dense",
            {**DENSE, "activation_function": "torch.nn.Softmax"},
            "the activation 'torch.nn.Softmax' is not known",
        ),
        ("Dense", {**DENSE, "activation_function": "os.Tanh"}, "the activation 'os.Tanh' is not known"),
        ("Dense", {**DENSE, "activation_function": None}, "the activation None is not known"),
        ("Dense", {**DENSE, "module_input_name": "token_embeddings"}, "module_input_name .* late-interaction"),
        ("Dense", {**DENSE, "module_output_name": "x"}, "module_output_name is 'x'"),
        ("Normalize", {"module_input_name": "token_embeddings"}, "module_input_name .* late-interaction"),
        ("Normalize", 3, "holds no JSON object"),
        ("LayerNorm", {}, "dimension is None, not a size"),
        ("LayerNorm", None, "is missing"),
    ],
)
def test_steps_that_are_not_understood(make: Make, kind: str, config: Any, message: str) -> None:
    files = make(modules=("Transformer", "Pooling", kind), others={f"2_{kind}/config.json": config})
    with pytest.raises(ModelLoadError, match=rf"2_{kind}/config\.json.* {message}") as caught:
        read_steps(read_modules(files.path).head)
    assert "\n" not in str(caught.value)
