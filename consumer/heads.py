"""What follows the pooling, on the device: Dense layers, layer norms and their like, in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import layer_norm, linear, normalize

from embedstream.shared.errors import ModelLoadError
from embedstream.shared.head_files import Cut, Dense, LayerNorm, Normalize, Step
from embedstream.shared.logs import get_logger

log = get_logger()

_SAFE, _PICKLED = "model.safetensors", "pytorch_model.bin"

Head = Callable[[Tensor], Tensor]
"""Pooled vectors (rows, ways * hidden) float32 to (rows, dimension) float32."""


def build_head(steps: Sequence[Step], device: torch.device) -> Head:
    """Load the weights of the steps.

    Args:
        steps: in their order; none gives the vectors back as they are.
        device: where the pooled vectors will be.

    Raises:
        ModelLoadError: weights are missing, damaged, or of another shape than the files say.
    """
    parts = [_build(step, device) for step in steps]

    def head(vectors: Tensor) -> Tensor:
        for part in parts:
            vectors = part(vectors)
        return vectors

    return head


def _build(step: Step, device: torch.device) -> Head:
    match step:
        case Dense():
            return _dense(step, device)
        case LayerNorm(folder, dimension):
            weights = _weights(folder, {"norm.weight": (dimension,), "norm.bias": (dimension,)}, device)
            scale, shift = weights["norm.weight"], weights["norm.bias"]
            return lambda vectors: layer_norm(vectors, (dimension,), scale, shift)
        case Normalize():
            return lambda vectors: normalize(vectors, dim=-1)
        case Cut(dimension):
            return lambda vectors: vectors[:, :dimension]


def _dense(step: Dense, device: torch.device) -> Head:
    matrix = (step.out_features, step.in_features)
    shapes: dict[str, tuple[int, ...]] = {"linear.weight": matrix}
    if step.bias:
        shapes["linear.bias"] = (step.out_features,)
    if step.residual and step.in_features != step.out_features:
        shapes["residual.weight"] = matrix
    weights = _weights(step.folder, shapes, device)
    weight, bias, shortcut = weights["linear.weight"], weights.get("linear.bias"), weights.get("residual.weight")
    activation: Callable[[Tensor], Tensor] = getattr(torch.nn, step.activation)()

    def dense(vectors: Tensor) -> Tensor:
        result = activation(linear(vectors, weight, bias))
        if step.residual:
            result = result + (vectors if shortcut is None else linear(vectors, shortcut))
        return result

    return dense


def _weights(folder: Path, shapes: dict[str, tuple[int, ...]], device: torch.device) -> dict[str, Tensor]:
    """The weights of a module, in float32; exactly those that it must have."""
    file = folder / _SAFE
    if not file.is_file():
        file = folder / _PICKLED
        if not file.is_file():
            raise ModelLoadError(f"{folder / _SAFE} is missing: the weights of {folder.name}")
        log.warning("model.pickled_weights", path=str(file), advice="save the model again: it becomes safetensors")
    weights = _read(file)
    found = {name: tuple(getattr(value, "shape", ())) for name, value in weights.items()}
    if found != shapes:
        raise ModelLoadError(f"{file} holds {_listed(found)}; its config.json asks for {_listed(shapes)}")
    if not all(weight.is_floating_point() for weight in weights.values()):
        raise ModelLoadError(f"{file} holds weights that are not floating-point numbers")
    return {name: weight.to(device, torch.float32) for name, weight in weights.items()}


def _read(file: Path) -> dict[str, Any]:
    try:
        if file.name == _SAFE:
            return load_file(file)
        weights = torch.load(file, map_location="cpu", weights_only=True)  # never runs what a pickle brings
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(f"{file} is damaged: {error}") from error
    except Exception as error:  # whatever pickle and torch raise on bytes that are not theirs
        raise ModelLoadError(
            f"{file} is not loaded: it is damaged, or a pickle that holds more than tensors; it is needed as {_SAFE}"
        ) from error
    if not isinstance(weights, dict):
        raise ModelLoadError(f"{file} holds no table of tensors")
    return weights


def _listed(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items(), key=str)) or "nothing"
