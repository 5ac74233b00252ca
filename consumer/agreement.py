"""How far vectors are from others that should be the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SAME = 3e-6
"""Largest error in float32 between the same text alone, among others, or by another way."""
REFERENCE = 1e-5
"""Largest error in float32 against sentence-transformers."""
HALF_COSINE = 0.999
"""Least cosine between a vector of a model in bfloat16 or float16 and the one it has in float32."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far some vectors, or matrices of tokens' vectors, are from their references.

    Args:
        error: the largest difference of two components, divided by the largest component of the reference where that
            is above 1.
        at: place of the pair it was found in.
        cosine: the least of all pairs.
        mean_cosine: of all pairs.
        n_pairs: number of pairs.
    """

    error: float
    at: int
    cosine: float
    mean_cosine: float
    n_pairs: int

    @property
    def numbers(self) -> dict[str, float]:
        """For machines."""
        return {"error": self.error, "cosine": self.cosine, "mean_cosine": self.mean_cosine}


def agreement(vectors: Sequence[NDArray[Any]], references: Sequence[NDArray[Any]]) -> Agreement:
    """Compare vectors with their references, pair by pair.

    Args:
        vectors: at least one, each (dim,) or (tokens, dim).
        references: as many; a pair of different shapes has an error without end.
    """
    pairs = [
        (_error(one, other), _cosines(one, other)) if one.shape == other.shape else (float("inf"), np.array([-1.0]))
        for one, other in zip(vectors, references, strict=True)
    ]
    errors = np.array([error for error, _ in pairs])
    cosines = np.concatenate([cosines for _, cosines in pairs])
    worst = int(np.argmax(np.nan_to_num(errors, nan=np.inf)))
    return Agreement(float(errors[worst]), worst, float(cosines.min()), float(cosines.mean()), len(pairs))


def _error(one: NDArray[Any], other: NDArray[Any]) -> float:
    exact = other.astype(np.float64)
    return float(np.abs(one - exact).max() / max(1.0, np.abs(exact).max()))


def _cosines(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float64]:
    """(n,) of the last axis; two zero vectors agree."""
    left, right = np.atleast_2d(one).astype(np.float64), np.atleast_2d(other).astype(np.float64)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    same = (left == right).all(axis=1)
    dots = (left * right).sum(axis=1)
    return np.where(same, 1.0, dots / np.where(norms > 0, norms, 1.0))
