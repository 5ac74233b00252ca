"""Whole results, put together from the slices of a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedstream.shared.errors import StaleCard
from embedstream.shared.options import VectorOptions
from embedstream.shared.results import ROW_CONTINUES, ResultPart, Timing

from .merging import Merger
from .request import EmbeddedSlice, Embeddings
from .rows import RowPlan


def assemble(slices: Sequence[EmbeddedSlice]) -> Embeddings:
    """Put all slices of a request together.

    Args:
        slices: in order, at least one.
    """
    vectors = [piece.vectors for piece in slices]
    dim = max(part.shape[1] for part in vectors)
    # Where all inputs of a slice failed before anybody told the size of a vector, its zeros have none yet.
    vectors = [part if part.shape[1] == dim else np.zeros((len(part), dim), part.dtype) for part in vectors]
    return Embeddings(
        vectors=vectors[0] if len(slices) == 1 else np.concatenate(vectors),
        tokens=slices[0].tokens if len(slices) == 1 else np.concatenate([piece.tokens for piece in slices]),
        truncated=sum(piece.truncated for piece in slices),
        timing=Timing(
            max(piece.timing.queue_us for piece in slices),
            max(piece.timing.inference_us for piece in slices),
            sum(piece.timing.compute_tokens for piece in slices),
        ),
        failures={index: failure for piece in slices for index, failure in piece.failures.items()},
    )


def assemble_parts(parts: Sequence[ResultPart], plan: RowPlan | None) -> Embeddings:
    """Put the answers to all jobs of a request together.

    Args:
        parts: all of them, in any order, none with a failed row.
        plan: how its rows make up its inputs; None when each is one.

    Raises:
        StaleCard: its jobs were answered by two revisions of the model; their vectors do not belong together.
        JobFailed: they are not what the plan says.
    """
    for part in parts:
        check_revision(part, parts[0].fingerprint)
    parts = sorted(parts, key=lambda part: (part.job, part.part))
    merger = Merger(plan or _plain(parts))
    slices = [piece for part in parts if (piece := merger.add(part)) is not None]
    last = merger.finish()
    return assemble(slices if last is None else [*slices, last])


def _plain(parts: Sequence[ResultPart]) -> RowPlan:
    """Each row is an input: there are as many as are told to their end."""
    rows = sum(int(np.count_nonzero(part.rows["flags"] & ROW_CONTINUES == 0)) for part in parts)
    per_token = any((part.rows["vectors"] != 1).any() for part in parts)
    return RowPlan(np.ones(rows, np.uint32), VectorOptions(dtype=parts[0].dtype, per_token=per_token))


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
