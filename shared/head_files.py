"""What follows the pooling: the steps from pooled hidden states to a model's vector, as its files list them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import ModelLoadError
from .json_files import boolean, read_object, shown, size
from .module_files import Module

_SENTENCE = "sentence_embedding"
_TORCH = "torch.nn."
_TANH = "torch.nn.modules.activation.Tanh"

ACTIVATIONS = frozenset(
    (
        *("CELU", "ELU", "GELU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "Identity", "LeakyReLU"),
        *("LogSigmoid", "Mish", "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid", "Softplus", "Softshrink", "Softsign"),
        *("Tanh", "Tanhshrink"),
    )
)
"""Classes of `torch.nn` that work on each component alone, without weights, made without arguments."""


@dataclass(frozen=True, slots=True)
class Dense:
    """A linear layer with an activation.

    Args:
        folder: where its weights are.
        in_features: components it takes.
        out_features: components it gives.
        bias: whether it adds one.
        activation: one of ACTIVATIONS.
        residual: whether its input is added to its output, through a second matrix where their sizes differ.
    """

    folder: Path
    in_features: int
    out_features: int
    bias: bool
    activation: str
    residual: bool

    def __str__(self) -> str:
        extras = ["no bias"] * (not self.bias) + ["residual"] * self.residual
        words = ["dense", f"{self.in_features}>{self.out_features}", self.activation.lower(), *extras]
        return " ".join(words)


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Mean 0 and variance 1 over the components, then a scale and a shift of each.

    Args:
        folder: where its weights are.
        dimension: components it takes and gives.
    """

    folder: Path
    dimension: int

    def __str__(self) -> str:
        return "layer norm"


@dataclass(frozen=True, slots=True)
class Normalize:
    """Unit length."""

    def __str__(self) -> str:
        return "normalize"


@dataclass(frozen=True, slots=True)
class Cut:
    """The leading components alone."""

    dimension: int

    def __str__(self) -> str:
        return f"cut to {self.dimension}"


Step = Dense | LayerNorm | Normalize | Cut


def read_steps(modules: tuple[Module, ...]) -> tuple[Step, ...]:
    """The steps of the modules after the pooling; a dropout does nothing to a model that is not trained.

    Raises:
        ModelLoadError: the settings of one are missing, damaged or not understood.
    """
    read: dict[str, Callable[[Module], Step]] = {"Dense": _dense, "LayerNorm": _layer_norm, "Normalize": _normalize}
    return tuple(read[module.kind](module) for module in modules if module.kind in read)


def size_after(steps: tuple[Step, ...], components: int, file: Path) -> int:
    """Components of a vector after the steps.

    Args:
        steps: in their order.
        components: of the pooled vector.
        file: the list of modules, for messages.

    Raises:
        ModelLoadError: a step takes vectors of another size.
    """
    for step in steps:
        match step:
            case Dense(in_features=wanted) | LayerNorm(dimension=wanted) if wanted != components:
                raise ModelLoadError(f"{file}: {step.folder.name} takes {wanted} components, but gets {components}")
            case Dense():
                components = step.out_features
            case Cut():
                components = step.dimension
            case _:
                continue
    return components


def _dense(module: Module) -> Dense:
    file = module.file
    fields = read_object(file)
    _check_names(file, fields)
    path = fields.get("activation_function", _TANH)
    name = path.rpartition(".")[2] if isinstance(path, str) and path.startswith(_TORCH) else ""
    if name not in ACTIVATIONS:
        raise ModelLoadError(
            f"{file}: the activation {shown(path)} is not known here; it must be one of torch.nn: "
            f"{', '.join(sorted(ACTIVATIONS))}"
        )
    return Dense(
        module.folder,
        size(file, fields, "in_features"),
        size(file, fields, "out_features"),
        boolean(file, fields, "bias", default=True),
        name,
        boolean(file, fields, "use_residual", default=False),
    )


def _layer_norm(module: Module) -> LayerNorm:
    return LayerNorm(module.folder, size(module.file, read_object(module.file), "dimension"))


def _normalize(module: Module) -> Normalize:
    _check_names(module.file, read_object(module.file, missing_ok=True))
    return Normalize()


def _check_names(file: Path, fields: dict[str, object]) -> None:
    """A module may work on something else than the pooled vector, as those of late interaction do."""
    for key in ("module_input_name", "module_output_name"):
        value = fields.get(key)
        if value is not None and value != _SENTENCE:
            raise ModelLoadError(
                f"{file}: {key} is {shown(value)}, not {_SENTENCE}; a late-interaction model (ColBERT) is served by "
                "sentence-transformers' MultiVectorEncoder or PyLate"
            )
