"""The parts of BERT and of models built like it, found in a module of transformers by their names and kinds.

What counts is how a module is built, not what it is called: nearly all models of embeddings with less than a billion
weights are BERT under another name. One part too many, or of another kind than it has there, and it is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers.activations import ACT2FN

from .linear import After
from .positions import padding_id_of_positions

_POOLER = "pooler."
"""Of the first token, for classifiers; hidden states do without it."""


@dataclass(frozen=True, slots=True)
class Norm:
    """A layer norm: weight and bias, both (dim,)."""

    weight: Tensor
    bias: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Embeddings:
    """What tokens begin as.

    Args:
        words: (vocabulary, dim).
        places: (positions, dim), with what all tokens get: the first of the token types, the first of the tasks.
        norm: of their sum.
        projection: to the layers' size, where that is another one.
        padding_id: as `positions_of` takes it.
    """

    words: Tensor
    places: Tensor
    norm: Norm
    projection: nn.Linear | None
    padding_id: int | None


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention and what follows it; norms come last, after what went in has been added."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attended: nn.Linear
    attended_norm: Norm
    up: nn.Linear
    activation: After
    down: nn.Linear
    norm: Norm
    heads: int
    scale: float


@dataclass(frozen=True, slots=True)
class Parts:
    """A whole model. A layer that is there several times is the same object each time."""

    embeddings: Embeddings
    layers: tuple[Layer, ...]


@dataclass(frozen=True, slots=True)
class _Names:
    """Of parts of a layer in some families."""

    attention: str
    query: str
    key: str
    value: str
    attended: str
    attended_norm: str
    up: str
    activation: str
    down: str
    norm: str


_BERT = _Names(
    attention="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attended="attention.output.dense",
    attended_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    down="output.dense",
    norm="output.LayerNorm",
)
_DISTILBERT = _Names(
    attention="attention",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    attended="attention.out_lin",
    attended_norm="sa_layer_norm",
    up="ffn.lin1",
    activation="ffn.activation",
    down="ffn.lin2",
    norm="output_layer_norm",
)
_ALBERT = _Names(
    attention="attention",
    query="attention.query",
    key="attention.key",
    value="attention.value",
    attended="attention.dense",
    attended_norm="attention.LayerNorm",
    up="ffn",
    activation="activation",
    down="ffn_output",
    norm="full_layer_layer_norm",
)

_ACTIVATIONS = {
    type(ACT2FN["gelu"]): After.GELU,
    type(ACT2FN["gelu_new"]): After.GELU_TANH,
    type(ACT2FN["gelu_pytorch_tanh"]): After.GELU_TANH,
    type(ACT2FN["gelu_fast"]): After.GELU_TANH,
    type(ACT2FN["relu"]): After.RELU,
}


_PROJECTIONS = ("embeddings_project", "encoder.embedding_hidden_mapping_in")
"""Of ELECTRA and ALBERT, from embeddings to layers of another size."""

_Kind = TypeVar("_Kind", bound=nn.Module)


class _OtherPartError(Exception):
    """A part is not what BERT has there."""


def parts_of(module: nn.Module) -> Parts | None:
    """The parts of a module, or None where it is not built like BERT.

    Args:
        module: of transformers, on one device, with all weights in one number format.
    """
    try:
        return _Reader(module).read()
    except (_OtherPartError, AttributeError):  # torch raises the latter for a part that is not there
        return None


class _Reader:
    """Takes parts from a module and keeps account of them.

    Args:
        module: whose parts are taken.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._config: Any = module.config
        self._taken: set[int] = set()  # parameters, by identity

    def read(self) -> Parts:
        if getattr(self._config, "is_decoder", False):
            raise _OtherPartError("it attends to earlier tokens only")
        embeddings = self._embeddings()
        layers = tuple(self._layers())
        for name, parameter in self._module.named_parameters():
            if id(parameter) not in self._taken and not name.startswith(_POOLER):
                raise _OtherPartError(name)
        return Parts(embeddings, layers)

    def _embeddings(self) -> Embeddings:
        words = self._table("embeddings.word_embeddings")
        places = self._table("embeddings.position_embeddings").float()
        for name in ("token_type_embeddings", "task_type_embeddings"):
            if _has(self._module, f"embeddings.{name}"):
                places = places + self._table(f"embeddings.{name}")[0].float()
        projection = next((name for name in _PROJECTIONS if _has(self._module, name)), None)
        return Embeddings(
            words,
            places.to(words.dtype),
            self._norm("embeddings.LayerNorm"),
            None if projection is None else self._linear(projection),
            padding_id_of_positions(self._module),
        )

    def _layers(self) -> Iterator[Layer]:
        if _has(self._module, "encoder.albert_layer_groups"):
            yield from self._shared_layers()
            return
        names, path = _BERT, "encoder.layer"
        if not _has(self._module, path):
            names, path = _DISTILBERT, "transformer.layer"
        for number, _ in enumerate(self._module.get_submodule(path).children()):
            yield self._layer(f"{path}.{number}.", names)

    def _shared_layers(self) -> Iterator[Layer]:
        config = self._config
        path = "encoder.albert_layer_groups.{}.albert_layers.{}."
        groups = [
            [self._layer(path.format(group, number), _ALBERT) for number in range(config.inner_group_num)]
            for group in range(config.num_hidden_groups)
        ]
        for number in range(config.num_hidden_layers):
            yield from groups[int(number / (config.num_hidden_layers / config.num_hidden_groups))]

    def _layer(self, path: str, names: _Names) -> Layer:
        attention = self._module.get_submodule(path + names.attention)
        query = self._linear(path + names.query)
        heads: Any = getattr(attention, "num_attention_heads", None) or attention.n_heads
        activation = _ACTIVATIONS.get(type(self._module.get_submodule(path + names.activation)))
        if activation is None or query.out_features % heads:
            raise _OtherPartError(path + names.activation)
        return Layer(
            query=query,
            key=self._linear(path + names.key),
            value=self._linear(path + names.value),
            attended=self._linear(path + names.attended),
            attended_norm=self._norm(path + names.attended_norm),
            up=self._linear(path + names.up),
            activation=activation,
            down=self._linear(path + names.down),
            norm=self._norm(path + names.norm),
            heads=heads,
            scale=(query.out_features // heads) ** -0.5,
        )

    def _table(self, name: str) -> Tensor:
        table = self._part(name, nn.Embedding)
        if table.max_norm is not None or not len(table.weight):
            raise _OtherPartError(name)
        return table.weight.detach()

    def _linear(self, name: str) -> nn.Linear:
        linear = self._part(name, nn.Linear)
        if linear.bias is None:
            raise _OtherPartError(name)
        return linear

    def _norm(self, name: str) -> Norm:
        norm = self._part(name, nn.LayerNorm)
        if norm.weight is None or norm.bias is None or norm.weight.ndim != 1:
            raise _OtherPartError(name)
        return Norm(norm.weight.detach(), norm.bias.detach(), norm.eps)

    def _part(self, name: str, kind: type[_Kind]) -> _Kind:
        """Of exactly that kind: those derived from it, such as layers of adapters, do something else."""
        part = self._module.get_submodule(name)
        if type(part) is not kind:
            raise _OtherPartError(name)
        self._taken |= {id(parameter) for parameter in part.parameters()}
        return part


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
