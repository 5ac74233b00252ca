"""Linear layers, each computed in the way that is fastest on this machine for a number of tokens.

`torch.nn.functional.linear` lays the weights out anew in each call. For a query of a few tokens that costs about as
much as the product itself, so oneDNN can keep a second copy of them in its own layout. Which way is fastest is
measured, for a few numbers of tokens and each size of matrix there is: AVX2, AVX512 and AMX differ, and so do number
formats.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import linear

from embedstream.consumer.measured import Measurements
from embedstream.shared.logs import get_logger

from .encoder import differ

log = get_logger()

gelu_ = torch.ops.aten.gelu_.default  # torch.nn.functional has none that writes over its argument

SIZES = (1, 4, 16, 64, 256, 1024)
"""Numbers of tokens at which layers are timed. A batch takes what is fastest at the size nearest to its own."""

_BOUNDS = (2, 8, 32, 128, 512)
"""The most tokens that count as each size but the last: the geometric mean of the size and the next one."""

_STEPS = ((32, 1), (128, 4), (256, 8), (2048, 16))
"""Up to a number of tokens, batches are rounded up to a multiple of the step. Of few tokens each one counts; on average
the others compute one token more in a hundred."""
_LARGEST_STEP = 64
_FEW = 64
"""For fewer tokens a layer waits for its weights, and those of the other layers have taken their place in the core's
own cache: such layers are timed in a row of several, each with weights of its own."""
_ROW_BYTES = 16 * 1024 * 1024
"""Of the weights of such a row: more than a core's own cache holds."""
_LONGEST_ROW = 64
"""Layers: small ones are in the cache whatever is done, and it is of no use to time many."""
_ROUNDS = 7
_ENOUGH_S = 0.03
"""Timing ends after so long for each way."""
_LONG_S = 0.005
"""Where a single run takes longer, larger sizes are not timed at all."""
_GAIN = 0.9
"""A second copy of the weights must take this part of the time at most for some number of tokens; it is then there for
all of them."""

Layer: TypeAlias = Callable[..., Tensor]
"""(tokens, inputs) to (tokens, outputs); of layers that add their result to something, that is the second argument,
(tokens, outputs), which may be overwritten."""


class After(StrEnum):
    """What is done with the product of tokens and weights, plus the bias."""

    NOTHING = "nothing"
    GELU = "gelu"
    """Of the error function."""
    GELU_TANH = "gelu-tanh"
    RELU = "relu"
    ADD = "add"
    """It is added to a second argument."""


class Way(StrEnum):
    """How a layer is computed. The same numbers come out of all, but for rounding."""

    PLAIN = "plain"
    IN_PLACE = "in place"
    """The product is added straight into the second argument."""
    PACKED = "packed"
    """By oneDNN, with weights in its own layout, and what comes after it in the same pass."""
    PACKED_APART = "packed, apart"
    """By oneDNN as well, and torch does what comes after it."""


def size_of(tokens: int) -> int:
    """The place in `SIZES` of what a batch of so many tokens is most like."""
    return bisect_left(_BOUNDS, tokens)


