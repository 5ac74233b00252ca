"""Check and tokenise a request. Everything that can be refused is refused here, before anything is queued."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from embedstream.shared.errors import InputTooLong, InvalidInput, NotServed, Unavailable
from embedstream.shared.jobs import MAX_BODY_BYTES, text_lengths
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

MAX_TEXT_BYTES = MAX_BODY_BYTES - 4
"""Of a text that a consumer is to tokenise: it must fit one job."""

_MAX_ID = np.iinfo(np.int64).max
_MAX_OPTION = 2**31  # what a job has room for, and more than any model offers


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


async def prepare_texts(inputs: Inputs, options: Options, model: str) -> Prepared:
    """Check what can be checked while nobody has told what the model is like; its consumer does the rest.

    Args:
        inputs: texts.
        options: how to treat them.
        model: first served name.

    Raises:
        InvalidInput: something in it can be served by no model; nothing has been queued.
        Unavailable: token ids, which only the model's card can tell to be right.
    """
    if not _are_texts(inputs):
        raise Unavailable(
            f"Token ids cannot be checked before the first consumer of `{model}` has told what they mean; send texts.",
            retry_after_s=2.0,
        )
    _check_option(options.truncate_prompt_tokens, "truncate_prompt_tokens", other=-1)
    _check_option(options.vectors.dimensions, "dimensions")
    lengths = await asyncio.to_thread(_text_bytes, inputs)
    return Prepared(None, inputs, Tokens(np.empty(0, np.uint32), lengths), options, model)


def _text_bytes(texts: Sequence[str]) -> NDArray[np.uint32]:
    try:
        lengths = text_lengths(tuple(texts))
    except UnicodeEncodeError as error:
        index = next(index for index, text in enumerate(texts) if text == error.object)
        raise InvalidInput(
            f"The input at index {index} is not valid Unicode: a lone surrogate "
            f"U+{ord(error.object[error.start]):04X} at character {error.start}.",
            param="input",
        ) from None
    if lengths.max() > MAX_TEXT_BYTES:
        index = int(np.argmax(lengths))
        raise InputTooLong(
            f"The input at index {index} has {int(lengths[index])} bytes of text; at most {MAX_TEXT_BYTES} are taken "
            "while no consumer of the model is up.",
            param="input",
        )
    return lengths


def _check_option(value: int | None, param: str, other: int | None = None) -> None:
    if value is not None and value != other and not 1 <= value < _MAX_OPTION:
        also = "" if other is None else f"{other} or "
        raise InvalidInput(f"{param} must be {also}at least 1 and less than {_MAX_OPTION} (got {value}).", param=param)


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
    if len(inputs) == 0:
        raise InvalidInput("You must pass at least one prompt: the list of inputs is empty.", param="input")
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
