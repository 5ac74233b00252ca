"""Check and tokenise a request. Everything that can be refused is refused here, before anything is queued."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TypeGuard

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
"""Texts up to this many characters in all are tokenised on the event loop (about 1 ms); a thread costs 0.1 ms more."""


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
        ids, lengths = _columns(inputs)  # type: ignore[arg-type] # not texts, so ids
        limit = resolve_truncation(options.truncate_prompt_tokens, recipe, n_special=0)
        if limit is None:
            check_length(lengths, recipe.max_length)
        recipe.check_dimensions(options.vectors.dimensions, served.card.model)
        check_ids(ids, lengths, recipe.vocab_size)
        most = recipe.max_length if limit is None else limit
        tokens = cut(ids, lengths, most, model_side=recipe.truncation_side)
    return Prepared(served.card, inputs, tokens, options)


async def _tokenize(texts: Sequence[str], options: Options, served: ServedModel) -> Tokens:
    recipe, tokenizer = served.card.recipe, served.tokenizer
    n_special = tokenizer.n_special if options.add_special_tokens else 0
    limit = resolve_truncation(options.truncate_prompt_tokens, recipe, n_special)
    if limit is None:
        check_text_length(texts, recipe.max_length, tokenizer.max_token_chars)

    def encode() -> Tokens:
        return tokenizer.encode(texts, add_special_tokens=options.add_special_tokens, truncate_to=limit)

    small = sum(map(len, texts)) <= ON_LOOP_CHARS
    tokens = encode() if small else await asyncio.to_thread(encode)
    if limit is None:
        check_length(tokens.lengths, recipe.max_length)
    return tokens


def _are_texts(inputs: Inputs) -> TypeGuard[Sequence[str]]:
    texts = sum(isinstance(item, str) for item in inputs)
    if 0 < texts < len(inputs):
        raise InvalidInput("Texts and token ids cannot be mixed in one request.", param="input")
    return texts > 0


def _columns(inputs: Sequence[Sequence[int] | NDArray[np.integer]]) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    lengths = np.fromiter((len(ids) for ids in inputs), np.uint32, len(inputs))
    try:
        columns = [np.asarray(ids, dtype=np.int64) for ids in inputs]
    except (OverflowError, TypeError, ValueError) as error:
        raise InvalidInput(f"A token id is not an integer of at most 64 bits: {error}", param="input") from error
    if any(column.ndim != 1 for column in columns):
        raise InvalidInput("Each input must be one flat sequence of token ids.", param="input")
    return np.concatenate(columns), lengths
