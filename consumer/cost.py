"""What sequences cost a device, and which of those that wait go together. Pure; no I/O.

Cost is counted in tokens: the linear layers of a transformer take a time that grows with the tokens, its attention one
that grows with the square of each sequence. A sequence of the length at which both take as long, the knee, so counts
twice its tokens. Where a batch is filled up, all of it is as long as its longest sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LIKE, LIKE_TOKENS = 2, 32
"""Rows are filled up to this multiple of the shortest plus so many tokens: beyond, padding costs more than a batch."""
PASS_TOKENS = 64
"""What a batch costs beside its rows, where it was not measured: as on a CPU; on a GPU it is thousands."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """What batches cost, in tokens.

    Args:
        fills_up: whether every sequence costs as much as the longest one of its batch.
        knee: length at which attention costs as much as all the rest; 0 where it is not known, and counts nothing.
        pass_tokens: what each batch costs beside its rows. It is no part of the cost that a budget bounds.
    """

    fills_up: bool = True
    knee: int = 0
    pass_tokens: int = PASS_TOKENS

    def of_rows(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """(rows,) the cost of each sequence by itself, from their tokens (rows,)."""
        return lengths + lengths * lengths // self.knee if self.knee else lengths

    def of(self, lengths: NDArray[np.int64]) -> int:
        """The cost of a batch of sequences of so many tokens (rows,)."""
        if not len(lengths):
            return 0
        costs = self.of_rows(lengths)
        return len(costs) * int(costs.max()) if self.fills_up else int(costs.sum())

    def choose(self, lengths: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
        """Which rows go next: the oldest one and those of like length.

        Without padding, those nearest in length until the budget is full, and then whatever fits into what is left.
        With it, the group around the oldest one that computes most for its cost.

        Args:
            lengths: (rows,) in order of arrival, at least one.
            budget: highest cost of the batch; a single row may exceed it.

        Returns:
            Places in `lengths`, longest row first.
        """
        places = self._group(lengths, budget) if self.fills_up else self._nearest(lengths, budget)
        return places[np.argsort(-lengths[places], kind="stable")]

    def beside(self, lengths: NDArray[np.int64], batch: NDArray[np.int64], most: int) -> NDArray[np.int64]:
        """Which other rows fit into a batch: where it is filled up, none that makes it wider.

        Args:
            lengths: (rows,) of those that wait, in order of arrival.
            batch: (n,) lengths of those that go.
            most: highest cost of both together.
        """
        room = most - self.of(batch)
        if not self.fills_up:
            return _fitting(self.of_rows(lengths), np.arange(len(lengths)), room)
        narrow = np.flatnonzero(lengths <= batch.max())
        rows = max(0, room) // int(self.of_rows(batch).max())
        return narrow[np.argsort(-lengths[narrow], kind="stable")][:rows]

    def _nearest(self, lengths: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
        near = np.argsort(np.abs(lengths - lengths[0]), kind="stable")  # of like ones the older first
        costs = self.of_rows(lengths)
        rest = _fitting(costs, near[1:], budget - int(costs[0]))
        return np.concatenate([near[:1], rest])

    def _group(self, lengths: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
        order = np.argsort(lengths, kind="stable")
        ordered, oldest = lengths[order], int(np.flatnonzero(order == 0)[0])
        # Each group that ends at the oldest row or beyond, and begins as early as the budget and likeness allow.
        ends = np.arange(oldest + 1, len(ordered) + 1)
        longest = ordered[oldest:]
        most_rows = np.maximum(1, budget // self.of_rows(longest))
        alike = np.searchsorted(ordered, -(-(longest - LIKE_TOKENS) // LIKE), side="left")
        starts = np.maximum(ends - most_rows, alike)
        costs = np.concatenate([[0], np.cumsum(self.of_rows(ordered))])
        useful = (costs[ends] - costs[starts]) / ((ends - starts) * self.of_rows(longest) + self.pass_tokens)
        best = int(np.argmax(np.where(starts <= oldest, useful, -1.0)))
        return order[starts[best] : ends[best]]


def _fitting(costs: NDArray[np.int64], places: NDArray[np.int64], room: int) -> NDArray[np.int64]:
    """Those of some rows that fit: the first ones as they come, then the largest of the others, until none does."""
    chosen, places = [places[:0]], places[costs[places] <= room]
    while len(places):
        taken = int(np.searchsorted(np.cumsum(costs[places]), room, side="right"))
        chosen.append(places[:taken])
        room -= int(costs[places[:taken]].sum())
        places = places[taken:]
        places = places[costs[places] <= room]
        places = places[np.argsort(-costs[places], kind="stable")]
    return np.concatenate(chosen)
