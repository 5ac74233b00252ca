"""Micro-batches: rows of many jobs within a token budget. Pure; no I/O.

Rows wait as columns. Of the rows that wait, those of like length go together, so that little is padded; the batch
that holds the oldest row goes first, so nothing starves. Interactive rows lead; bulk rows fill what is left, and lead
themselves once they are owed their share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedstream.shared.lanes import LANES, Lane
from embedstream.shared.tokenization import offsets

from .entries import Entry

BULK_SHARE = 0.1
"""The part of all batches that bulk leads while interactive rows keep coming. Batches are counted, not tokens: a
trickle of short queries takes few tokens and all of the device's turns."""
LIKE, LIKE_TOKENS = 2, 32
"""Rows go together up to this multiple of the shortest plus so many tokens: beyond, padding costs more than a batch."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The rows of one forward pass.

    Args:
        entries: the jobs they come from.
        owner: (rows,) place in `entries` of each row's job.
        row: (rows,) which row of its job.
        ids: (sum of lengths,) token ids.
        lengths: (rows,) tokens of each row, longest first.
    """

    entries: tuple[Entry, ...]
    owner: NDArray[np.int64]
    row: NDArray[np.int64]
    ids: NDArray[np.uint32]
    lengths: NDArray[np.int64]

    @property
    def n_rows(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def n_tokens(self) -> int:
        """Tokens without padding."""
        return len(self.ids)


def choose(lengths: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """Which rows go next: the group of like lengths that holds the oldest row.

    Args:
        lengths: (rows,) in order of arrival.
        budget: most tokens of the batch, padding included; a single row may exceed it.

    Returns:
        Places in `lengths`, longest row first.
    """
    order = np.argsort(lengths, kind="stable")
    ordered = lengths[order]
    oldest = int(np.flatnonzero(order == 0)[0])
    start = 0
    while True:
        padded = ordered[start:] * np.arange(1, len(ordered) - start + 1)  # cost of the group that ends at each row
        alike = int(np.searchsorted(ordered[start:], LIKE * int(ordered[start]) + LIKE_TOKENS, side="right"))
        end = start + max(1, min(alike, int(np.searchsorted(padded, budget, side="right"))))
        if oldest < end:
            return order[start:end][::-1]
        start = end


def fill(lengths: NDArray[np.int64], longest: int, room: int) -> NDArray[np.int64]:
    """Which rows of the other lane fit beside a batch without making it wider: the longest that are no longer."""
    fitting = np.flatnonzero(lengths <= longest)
    return fitting[np.argsort(-lengths[fitting], kind="stable")][: max(0, room)]


class _Waiting:
    """The rows of one lane that wait, as columns in order of arrival."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.owner = np.empty(0, np.int64)  # place in `entries`
        self.row = np.empty(0, np.int64)
        self.start = np.empty(0, np.int64)  # of the row in its entry's ids
        self.lengths = np.empty(0, np.int64)

    def add(self, entries: Sequence[Entry]) -> None:
        rows = [entry.waiting_rows() for entry in entries]
        owners = [np.full(len(some), len(self.entries) + place) for place, some in enumerate(rows)]
        starts = [entry.tokens.offsets[some] for entry, some in zip(entries, rows, strict=True)]
        lengths = [entry.tokens.lengths[some].astype(np.int64) for entry, some in zip(entries, rows, strict=True)]
        self.entries += entries
        self.owner = np.concatenate([self.owner, *owners])
        self.row = np.concatenate([self.row, *rows])
        self.start = np.concatenate([self.start, *starts])
        self.lengths = np.concatenate([self.lengths, *lengths])

    def take(self, places: NDArray[np.int64]) -> MicroBatch:
        """Remove some rows and make a batch of them."""
        owners, owner = np.unique(self.owner[places], return_inverse=True)
        entries = tuple(self.entries[place] for place in owners)
        row, start, lengths = self.row[places], self.start[places], self.lengths[places]
        bases = offsets(np.fromiter((len(entry.tokens.ids) for entry in entries), np.int64, len(entries)))
        targets = offsets(lengths)
        sources = np.arange(targets[-1]) + np.repeat(bases[owner] + start - targets[:-1], lengths)
        every = [entry.tokens.ids for entry in entries]
        ids = np.concatenate(every)[sources] if every else np.empty(0, np.uint32)
        self._keep(np.delete(np.arange(len(self.lengths)), places))
        return MicroBatch(entries, owner, row, ids, lengths)

    def _keep(self, places: NDArray[np.int64]) -> None:
        owners, self.owner = np.unique(self.owner[places], return_inverse=True)
        self.entries = [self.entries[place] for place in owners]
        self.row, self.start, self.lengths = self.row[places], self.start[places], self.lengths[places]


class RowQueue:
    """Rows that wait for a place in a micro-batch.

    Args:
        budget: most tokens of a batch, padding included.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._lanes = {lane: _Waiting() for lane in LANES}
        self._turns_owed_to_bulk = 0.0

    def __len__(self) -> int:
        return sum(len(lane.lengths) for lane in self._lanes.values())

    def tokens(self, lane: Lane) -> int:
        """Tokens that wait on a lane."""
        return int(self._lanes[lane].lengths.sum())

    def add(self, lane: Lane, entries: Sequence[Entry]) -> None:
        """Let the rows of some jobs wait."""
        if entries:
            self._lanes[lane].add(entries)

    def take(self) -> MicroBatch | None:
        """The next micro-batch, or None when nothing waits."""
        interactive, bulk = self._lanes[Lane.INTERACTIVE], self._lanes[Lane.BULK]
        bulk_leads = len(bulk.lengths) > 0 and (len(interactive.lengths) == 0 or self._turns_owed_to_bulk >= 1)
        lead, other = (bulk, interactive) if bulk_leads else (interactive, bulk)
        if len(lead.lengths) == 0:
            return None
        self._settle(bulk_waits=len(bulk.lengths) > 0, bulk_leads=bulk_leads)
        places = choose(lead.lengths, self.budget)
        longest = int(lead.lengths[places[0]])
        beside = fill(other.lengths, longest, self.budget // max(1, longest) - len(places))
        return _join(lead.take(places), other.take(beside))

    def _settle(self, *, bulk_waits: bool, bulk_leads: bool) -> None:
        """Book a turn. Only a turn of its own pays bulk off: what fills other batches are its short rows alone."""
        if not bulk_waits:
            self._turns_owed_to_bulk = 0.0  # a quiet lane saves nothing up
        elif bulk_leads:
            self._turns_owed_to_bulk = max(0.0, self._turns_owed_to_bulk - 1)
        else:
            self._turns_owed_to_bulk += BULK_SHARE / (1 - BULK_SHARE)


def _join(first: MicroBatch, second: MicroBatch) -> MicroBatch:
    if second.n_rows == 0:
        return first
    return MicroBatch(
        first.entries + second.entries,
        np.concatenate([first.owner, second.owner + len(first.entries)]),
        np.concatenate([first.row, second.row]),
        np.concatenate([first.ids, second.ids]),
        np.concatenate([first.lengths, second.lengths]),
    )
