"""Check and tokenise a request. Everything that can be refused is refused here, before anything is queued."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from embedstream.shared.errors import InvalidInput, NotServed
from embedstream.shared.recipe import Pooling
from embedstream.shared.tokenization import (
    Tokens,
    check_ids,
    check_length,
    check_not_empty,
    check_text_length,
    cut,
    resolve_truncation,
)

from .fleet import ServedModel
from .request import Inputs, Options, Prepared

ON_LOOP_CHARS = 2_000
INPUT_CHARS = 20
"""Requests up to this size are prepared on the event loop (about 1 ms), where an input counts as so many characters
more; a thread costs 0.1 ms."""
ON_LOOP_IDS = 20_000

_MAX_ID = np.iinfo(np.int64).max


async def prepare(inputs: Inputs, options: Options, served: ServedModel) -> Prepared:
    """Check a request and turn it into columns.

    Args:
        inputs: texts, or sequences of token ids; not a mixture.
        options: how to treat them.
        served: the model.

    Raises:
        InvalidInput: something in it cannot be served; nothing has been queued.
        NotServed: the model does not make the kind of vectors asked for.
    """
    recipe = served.card.recipe
    if recipe.pooling is Pooling.ALL and not options.vectors.per_token:
        raise NotServed(
            f"The model `{served.card.model}` is served with pooling `all`: one vector for each token. "
            "Use embed_tokens() of the producer library."
        )
    if len(inputs) == 0:
        raise InvalidInput("You must pass at least one prompt: the list of inputs is empty.", param="input")
    if _are_texts(inputs):
        tokens = await _tokenize(inputs, options, served)
        recipe.check_dimensions(options.vectors.dimensions, served.card.model)
        check_not_empty(tokens.lengths)
    else:
        rows = _rows(inputs)
        if sum(map(len, rows)) <= ON_LOOP_IDS:
            tokens = _take_ids(rows, options, served)
        else:
            tokens = await asyncio.to_thread(_take_ids, rows, options, served)
    return Prepared(served.card, inputs, tokens, options)


async def _tokenize(texts: Sequence[str], options: Options, served: ServedModel) -> Tokens:
    recipe, tokenizer = served.card.recipe, served.tokenizer
    n_special = tokenizer.n_special if options.add_special_tokens else 0
    limit = resolve_truncation(options.truncate_prompt_tokens, recipe, n_special)
    if limit is None:
        check_text_length(texts, recipe.max_length, tokenizer.max_token_chars)

    def encode() -> Tokens:
        return tokenizer.encode(texts, add_special_tokens=options.add_special_tokens, truncate_to=limit)

    small = sum(map(len, texts)) + INPUT_CHARS * len(texts) <= ON_LOOP_CHARS
    tokens = encode() if small else await asyncio.to_thread(encode)
    if limit is None:
        check_length(tokens.lengths, recipe.max_length)
    return tokens


def _are_texts(inputs: Inputs) -> TypeGuard[Sequence[str]]:
    texts = sum(isinstance(item, str) for item in inputs)
    if 0 < texts < len(inputs):
        raise InvalidInput("Texts and token ids cannot be mixed in one request.", param="input")
    return texts > 0


def _rows(inputs: Inputs) -> Sequence[Sequence[int]]:
    for index, row in enumerate(inputs):
        if not isinstance(row, (list, tuple, np.ndarray)):
            raise InvalidInput(
                f"Inputs are texts or sequences of token ids; the input at index {index} is a {type(row).__name__}.",
                param="input",
            )
    return inputs  # type: ignore[return-value] # checked above


def _take_ids(rows: Sequence[Sequence[int]], options: Options, served: ServedModel) -> Tokens:
    recipe = served.card.recipe
    ids, lengths = _columns(rows)
    limit = resolve_truncation(options.truncate_prompt_tokens, recipe, n_special=0)
    if limit is None:
        check_length(lengths, recipe.max_length)
    recipe.check_dimensions(options.vectors.dimensions, served.card.model)
    check_ids(ids, lengths, recipe.vocab_size)
    return cut(ids, lengths, recipe.max_length if limit is None else limit, model_side=recipe.truncation_side)


def _columns(rows: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    lengths = np.fromiter(map(len, rows), np.uint32, len(rows))
    columns = []
    for index, row in enumerate(rows):
        try:
            column: NDArray[Any] = np.asarray(row) if len(row) else np.empty(0, np.int64)
        except (OverflowError, ValueError):  # nested, each in its own way
            column = np.empty((0, 0))
        # Not by asking for integers: numpy would then take 1.7, "7" and True for ids.
        if column.ndim != 1 or column.dtype.kind not in "iu" or (len(column) and column.max() > _MAX_ID):
            raise InvalidInput(
                f"The input at index {index} must be one flat sequence of token ids; something in it is nested, or not "
                "an integer of at most 64 bits.",
                param="input",
            )
        columns.append(column)
    return np.concatenate(columns).astype(np.int64), lengths
