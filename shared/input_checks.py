"""Inputs that a model cannot read: what the limits of a request mean for it, and which inputs break them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from .errors import InputTooLong, InvalidInput, UnknownTokenId
from .recipe import Recipe
from .tokenization import check_room, offsets


def resolve_truncation(truncate_prompt_tokens: int | None, recipe: Recipe, n_special: int) -> int | None:
    """What `truncate_prompt_tokens` of a request means for this model.

    Args:
        truncate_prompt_tokens: most tokens of an input; -1 is the model's limit; None cuts nothing.
        recipe: the model's limit.
        n_special: special tokens that stay: those of the tokenizer for texts cut on the model's side, else 0.

    Returns:
        Most tokens of an input, or None.

    Raises:
        InvalidInput: the number is not legal; the message says which are.
    """
    if truncate_prompt_tokens is None:
        return None
    limit = recipe.max_length if truncate_prompt_tokens == -1 else truncate_prompt_tokens
    if limit > recipe.max_length:
        raise InvalidInput(
            "truncate_prompt_tokens value is greater than max_model_len. Please request a smaller truncation size. "
            f"(at most {recipe.max_length}, got {limit})",
            param="truncate_prompt_tokens",
        )
    check_room(limit, n_special)
    return limit


def too_long(lengths: NDArray[np.integer], max_length: int) -> Iterator[tuple[int, InputTooLong]]:
    """The inputs the model cannot read whole, each with what to tell: words clients of vLLM know, then what to do.

    Args:
        lengths: (inputs,) tokens of each input of the request.
        max_length: the recipe's.
    """
    for index in np.flatnonzero(lengths > max_length).tolist():
        yield (
            index,
            InputTooLong(
                f"This model's maximum context length is {max_length} tokens. However, your prompt contains at least "
                f"{max_length + 1} input tokens, which exceeds this limit even without any output tokens. Please "
                f"reduce the length of the input prompt. (parameter=input_tokens, value={max_length + 1}) "
                f"The input at index {index} has {int(lengths[index])} tokens; "
                'send "truncate_prompt_tokens": -1 to have long inputs cut.',
                param="input_tokens",
            ),
        )


def long_texts(
    texts: Sequence[str], max_length: int, max_token_chars: int, prompt_chars: int = 0
) -> Iterator[tuple[int, InputTooLong]]:
    """The texts that no usual tokenisation brings below the limit: they need not cost any tokenising.

    Args:
        texts: the inputs of the request; only for those that are not to be cut.
        max_length: the recipe's.
        max_token_chars: the tokenizer's.
        prompt_chars: of the prompt before each.
    """
    most = max_length * max_token_chars
    for index, text in enumerate(texts):
        n_chars = prompt_chars + len(text)
        if n_chars > most:
            yield (
                index,
                InputTooLong(
                    f"This model's maximum context length is {max_length} tokens. However, your prompt contains "
                    f"{n_chars} characters (more than {most} characters, which is the upper bound for {max_length} "
                    "input tokens). Please reduce the length of the input prompt. "
                    f"(parameter=input_text, value={n_chars}) The input at index {index} is meant; "
                    'send "truncate_prompt_tokens": -1 to have long inputs cut.',
                    param="input_text",
                ),
            )


def without_tokens(lengths: NDArray[np.integer]) -> Iterator[tuple[int, InvalidInput]]:
    """The inputs without tokens, each with what to tell: there is nothing to make a vector of."""
    for index in np.flatnonzero(lengths == 0).tolist():
        yield (
            index,
            InvalidInput(
                f"The decoder prompt cannot be empty: the input at index {index} has no tokens.", param="input"
            ),
        )


def unknown_ids(
    ids: NDArray[np.integer], lengths: NDArray[np.integer], vocab_size: int
) -> Iterator[tuple[int, UnknownTokenId]]:
    """The inputs with a token id the model has no embedding for, each with its first one.

    Args:
        ids: (total,) any integer type, as the caller sent them.
        lengths: (inputs,) adding up to `total`.
        vocab_size: the recipe's.
    """
    places = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    owners = np.searchsorted(offsets(lengths), places, side="right") - 1
    for index, first in zip(*np.unique(owners, return_index=True), strict=True):
        yield (
            int(index),
            UnknownTokenId(
                f"Token id {int(ids[places[first]])} is out of vocabulary: this model's token ids are 0 to "
                f"{vocab_size - 1} (input at index {index}).",
                param="input",
            ),
        )
