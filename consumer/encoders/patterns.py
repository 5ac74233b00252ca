"""Reads from a mask function of transformers which tokens of its own sequence a token attends to.

Models say what they mask by a function of (batch, head, query, key), made anew for each pass from a few numbers of
their configuration. Packed attention masks by windows: what the function says is compared with them, token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor

from embedstream.shared.errors import EmbedstreamError

from .attention import Pattern, visible

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_LEAST_LENGTH = 1024
"""Shorter sequences are compared at this length: one pattern then does for most batches."""
_ROWS = 1024
"""Queries that are compared with all their keys, spread evenly: of longer sequences not every one."""
_ROWS_AT_ONCE = 64


class CannotPackError(EmbedstreamError):
    """A model does something that cannot be done to a batch without padding. The message says what."""


class Patterns:
    """The patterns of mask functions, each worked out once for all that are made alike."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[int, Pattern]] = {}

    def of(self, function: MaskFunction, length: int) -> Pattern:
        """What a function masks in sequences of up to `length` tokens.

        Raises:
            CannotPackError: something else than windows, or hangs on more than the places of two tokens.
        """
        made_of = _made_of(function)
        known = self._known.get(made_of)
        if known is None or known[0] < length:
            compared = max(_LEAST_LENGTH, length)
            known = compared, _read(function, compared)
            self._known[made_of] = known
        return known[1]


def _made_of(value: Any) -> Hashable:
    """Equal for functions that are the same code with the same numbers in it."""
    if isinstance(value, FunctionType):
        inner = (cell.cell_contents for cell in value.__closure__ or ())
        return value.__code__, *map(_made_of, inner), *map(_made_of, value.__defaults__ or ())
    if isinstance(value, partial):
        keywords = (part for name, given in sorted(value.keywords.items()) for part in (name, _made_of(given)))
        return _made_of(value.func), *map(_made_of, value.args), *keywords
    if isinstance(value, (tuple, list)):
        return tuple(map(_made_of, value))
    if value is None or isinstance(value, (bool, int, float, str, CodeType)):
        return type(value), value
    raise CannotPackError(f"its mask hangs on a {type(value).__name__}")


def _read(function: MaskFunction, length: int) -> Pattern:
    """The pattern of the last query and of the first one, if those between agree."""
    last, first = _seen(function, torch.tensor([length - 1]), length)[0], _seen(function, torch.tensor([0]), length)[0]
    if not last.any() or not first.any():
        raise CannotPackError("its mask hides all tokens from some")
    before, behind = length - 1 - int(last.nonzero()[0]), int(first.nonzero()[-1])
    whole = length - 1
    pattern = Pattern(None if before == whole else before, None if behind == whole else behind)
    step = -(-length // _ROWS)
    for queries in torch.split(torch.arange(0, length, step), _ROWS_AT_ONCE):
        if not torch.equal(_seen(function, queries, length), visible(queries, torch.arange(length), pattern)):
            raise CannotPackError("its mask is not a window that is the same for all tokens")
    return pattern


def _seen(function: MaskFunction, queries: Tensor, length: int) -> Tensor:
    """(queries, length) which keys they see."""
    nought = torch.zeros(1, 1, dtype=torch.int64)
    seen = function(nought, nought, queries.unsqueeze(1), torch.arange(length).unsqueeze(0))
    return seen.to("cpu", torch.bool).expand(len(queries), length)
