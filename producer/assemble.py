"""Whole results, put together from the parts of all jobs of a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedstream.shared.errors import StaleCard
from embedstream.shared.results import ROW_CONTINUES, ROW_TRUNCATED, ResultPart, Timing

from .request import Embeddings


def assemble(parts: list[ResultPart], truncated: int = 0) -> Embeddings:
    """Put the answers to all jobs of a request together, in the order of its inputs.

    Args:
        parts: all of them, in any order, none with a failed row.
        truncated: how many inputs the caller cut itself.

    Raises:
        StaleCard: its jobs were answered by two revisions of the model; their vectors do not belong together.
    """
    for part in parts:
        check_revision(part, parts[0].fingerprint)
    parts = sorted(parts, key=lambda part: (part.job, part.part))
    rows = np.concatenate([part.rows for part in parts])
    whole = rows[rows["flags"] & ROW_CONTINUES == 0]  # a row that goes on is told again by its last piece
    return Embeddings(
        vectors=parts[0].vectors if len(parts) == 1 else np.concatenate([part.vectors for part in parts]),
        tokens=whole["tokens"],
        truncated=truncated + int(np.count_nonzero(whole["flags"] & ROW_TRUNCATED)),
        timing=Timing(
            max(part.timing.queue_us for part in parts),
            max(part.timing.inference_us for part in parts),
            sum(part.timing.compute_tokens for part in parts if part.part == 0),
        ),
    )


def check_revision(part: ResultPart, revision: bytes) -> None:
    """Check that a part belongs to those that came before it.

    Args:
        part: of a request's result.
        revision: fingerprint of the others.

    Raises:
        StaleCard: another revision of the model has answered it.
    """
    if part.fingerprint != revision:
        raise StaleCard("Two revisions of the model have each answered a piece of the request.")


def split_by_input(vectors: NDArray[Any], tokens: NDArray[np.uint32]) -> Sequence[NDArray[Any]]:
    """The matrix of each input.

    Args:
        vectors: (sum of tokens, dim) one for each token.
        tokens: (inputs,) of each input.

    Returns:
        For each input (tokens, dim), as views.
    """
    return np.split(vectors, np.cumsum(tokens, dtype=np.int64)[:-1])
