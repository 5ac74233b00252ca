"""The arithmetic of `make bench-engine`: rates of rounds, ratios of sides, and how near vectors are. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with the least and the largest value."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def cell(self, digits: int = 2) -> str:
        """For a table: `1.30 (1.27-1.34)`."""
        return f"{self.median:,.{digits}f} ({self.least:,.{digits}f}–{self.most:,.{digits}f})"  # noqa: RUF001


def ratios(of: Sequence[float], to: Sequence[float]) -> Spread:
    """One side by another, round by round: what slows a whole round down slows both, and cancels out.

    Args:
        of: a figure of each round.
        to: the same of the other side, in the same rounds.
    """
    return Spread.of([one / other for one, other in zip(of, to, strict=True)])


def turns(names: Sequence[str], round_number: int) -> list[str]:
    """The order of a round: each round another side begins, so that none always comes after the same one."""
    first = round_number % len(names)
    return [*names[first:], *names[:first]]


@dataclass(frozen=True, slots=True)
class Setting:
    """How a side is run: its way to work, its batches, and what it reached with them.

    Args:
        way: of `Side.ways`.
        budget: most tokens of a batch, padding included.
        rate: tokens per second.
    """

    way: str
    budget: int
    rate: float


def goes_on(tried: Sequence[Setting], batch_s: float, most_batch_s: float) -> bool:
    """Whether a search that doubles the batches is to try still larger ones.

    Args:
        tried: so far, the smallest batches first.
        batch_s: seconds of the last batch.
        most_batch_s: that a batch may take for the search to end in time.
    """
    best = max(setting.rate for setting in tried)
    falling = len(tried) > 2 and max(setting.rate for setting in tried[-2:]) < 0.95 * best
    return not falling and 2 * batch_s <= most_batch_s


def best(tried: Sequence[Setting]) -> Setting:
    """The fastest one."""
    return max(tried, key=lambda setting: setting.rate)


def batches_for(seconds: float, rate: float, tokens: int, count: int) -> int:
    """How many of a set's batches fit a time, at least one.

    Args:
        seconds: there are.
        rate: tokens per second.
        tokens: of the whole set.
        count: its batches.
    """
    return max(1, min(count, round(seconds * rate / (tokens / count))))


def least_cosine(ours: Matrix, exact: Matrix) -> float:
    """The smallest cosine between (n, dim) vectors and those they should be; NaN when any is no number."""
    one, other = np.asarray(ours, np.float64), np.asarray(exact, np.float64)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.min(np.sum(one * other, axis=1) / lengths))


def agree_where_both(
    theirs: tuple[NDArray[np.int64], Matrix], exact: tuple[NDArray[np.int64], Matrix]
) -> tuple[int, float]:
    """How many texts two sides have computed both, and their least cosine.

    Args:
        theirs: (n,) places of texts, (n, dim) their vectors.
        exact: the same of the side to compare with.
    """
    places, one, other = np.intersect1d(theirs[0], exact[0], return_indices=True)
    return len(places), least_cosine(theirs[1][one], exact[1][other]) if len(places) else float("nan")


def percentile(values: Sequence[float], share: float) -> float:
    """The value that such a share, of 1, of the values does not exceed."""
    return float(np.percentile(np.asarray(values), 100 * share))


def medians(samples: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Of each side."""
    return {name: statistics.median(values) for name, values in samples.items()}
