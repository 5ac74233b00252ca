"""Batches at the edges of what they may be: of one sequence, of one token, of very unequal ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from embedstream.consumer.model import Model
from embedstream.shared.recipe import Pooling
from embedstream.shared.tokenization import Tokens

from . import served

Rows = Sequence[NDArray[np.uint32]]

_MANY = 50


def error_at_edges(model: Model, reference: SentenceTransformer) -> float:
    """The largest error of a hidden state or a mean, as `served.error` has it."""
    errors = []
    for rows in _batches(model):
        tokens = Tokens(np.concatenate(rows), np.array([len(row) for row in rows], np.uint32))
        expected = [_theirs(reference, row) for row in rows]
        hidden = served.ours_of_tokens(model, tokens, (Pooling.ALL,))
        means = served.ours_of_tokens(model, tokens, (Pooling.MEAN,))
        errors.append(served.error(hidden, expected))
        errors.append(served.error(means, [states.mean(axis=0) for states in expected]))
    return max(errors)


def _batches(model: Model) -> Iterator[Rows]:
    """Of token ids: special tokens are at the beginning of every vocabulary here, and none of them has an effect."""
    generator = np.random.default_rng(0)
    longest = model.recipe.max_length

    def row(length: int) -> NDArray[np.uint32]:
        return generator.integers(10, model.recipe.vocab_size, length).astype(np.uint32)

    yield [row(7)]
    yield [row(1)]
    yield [row(longest)]
    yield [row(longest), *(row(1) for _ in range(_MANY))]
    yield [row(1), row(longest), row(1), row(longest), row(2)]


def _theirs(reference: SentenceTransformer, row: NDArray[np.uint32]) -> NDArray[np.float32]:
    """(tokens, dim) hidden states of a sequence by itself."""
    ids = torch.from_numpy(row.astype(np.int64)).unsqueeze(0)
    forward: Any = reference.forward
    with torch.no_grad():
        states: NDArray[np.float32] = forward({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[
            "token_embeddings"
        ][0].numpy()
    return states
