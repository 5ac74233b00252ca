"""Batches without padding through any model of transformers whose attention and positions can be told from outside.

The batch is one row of all its tokens, with the place of each in its own sequence. An attention function that is
registered with transformers attends inside each sequence; a mask function beside it sees what the model would mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from .attention import AS_USUAL, Pattern, Tuning, attend
from .layout import Layout
from .packing import Packing
from .patterns import CannotPackError, MaskFunction, Patterns
from .positions import padding_id_of_positions

_NAME = "embedstream_packed"
"""Of the functions below in transformers' registers."""
_MAKES_UNEQUAL = ("position_bias", "s_aux")
"""Arguments that change scores or their sum: relative positions, and sinks."""


@dataclass(slots=True)
class _Pass:
    """What the functions in transformers' registers must know of the pass they are called in."""

    layout: Layout
    patterns: Patterns
    longest: int
    tuning: Tuning
    attended: int = 0


_PASS: ContextVar[_Pass] = ContextVar("pass")


class Packed(Packing):
    """A model of transformers on batches without padding.

    Args:
        module: in evaluation mode, on its device. Between calls it keeps its own attention.
        max_length: most tokens of a sequence that it will meet: its masks are looked at up to there.
        tuning: of attention on devices without a kernel for packed sequences.

    Raises:
        CannotPackError: its positions cannot be given from outside.
    """

    name = "packed"

    def __init__(self, module: torch.nn.Module, max_length: int, tuning: Tuning = AS_USUAL) -> None:
        arguments = inspect.signature(module.forward).parameters
        if "position_ids" not in arguments:
            raise CannotPackError("it takes no positions")
        super().__init__(next(module.parameters()).device, padding_id_of_positions(module))
        self._module = module
        self._max_length = max_length
        self.tuning = tuning
        self._patterns = Patterns()
        self._configs = _configs(module)
        # Without types some models look theirs up in a table that is as long as the longest sequence.
        self._takes_types = "token_type_ids" in arguments and any(
            name.endswith("token_type_embeddings") for name, _ in module.named_modules()
        )

    def run(self, tokens: Tensor, layout: Layout) -> Tensor:
        """See `Packing`: the model's own forward pass.

        Raises:
            CannotPackError: the model masks or attends in a way that is not known here.
        """
        row, positions = tokens.unsqueeze(1).unbind()
        given = {
            "input_ids": row,
            # Without a mask, transformers would look for the sequences itself, and wait for the device to find them.
            "attention_mask": torch.ones_like(row),
            "position_ids": positions,
        }
        if self._takes_types:
            given["token_type_ids"] = torch.zeros_like(row)
        now = _Pass(layout, self._patterns, max(self._max_length, layout.max_length), self.tuning)
        with self._attending(now):
            hidden: Tensor = self._module(**given, return_dict=True).last_hidden_state
        if not now.attended:
            raise CannotPackError("it attends by code of its own")
        return hidden[0]

    @contextmanager
    def _attending(self, now: _Pass) -> Iterator[None]:
        """Other modules may have the same configurations, and this one its own attention in a padded batch."""
        before = [config._attn_implementation_internal for config in self._configs]
        token = _PASS.set(now)
        try:
            for config in self._configs:
                config._attn_implementation_internal = _NAME
            yield
        finally:
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation_internal = name
            _PASS.reset(token)


def _configs(module: torch.nn.Module) -> list[Any]:
    """All that parts of the module ask which attention they use."""
    found = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    configs = [config for config in found.values() if hasattr(config, "_attn_implementation_internal")]
    if not configs:
        raise CannotPackError("its attention cannot be chosen")
    return configs


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Pattern | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: (1, heads, total, head_dim) to (1, total, heads, value_dim), and no weights."""
    now = _PASS.get()
    if query.shape[0] != 1 or query.shape[2] != now.layout.total or key.shape[2] != now.layout.total:
        raise CannotPackError(f"it attends from {tuple(query.shape)} to {tuple(key.shape)}")
    for name in _MAKES_UNEQUAL:
        if kwargs.get(name) is not None:
            raise CannotPackError(f"its attention takes {name}")
    pattern = _pattern(attention_mask, getattr(module, "is_causal", True) if is_causal is None else is_causal)
    output = attend(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        now.layout,
        pattern=Pattern(pattern.left, pattern.right, softcap),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        tuning=now.tuning,
    )
    now.attended += 1
    return output.unsqueeze(0), None


def _pattern(mask: Pattern | Tensor | None, is_causal: bool) -> Pattern:
    if isinstance(mask, Pattern):
        return mask
    if mask is None:  # the model asked for none, and leaves it to its attention
        return Pattern(right=0 if is_causal else None)
    raise CannotPackError("it makes a mask of its own")


def _mask(*, mask_function: MaskFunction, q_length: int, kv_length: int, q_offset: int = 0, **kwargs: Any) -> Pattern:
    """As transformers calls it; what it gives comes back to `_attention` in each layer that the mask is for."""
    now = _PASS.get()
    if q_offset or q_length != now.layout.total or kv_length != now.layout.total:
        raise CannotPackError(f"it masks from {q_length} to {kv_length} tokens")
    return now.patterns.of(mask_function, now.longest)


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)