def rounded(tokens: int) -> int:
    """The next of few numbers of tokens, not much larger.

    For each number that it meets oneDNN makes machine code for each size of matrix. With numbers as they come that is
    made over and over: about a millisecond and half a megabyte for each, as measured on AVX512-BF16.

    Args:
        tokens: of a batch, at least 1.
    """
    step = next((step for most, step in _STEPS if tokens <= most), _LARGEST_STEP)
    return -(-tokens // step) * step


@dataclass(frozen=True, slots=True)
class _Weights:
    """Of a layer: (outputs, inputs) and (outputs,)."""

    weight: Tensor
    bias: Tensor
    after: After

    @property
    def shape(self) -> str:
        """What all layers have in common that are as fast: `384x1536-gelu`."""
        outputs, inputs = self.weight.shape
        return f"{inputs}x{outputs}-{self.after}"

    @property
    def n_bytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()


class Linears:
    """Makes layers of weights. Calls come from one thread, outside of inference mode or in it.

    Args:
        measured: where it is kept which way is fastest.
        packed_limit_bytes: most memory for copies of weights in oneDNN's layout, in all; layers that come when it is
            used up do without.
        measures: whether what is not known may be measured; else few tokens take a copy, and many do without.
    """

    def __init__(self, measured: Measurements, packed_limit_bytes: int, *, measures: bool = True) -> None:
        self._measured = measured
        self._measures = measures
        self._left_bytes = packed_limit_bytes
        self._ways: dict[str, tuple[Way, ...]] = {}  # by shape, one for each size
        self.packed_bytes = 0
        """Memory of copies so far."""

    def layer(self, weight: Tensor, bias: Tensor, after: After) -> tuple[Layer, ...]:
        """A layer for each of `SIZES`, all with the same weights.

        Args:
            weight: (outputs, inputs), as in `torch.nn.Linear`.
            bias: (outputs,).
            after: what is done with the result.
        """
        weights = _Weights(weight, bias, after)
        if weights.shape not in self._ways:
            self._ways[weights.shape] = self._fastest(weights)
        ways = self._ways[weights.shape]
        packed = self._packed(weights) if any(_is_packed(way) for way in ways) else None
        if packed is None:
            ways = tuple(_without_copy(after) if _is_packed(way) else way for way in ways)
        made = {way: _build(way, weights, packed) for way in set(ways)}
        return tuple(made[way] for way in ways)

    def _packed(self, weights: _Weights) -> Tensor | None:
        """A copy of the weights, or None where there is no memory for it."""
        if weights.n_bytes > self._left_bytes:
            return None
        self._left_bytes -= weights.n_bytes
        self.packed_bytes += weights.n_bytes
        return _pack(weights.weight)

    def _fastest(self, weights: _Weights) -> tuple[Way, ...]:
        candidates = _candidates(weights)
        if len(candidates) == 1:
            return tuple(candidates) * len(SIZES)
        name = f"linear-{weights.shape}"
        ways = _known(self._measured.get(name), candidates)
        if ways is None and not self._measures:
            return _usual(weights.after, candidates)
        if ways is None:
            ways = _measure(weights, candidates)
            self._measured.put(name, [str(way) for way in ways])
            log.debug("linear.measured", shape=weights.shape, ways=dict(zip(SIZES, map(str, ways), strict=True)))
        return ways


def _usual(after: After, candidates: Mapping[Way, Layer]) -> tuple[Way, ...]:
    """What was fastest where it was measured."""
    few = Way.PACKED if Way.PACKED in candidates else _without_copy(after)
    return tuple(few if tokens < _FEW else _without_copy(after) for tokens in SIZES)


def _known(found: Any, candidates: Mapping[Way, Layer]) -> tuple[Way, ...] | None:
    """What was measured before, where it can be used."""
    if not isinstance(found, list) or len(found) != len(SIZES) or not set(found) <= {*map(str, candidates)}:
        return None
    return tuple(map(Way, found))


def _is_packed(way: Way) -> bool:
    return way in (Way.PACKED, Way.PACKED_APART)


def _without_copy(after: After) -> Way:
    return Way.IN_PLACE if after is After.ADD else Way.PLAIN


def _candidates(weights: _Weights) -> dict[Way, Layer]:
    """Ways that compute what they should, those that need no copy first."""
    first = _without_copy(weights.after)
    found = {first: _build(first, weights, None)}
    if weights.weight.device.type != "cpu":
        return found
    ways = [Way.PACKED] if weights.after is After.NOTHING else [Way.PACKED, Way.PACKED_APART]
    if weights.after is After.ADD:
        found[Way.PLAIN] = _build(Way.PLAIN, weights, None)
    # These operators are no part of torch's public interface, though what its compiler builds on. They may be lacking
    # in a version of it, or refuse a number format on a CPU without the instructions for it, each by its own error.
    try:
        packed = _pack(weights.weight)
        for way in ways:
            layer = _build(way, weights, packed)
            if _agree(layer, found[first], weights):
                found[way] = layer
    except Exception as error:  # noqa: BLE001
        log.debug("linear.not_packed", shape=weights.shape, reason=str(error).partition("\n")[0])
    return found


def _agree(layer: Layer, other: Layer, weights: _Weights) -> bool:
    given = _made_up(weights.weight, SIZES[2])
    return not differ(_run(layer, given, weights.after), _run(other, given, weights.after))


def _made_up(weight: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Numbers for both arguments of a layer, as they are behind a layer norm."""
    outputs, inputs = weight.shape
    source = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(tokens, size, generator=source).to(weight.dtype)  # type: ignore[return-value] # two of them
        for size in (inputs, outputs)
    )


def _run(layer: Layer, given: tuple[Tensor, Tensor], after: After) -> Tensor:
    hidden, residual = given
    with torch.inference_mode():
        return layer(hidden, residual.clone()) if after is After.ADD else layer(hidden)


def _measure(weights: _Weights, candidates: Mapping[Way, Layer]) -> tuple[Way, ...]:
    """The fastest of some ways for each of `SIZES`; what would take long is not timed, and goes as the size before."""
    row = _in_a_row(weights, candidates)
    alone = {way: [layer] for way, layer in candidates.items()}
    found: list[dict[Way, float]] = []
    for tokens in SIZES:
        found.append(_times(row if tokens < _FEW else alone, weights, tokens))
        if min(found[-1].values()) > _LONG_S:
            break
    return _choice([*found, *found[-1:] * (len(SIZES) - len(found))])


def _in_a_row(weights: _Weights, candidates: Mapping[Way, Layer]) -> dict[Way, list[Layer]]:
    """Layers of the same shape, each with weights of its own."""
    row: dict[Way, list[Layer]] = {way: [layer] for way, layer in candidates.items()}
    for _ in range(min(_ROW_BYTES // weights.n_bytes, _LONGEST_ROW) - 1):
        own = replace(weights, weight=weights.weight.clone())
        packed = _pack(own.weight) if any(map(_is_packed, candidates)) else None
        for way in candidates:
            row[way].append(_build(way, own, packed))
    return row


def _choice(seconds: Sequence[Mapping[Way, float]]) -> tuple[Way, ...]:
    """The fastest way for each of `SIZES`, from the seconds of each for each of them."""

    def least(of_size: Mapping[Way, float], *, packed: bool) -> float:
        return min((some for way, some in of_size.items() if _is_packed(way) is packed), default=math.inf)

    pays = any(least(of_size, packed=True) < _GAIN * least(of_size, packed=False) for of_size in seconds)
    allowed = [way for way in seconds[0] if pays or not _is_packed(way)]
    return tuple(min(allowed, key=of_size.__getitem__) for of_size in seconds)


def _times(layers: Mapping[Way, Sequence[Layer]], weights: _Weights, tokens: int) -> dict[Way, float]:
    """Seconds of a layer in the fastest round of each way, in turn: so what else the machine does meets all of them."""
    seconds, spent_s = dict.fromkeys(layers, math.inf), 0.0
    given = _made_up(weights.weight, tokens)
    for number in range(_ROUNDS):
        for way, row in layers.items():
            before_s = time.perf_counter()
            for layer in row:
                _run(layer, given, weights.after)
            run_s = time.perf_counter() - before_s
            spent_s += run_s
            if number > 0:  # the first one meets cold caches
                seconds[way] = min(seconds[way], run_s / len(row))
        if number > 0 and spent_s > _ENOUGH_S * len(layers):
            break
    return seconds


def _build(way: Way, weights: _Weights, packed: Tensor | None) -> Layer:
    """A layer: closures, for what Python does in each of some dozen calls counts for a single query."""
    if way is Way.IN_PLACE:
        return _in_place(weights)
    product = _plain(weights) if packed is None else _packed_layer(weights, packed, fused=way is Way.PACKED)
    if way is Way.PACKED:
        return product
    return _followed(product, weights.after)


def _plain(weights: _Weights) -> Layer:
    weight, bias = weights.weight, weights.bias
    return lambda hidden: linear(hidden, weight, bias)


def _in_place(weights: _Weights) -> Layer:
    turned, bias = weights.weight.t(), weights.bias
    return lambda hidden, residual: residual.add_(bias).addmm_(hidden, turned)


def _followed(product: Layer, after: After) -> Layer:
    """Then what comes after it, in a pass of its own, which needs no memory."""
    match after:
        case After.NOTHING:
            return product
        case After.GELU:
            return lambda hidden: gelu_(product(hidden))
        case After.GELU_TANH:
            return lambda hidden: gelu_(product(hidden), approximate="tanh")
        case After.RELU:
            return lambda hidden: product(hidden).relu_()
        case After.ADD:
            return lambda hidden, residual: product(hidden).add_(residual)


def _pack(weight: Tensor) -> Tensor:
    """A copy in oneDNN's own layout."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


_POINTWISE: dict[After, tuple[str, str]] = {
    After.NOTHING: ("none", ""),
    After.GELU: ("gelu", "none"),
    After.GELU_TANH: ("gelu", "tanh"),
    After.RELU: ("relu", ""),
}
"""What oneDNN calls it: the function, and its algorithm where there are several."""


def _packed_layer(weights: _Weights, packed: Tensor, *, fused: bool) -> Layer:
    bias = weights.bias
    if fused and weights.after is After.ADD:
        adding = torch.ops.mkldnn._linear_pointwise.binary
        return lambda hidden, residual: adding(hidden, residual, packed, bias, "add")
    function, algorithm = _POINTWISE[weights.after if fused else After.NOTHING]
    pointwise = torch.ops.mkldnn._linear_pointwise.default
    scalars: list[float] = []
    return lambda hidden: pointwise(hidden, packed, bias, function, scalars, algorithm)
