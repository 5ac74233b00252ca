"""Prompts that a model reads but leaves out of the vector (`include_prompt` false), and what they do not go with."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from .errors import InputTooLong, InvalidInput
from .jobs import TruncationSide
from .recipe import Recipe

NOT_IN_PIECES = (
    "and cannot be embedded in pieces: the model leaves its prompt out of the vector, and only the first piece has it."
)
"""Why a long input is refused, after how long it is."""


def is_left_out(recipe: Recipe, prompt: str, *, per_token: bool) -> bool:
    """Whether the tokens of a prompt are not pooled.

    Args:
        recipe: the model's.
        prompt: its text.
        per_token: whether each token gets its vector; then those of the prompt do too.
    """
    return bool(prompt) and not recipe.include_prompt and not per_token


def check_side(side: TruncationSide) -> None:
    """Refuse to cut texts at the end where the prompt is that is left out: nobody could tell what is left of it.

    Raises:
        InvalidInput: they are to be cut on the left.
    """
    if side is TruncationSide.LEFT:
        raise InvalidInput(
            "Texts cannot be cut on the left (truncation_side) with a prompt that the model leaves out of the vector.",
            param="truncation_side",
        )


def not_in_pieces(lengths: NDArray[np.integer], max_length: int) -> Iterator[tuple[int, InputTooLong]]:
    """The inputs that would have to be cut into pieces, each with what to tell.

    Args:
        lengths: (inputs,) tokens of each input of the request, prompt included.
        max_length: the recipe's.
    """
    for index in np.flatnonzero(lengths > max_length).tolist():
        yield (
            index,
            InputTooLong(
                f"The input at index {index} has {int(lengths[index])} tokens, more than the model's {max_length}, "
                f"{NOT_IN_PIECES}",
                param="input_tokens",
            ),
        )
