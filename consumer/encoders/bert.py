"""BERT, and models built like it, without padding and without transformers' modules in between.

What those do beside the arithmetic takes half of the time of a single query: layers of Python, masks, three products
where one does, results that are copied before they are added. The numbers that come out are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, layer_norm, linear, pad

from . import bert_parts
from .attention import AS_USUAL, Pattern, Tuning, attend
from .bert_parts import Norm, Parts, parts_of
from .layout import Layout
from .linear import SIZES, After, Linears, rounded, size_of
from .linear import Layer as LinearLayer
from .packing import Packing

_ALL = Pattern()

Rest: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""What follows attention in a layer: (tokens, dim) of what it gave, and of what went into it, to what leaves the layer.
The second argument may be overwritten."""


class Compiles(Protocol):
    """Makes the rest of a layer faster where it can."""

    def __call__(self, layer: bert_parts.Layer, uncompiled: Sequence[Rest]) -> Sequence[Rest]:
        """For each of `SIZES`, one that gives the same numbers; those that are given are good as they are."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """With linear layers for one of `SIZES`."""

    query_key_value: LinearLayer
    heads: tuple[int, int]
    """Their number, and components of each."""
    scale: float
    rest: Rest


class BertEncoder(Packing):
    """An encoder of its own for models built like BERT; see `Encoder`.

    Args:
        parts: of the model, on one device.
        linears: makes its linear layers.
        tuning: of attention on devices without a kernel for packed sequences.
        compiles: what follows attention in the layers, if it is to be compiled.
    """

    plain_name = "bert"

    def __init__(
        self,
        parts: Parts,
        linears: Linears,
        tuning: Tuning = AS_USUAL,
        compiles: Compiles | None = None,
    ) -> None:
        super().__init__(parts.embeddings.words.device, parts.embeddings.padding_id)
        self.name = self.plain_name
        self.tuning = tuning
        self._embeddings = parts.embeddings
        self._rounds = parts.embeddings.words.device.type == "cpu"
        made = {id(layer): _of_all_sizes(layer, linears, compiles) for layer in parts.layers}
        self._layers = [[made[id(layer)][size] for layer in parts.layers] for size in range(len(SIZES))]

    @classmethod
    def of(
        cls,
        module: nn.Module,
        linears: Linears,
        tuning: Tuning = AS_USUAL,
        compiles: Compiles | None = None,
    ) -> BertEncoder | None:
        """The encoder for a module, or None where that is not built like BERT.

        Query, key and value of a layer become one matrix; those of the module become views of it, so weights take no
        more memory than before.

        Args:
            module: of transformers, in evaluation mode, on its device.
            linears: makes the linear layers.
            tuning: of attention on devices without a kernel for packed sequences.
            compiles: what follows attention in the layers, if it is to be compiled.
        """
        parts = parts_of(module)
        if parts is None:
            return None
        with torch.inference_mode(mode=False), torch.no_grad():  # weights of the module stay what autograd may see
            return cls(parts, linears, tuning, compiles)

    @property
    def heads(self) -> tuple[int, int]:
        """Heads of the attention in each layer, and components of each head."""
        return self._layers[0][0].heads

    def run(self, tokens: Tensor, layout: Layout) -> Tensor:
        """See `Packing`; nothing in it waits for the device or looks at values there."""
        hidden = self._embed(tokens)
        more = rounded(layout.total) - layout.total if self._rounds else 0
        if more:
            hidden = pad(hidden, (0, 0, 0, more))
        for layer in self._layers[size_of(layout.total)]:
            query, key, value = layer.query_key_value(hidden).view(-1, 3, *layer.heads).unbind(1)
            attended = attend(query, key, value, layout, pattern=_ALL, scale=layer.scale, tuning=self.tuning)
            hidden = layer.rest(attended.flatten(1), hidden)
        return hidden[: layout.total]

    def _embed(self, tokens: Tensor) -> Tensor:
        ids, positions = tokens.unbind()
        own = self._embeddings
        hidden = _normalized(embedding(ids, own.words).add_(embedding(positions, own.places)), own.norm)
        if own.projection is None:
            return hidden
        return linear(hidden, own.projection.weight, own.projection.bias)


def _normalized(hidden: Tensor, norm: Norm) -> Tensor:
    return layer_norm(hidden, norm.weight.shape, norm.weight, norm.bias, norm.eps)


def _of_all_sizes(layer: bert_parts.Layer, linears: Linears, compiles: Compiles | None) -> list[_Layer]:
    """The layer for each of `SIZES`."""
    weight, bias = _joined(layer.query, layer.key, layer.value)
    of_attention = linears.layer(weight, bias, After.NOTHING)
    of_rest = (
        linears.layer(layer.attended.weight.detach(), layer.attended.bias.detach(), After.ADD),
        linears.layer(layer.up.weight.detach(), layer.up.bias.detach(), layer.activation),
        linears.layer(layer.down.weight.detach(), layer.down.bias.detach(), After.ADD),
    )
    rests: Sequence[Rest] = [_rest(*ways, layer.attended_norm, layer.norm) for ways in zip(*of_rest, strict=True)]
    if compiles is not None:
        rests = compiles(layer, rests)
    heads = (layer.heads, layer.query.out_features // layer.heads)
    return [_Layer(way, heads, layer.scale, rest) for way, rest in zip(of_attention, rests, strict=True)]


def _rest(attended: LinearLayer, up: LinearLayer, down: LinearLayer, attended_norm: Norm, norm: Norm) -> Rest:
    def rest(given: Tensor, hidden: Tensor) -> Tensor:
        hidden = _normalized(attended(given, hidden), attended_norm)
        return _normalized(down(up(hidden), hidden), norm)

    return rest


def _joined(*layers: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weights and biases of layers one below the other, where those of the layers themselves then lie too."""
    weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    for layer, its_weight, its_bias in zip(layers, weight.chunk(len(layers)), bias.chunk(len(layers)), strict=True):
        layer.weight.data, layer.bias.data = its_weight, its_bias
    return weight, bias
