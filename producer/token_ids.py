"""Token ids as callers give them, one sequence for each input, made into columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedstream.shared.errors import InvalidInput

from .failures import Refusals
from .request import Inputs

_MAX_ID = np.iinfo(np.int64).max


def sequences(inputs: Inputs) -> Sequence[Sequence[int]]:
    """The inputs, once it is seen that each is a sequence.

    Raises:
        InvalidInput: one is something else.
    """
    for index, row in enumerate(inputs):
        if not isinstance(row, (list, tuple, np.ndarray)):
            raise InvalidInput(
                f"Inputs are texts or sequences of token ids; the input at index {index} is a {type(row).__name__}.",
                param="input",
            )
    return inputs  # type: ignore[return-value] # checked above


def columns(rows: Sequence[Sequence[int]], refusals: Refusals) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """All ids one behind the other, and the length of each input; one that is not of integers is refused, and empty.

    Args:
        rows: the inputs.
        refusals: told of those that are refused.

    Returns:
        (sum of lengths,) and (inputs,).
    """
    made = []
    for index, row in enumerate(rows):
        try:
            column: NDArray[Any] = np.asarray(row) if len(row) else np.empty(0, np.int64)
        except (OverflowError, ValueError):  # nested, each in its own way
            column = np.empty((0, 0))
        # Not by asking for integers: numpy would then take 1.7, "7" and True for ids.
        if column.ndim != 1 or column.dtype.kind not in "iu" or (len(column) and column.max() > _MAX_ID):
            reason = InvalidInput(
                f"The input at index {index} must be one flat sequence of token ids; something in it is nested, or not "
                "an integer of at most 64 bits.",
                param="input",
            )
            refusals.refuse(index, reason)
            column = np.empty(0, np.int64)
        made.append(column)
    lengths = np.fromiter(map(len, made), np.uint32, len(made))
    return np.concatenate(made).astype(np.int64), lengths
