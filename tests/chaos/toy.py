"""A model without a model: vectors that are a function of the token ids, exact in float32, known to both sides."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from embedstream.shared.cards import ModelCard
from embedstream.shared.recipe import Pooling, Recipe
from embedstream.shared.tokenization import offsets

MODEL = "toy"
DIMENSION = 8
VOCABULARY = 4096
KILL, FAIL, HANG = 1, 2, 3
"""Token ids with a will: the process ends, the pass raises, the pass does not return."""
FIRST = 16
"""Ids from here on are ordinary."""
SPAN = VOCABULARY - FIRST

_MODULUS = 16_777_213  # the largest prime below 2^24: every remainder is a float32


def card() -> ModelCard:
    """The card: a text is its ids in decimal, `17 401 33`, and no special tokens are added."""
    tokenizer: Tokenizer = Tokenizer(
        WordLevel({str(number): number for number in range(VOCABULARY)}, unk_token="0")  # noqa: S106 - a word
    )
    tokenizer.pre_tokenizer = WhitespaceSplit()
    recipe = Recipe(
        max_length=512, pooling=(Pooling.MEAN,), normalize=False, dimension=DIMENSION, vocab_size=VOCABULARY
    )
    # Sorted, so that all processes make one card and one fingerprint.
    return ModelCard(MODEL, recipe, json.dumps(json.loads(tokenizer.to_str()), sort_keys=True), "1")


def vectors(ids: NDArray[np.integer], lengths: NDArray[np.integer]) -> NDArray[np.float32]:
    """(rows, 8) of rows that lie one behind the other; every id and its place count."""
    starts = offsets(lengths)
    place = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    factors = 7 * place[:, None] + 131 * np.arange(DIMENSION) + 1
    terms = (ids.astype(np.int64)[:, None] + 1) ** 2 * factors % _MODULUS
    sums: NDArray[np.float32] = (np.add.reduceat(terms, starts[:-1]) % _MODULUS).astype(np.float32)
    return sums


def expected(inputs: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    """(inputs, 8) what a caller must get."""
    return vectors(np.concatenate([np.array(row) for row in inputs]), np.array([len(row) for row in inputs]))


def tagged(number: int, row: int, body: Sequence[int]) -> tuple[int, ...]:
    """An input that says which request it is of, and which row: no two inputs of a run are equal."""
    high, low = divmod(number % (SPAN * SPAN), SPAN)
    return (FIRST + high, FIRST + low, FIRST + row % SPAN, *body)


def tag_of(ids: Sequence[int]) -> int:
    """The number of the request that an input is of."""
    return (int(ids[0]) - FIRST) * SPAN + int(ids[1]) - FIRST
