"""How the sequences of a batch lie one behind the other, without padding, when attention runs over them in groups."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedstream.consumer.copies import copies_of

from .encoder import Ids


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbours of equal length: their tokens are a matrix.

    Args:
        start: the first token, in packed order.
        rows: sequences, at least 1.
        length: tokens of each, at least 1.
    """

    start: int
    rows: int
    length: int

    @property
    def end(self) -> int:
        """The token behind the last one."""
        return self.start + self.rows * self.length


_CALL_SCORES = 1024
"""A call of a kernel takes as long as so many scores of each head. Measured on AVX2 with 12 heads of 32:
queries of 8 sequences in one call took 0.6 of the time of a call for each length, those of 16 took 1.4 of it."""


class Layout:
    """The packed order of a batch: sequences of equal length stand side by side.

    A batch whose lengths rise or fall already has that order and keeps it; any other one is ordered by length, the
    longest first, and sequences of equal length stay in their order.

    Args:
        lengths: (n,) tokens of each sequence as the batch came, n at least 1, each at least 1.
    """

    def __init__(self, lengths: Ids) -> None:
        given = lengths.astype(np.int64)
        steps = np.diff(given)
        self._order = None if (steps <= 0).all() or (steps >= 0).all() else np.argsort(-given, kind="stable")
        self._given = given
        self.lengths: NDArray[np.int64] = given if self._order is None else given[self._order]
        """(n,) in packed order."""
        self.offsets: NDArray[np.int64] = np.concatenate([[0], np.cumsum(self.lengths)])
        """(n + 1,) where each sequence begins, and the end of the last one."""
        self.total = int(self.offsets[-1])
        """Tokens of the batch."""
        self.max_length = int(self.lengths.max())
        self.kept: dict[Hashable, Any] = {}
        """What attention has worked out for the layers to come, under names of its own."""
        self._on_device: dict[torch.device, Tensor] = {}

    def __len__(self) -> int:
        """Sequences."""
        return len(self.lengths)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """All sequences, in packed order, cut where the length changes."""
        firsts = np.flatnonzero(np.diff(self.lengths, prepend=0))
        rows = np.diff(firsts, append=len(self.lengths))
        columns = (self.offsets[firsts].tolist(), rows.tolist(), self.lengths[firsts].tolist())
        return tuple(Group(start, count, length) for start, count, length in zip(*columns, strict=True))

    @cached_property
    def runs(self) -> tuple[tuple[Group, ...], ...]:
        """`groups`, those together that one call for all their tokens serves faster than a call for each of them.

        In such a call all tokens meet, and most of the scores are hidden: it pays for a few short sequences.
        """
        runs: list[list[Group]] = []
        tokens = scores = 0  # of the last run
        for group in self.groups:
            more = group.rows * group.length
            if runs and (tokens + more) ** 2 <= scores + more * group.length + _CALL_SCORES:
                runs[-1].append(group)
                tokens += more
                scores = tokens**2
            else:
                runs.append([group])
                tokens, scores = more, more * group.length
        return tuple(map(tuple, runs))

    @cached_property
    def positions(self) -> NDArray[np.int64]:
        """(total,) place of each token in its own sequence, from 0, in packed order."""
        return np.arange(self.total) - np.repeat(self.offsets[:-1], self.lengths)

    def cumulative(self, device: torch.device) -> Tensor:
        """`offsets` as (n + 1,) int32 on a device, where it is kept: kernels for packed sequences ask for it."""
        if device not in self._on_device:
            self._on_device[device] = copies_of(device).to_device(self.offsets.astype(np.int32))
        return self._on_device[device]

    def pack(self, ids: Ids) -> Ids:
        """(total,) values of the tokens as the batch came, to packed order."""
        return ids if self._order is None else ids[self._tokens]

    def unpack(self, hidden: Tensor) -> Tensor:
        """(total, …) rows in packed order, to the order in which the batch came."""
        if self._order is None:
            return hidden
        places = np.empty(self.total, np.int64)
        places[self._tokens] = np.arange(self.total)
        return hidden.index_select(0, copies_of(hidden.device).to_device(places))

    @cached_property
    def _tokens(self) -> NDArray[np.int64]:
        """(total,) for each place of the packed order, the place of that token in the batch as it came."""
        starts = np.cumsum(self._given) - self._given
        return self.positions + np.repeat(starts[self._order], self.lengths)
