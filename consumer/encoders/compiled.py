"""Layers compiled by torch.compile, where that makes them faster here.

What follows attention in a layer of BERT is three products of matrices and, between them, sums, norms and an
activation. Compiled, each of those in between is one pass over the numbers. Attention stays as it is: it runs by groups
of sequences, which differ from batch to batch. All layers of a model are one piece of code with other weights, so it is
compiled once, for any number of tokens, and kept on disk.

Nothing is ever compiled while a consumer serves: what would need it runs uncompiled instead.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, relu

from embedstream.consumer.measured import Measurements
from embedstream.shared.cache_folder import cache_folder
from embedstream.shared.logs import get_logger
from embedstream.shared.settings import Settings

from .bert import Rest
from .bert_parts import Layer, Norm
from .encoder import differ
from .linear import SIZES, After

log = get_logger()

_ACTIVATIONS: dict[After, Callable[[Tensor], Tensor]] = {
    After.GELU: gelu,
    After.GELU_TANH: partial(gelu, approximate="tanh"),
    After.RELU: relu,
}
_FIRST_TOKENS = 256
"""Of the run that compiles; any number from 2 on gives the same code. A single token would need its own, and is not
worth it."""
_ROUNDS = 5
_GAIN = 0.95
"""Compiled code must take this part of the time at most; less is noise."""


class Compiler:
    """Compiles what follows attention in layers, and keeps it where it is faster; see `Compiles`.

    From now on this process compiles nothing but by this class.

    Args:
        measured: where it is kept for which numbers of tokens compiled code is faster.
        folder: where compiled code is kept, None where torch does it; the variable TORCHINDUCTOR_CACHE_DIR wins. Code
            in it is run: it must be nobody else's.
    """

    def __init__(self, measured: Measurements, folder: Path | None) -> None:
        self._measured = measured
        self._compiled: dict[tuple[After, float, float], Callable[..., Tensor]] = {}
        self._failed = False
        self.used = False
        """Whether any layer is compiled, for any number of tokens."""
        if folder is not None:
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
        # A layer is one file of C++: by default processes are started to compile many, and stay, each with a torch.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        torch.compiler.set_stance("eager_on_recompile")

    def __call__(self, layer: Layer, uncompiled: Sequence[Rest]) -> Sequence[Rest]:
        """See `Compiles`. Where nothing can be compiled, a warning says why, and all stays as it is."""
        if self._failed or layer.activation not in _ACTIVATIONS:
            return uncompiled
        name = f"compiled-{layer.up.in_features}x{layer.up.out_features}-{layer.activation}"
        faster = _known(self._measured.get(name))
        if faster is not None and not any(faster):
            return uncompiled
        compiled = self._of(layer)
        try:
            with torch.compiler.set_stance("default"), torch.inference_mode():
                _first_run(compiled, layer)
        except Exception as error:  # noqa: BLE001 (compilers fail in many ways, each with errors of its own)
            self._failed = True
            log.warning("compile.failed", reason=_told(error), effect="the model runs uncompiled")
            return uncompiled
        if faster is None:
            with torch.inference_mode():
                faster = [
                    tokens > 1 and _is_faster(compiled, rest, layer, tokens)
                    for tokens, rest in zip(SIZES, uncompiled, strict=True)
                ]
            self._measured.put(name, [*faster])
            log.info("compile.measured", layer=name, faster_at_tokens=_shown(faster))
        self.used |= any(faster)
        return [compiled if wins else rest for wins, rest in zip(faster, uncompiled, strict=True)]

    def _of(self, layer: Layer) -> Rest:
        """Not compiled before it runs."""
        kind = (layer.activation, layer.attended_norm.eps, layer.norm.eps)
        if kind not in self._compiled:
            self._compiled[kind] = torch.compile(_rest_of(*kind), fullgraph=True)
        run = self._compiled[kind]
        weights = _weights(layer)
        return lambda given, hidden: run(given, hidden, *weights)


def compile_folder(settings: Settings) -> Path | None:
    """Where compiled code is kept; None leaves it to torch, as for a user without a home."""
    return settings.compile_cache_dir or cache_folder("compiled")


def _rest_of(activation: After, attended_eps: float, eps: float) -> Callable[..., Tensor]:
    """As torch.compile takes it: all weights are arguments, so that one code does for all layers."""
    activate = _ACTIVATIONS[activation]

    def rest(given: Tensor, hidden: Tensor, *weights: Tensor) -> Tensor:
        attended, attended_bias, gain, shift, up, up_bias, down, down_bias, last_gain, last_shift = weights
        hidden = linear(given, attended, attended_bias) + hidden
        hidden = layer_norm(hidden, gain.shape, gain, shift, attended_eps)
        more = linear(activate(linear(hidden, up, up_bias)), down, down_bias)
        return layer_norm(more + hidden, last_gain.shape, last_gain, last_shift, eps)

    return rest


def _weights(layer: Layer) -> tuple[Tensor, ...]:
    """In the order of `_rest_of`."""

    def of_norm(norm: Norm) -> tuple[Tensor, Tensor]:
        return norm.weight.detach(), norm.bias.detach()

    def of_linear(module: torch.nn.Linear) -> tuple[Tensor, Tensor]:
        return module.weight.detach(), module.bias.detach()

    return (
        *of_linear(layer.attended),
        *of_norm(layer.attended_norm),
        *of_linear(layer.up),
        *of_linear(layer.down),
        *of_norm(layer.norm),
    )


def _first_run(compiled: Rest, layer: Layer) -> None:
    given, hidden = _made_up(layer, _FIRST_TOKENS)
    for argument in (given, hidden):
        torch._dynamo.mark_dynamic(argument, 0)  # documented, though below a private name
    compiled(given, hidden)


def _is_faster(compiled: Rest, uncompiled: Rest, layer: Layer, tokens: int) -> bool:
    """Whether compiled code is faster for so many tokens, and gives the same numbers."""
    given, hidden = _made_up(layer, tokens)
    if differ(compiled(given, hidden), uncompiled(given, hidden.clone())):
        log.warning("compile.differs", tokens=tokens, effect="such batches run uncompiled")
        return False
    seconds = {compiled: math.inf, uncompiled: math.inf}
    for _ in range(_ROUNDS):  # in turn: so what else the machine does meets both
        for rest in seconds:
            copy = hidden.clone()
            started_s = time.perf_counter()
            _wait_for(rest(given, copy))
            seconds[rest] = min(seconds[rest], time.perf_counter() - started_s)
    return seconds[compiled] < _GAIN * seconds[uncompiled]


def _made_up(layer: Layer, tokens: int) -> tuple[Tensor, Tensor]:
    """Both arguments of a layer's rest."""
    weight, source = layer.attended.weight, torch.Generator().manual_seed(0)
    outputs, inputs = weight.shape
    given, hidden = (torch.randn(tokens, size, generator=source).to(weight) for size in (inputs, outputs))
    return given, hidden


def _wait_for(result: Tensor) -> None:
    if result.device.type == "cuda":
        torch.cuda.synchronize(result.device)


def _known(found: object) -> list[bool] | None:
    """What was measured before, where it can be used."""
    if isinstance(found, list) and len(found) == len(SIZES) and all(isinstance(one, bool) for one in found):
        return [bool(one) for one in found]
    return None


def _shown(faster: Sequence[bool]) -> list[int]:
    return [tokens for tokens, wins in zip(SIZES, faster, strict=True) if wins]


def _told(error: Exception) -> str:
    """Which part of the compiler failed, and with what; the lines behind these say how to see more."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join([f"{type(error).__name__}:", *lines[:2]])
