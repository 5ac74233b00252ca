"""Micro-batches: rows of many jobs within a token budget. Pure; no I/O.

Rows wait as columns. Of the rows that wait, those of like length go together, so that little is padded; the batch
that holds the oldest row goes first, so nothing starves. A batch is computed with one adapter, that of its oldest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedstream.shared.lanes import Lane
from embedstream.shared.tokenization import offsets

from .entries import Entry

LIKE, LIKE_TOKENS = 2, 32
"""Rows go together up to this multiple of the shortest plus so many tokens: beyond, padding costs more than a batch."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The rows of one forward pass.

    Args:
        entries: the jobs they come from, all of one adapter.
        owner: (rows,) place in `entries` of each row's job.
        row: (rows,) which row of its job.
        ids: (sum of lengths,) token ids.
        lengths: (rows,) tokens of each row.
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

    @property
    def cost(self) -> int:
        """Tokens with padding."""
        return int(self.lengths.max()) * self.n_rows if self.n_rows else 0

    @property
    def adapter(self) -> str:
        """What all its rows are computed with; "" for the bare model."""
        return self.entries[0].adapter

    @property
    def skip(self) -> NDArray[np.int64]:
        """(rows,) leading tokens of each row that are not pooled."""
        return np.fromiter((entry.skip for entry in self.entries), np.int64, len(self.entries))[self.owner]

    def tokens_of(self, lane: Lane) -> int:
        """Tokens of the rows that came from a lane, without padding."""
        of_entry = np.fromiter((entry.raw.lane is lane for entry in self.entries), np.bool_, len(self.entries))
        return int(self.lengths[of_entry[self.owner]].sum())

    def halves(self) -> tuple[MicroBatch, MicroBatch]:
        """The first and the second half of the rows."""
        middle = (self.n_rows + 1) // 2
        at = int(self.lengths[:middle].sum())
        return (
            _only_its_entries(self, slice(None, middle), slice(None, at)),
            _only_its_entries(self, slice(middle, None), slice(at, None)),
        )


def _only_its_entries(batch: MicroBatch, rows: slice, tokens: slice) -> MicroBatch:
    owners, owner = np.unique(batch.owner[rows], return_inverse=True)
    entries = tuple(batch.entries[place] for place in owners)
    return MicroBatch(entries, owner, batch.row[rows], batch.ids[tokens], batch.lengths[rows])


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


class Waiting:
    """The rows of one lane that wait, as columns in order of arrival.

    Args:
        numbers: of each adapter that has been met; shared by the lanes whose rows may go together.
    """

    def __init__(self, numbers: dict[str, int]) -> None:
        self.entries: list[Entry] = []
        self._numbers = numbers
        self._adapters = np.empty(0, np.int64)  # number of each entry's
        self.owner = np.empty(0, np.int64)  # place in `entries`
        self.row = np.empty(0, np.int64)
        self.start = np.empty(0, np.int64)  # of the row in its entry's ids
        self.lengths = np.empty(0, np.int64)

    def add(self, entries: Sequence[Entry]) -> None:
        """Let the rows of some jobs wait."""
        numbers = self._numbers
        adapters = (numbers.setdefault(entry.adapter, len(numbers)) for entry in entries)
        self._adapters = np.concatenate([self._adapters, np.fromiter(adapters, np.int64, len(entries))])
        rows = [entry.waiting_rows() for entry in entries]
        owners = [np.full(len(some), len(self.entries) + place) for place, some in enumerate(rows)]
        starts = [entry.tokens.offsets[some] for entry, some in zip(entries, rows, strict=True)]
        lengths = [entry.tokens.lengths[some].astype(np.int64) for entry, some in zip(entries, rows, strict=True)]
        self.entries += entries
        self.owner = np.concatenate([self.owner, *owners])
        self.row = np.concatenate([self.row, *rows])
        self.start = np.concatenate([self.start, *starts])
        self.lengths = np.concatenate([self.lengths, *lengths])

    @property
    def tokens_of_turn(self) -> int:
        """Tokens that wait for the adapter of the oldest row: the most that its batch could hold."""
        alike = self._alike(self._oldest_adapter)
        return int((self.lengths if alike is None else self.lengths[alike]).sum())

    def choose(self, budget: int) -> NDArray[np.int64]:
        """Places of the rows that go next, as `choose` finds them among those of the oldest row's adapter."""
        alike = self._alike(self._oldest_adapter)
        return choose(self.lengths, budget) if alike is None else alike[choose(self.lengths[alike], budget)]

    def fill(self, adapter: str, longest: int, room: int) -> NDArray[np.int64]:
        """Places of the rows that fit beside a batch of an adapter, as `fill` finds them."""
        alike = self._alike(adapter)
        return fill(self.lengths, longest, room) if alike is None else alike[fill(self.lengths[alike], longest, room)]

    @property
    def _oldest_adapter(self) -> str:
        return self.entries[int(self.owner[0])].adapter

    def _alike(self, adapter: str) -> NDArray[np.int64] | None:
        """Places of the rows of an adapter; None for all, as where no other has ever been asked for."""
        if len(self._numbers) == 1:
            return None
        return np.flatnonzero((self._adapters == self._numbers[adapter])[self.owner])

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

    def remove(self, gone: NDArray[np.bool_]) -> None:
        """Remove all rows of some entries: (entries,) which."""
        self._keep(np.flatnonzero(~gone[self.owner]))

    def _keep(self, places: NDArray[np.int64]) -> None:
        owners, self.owner = np.unique(self.owner[places], return_inverse=True)
        self.entries = [self.entries[place] for place in owners]
        self._adapters = self._adapters[owners]
        self.row, self.start, self.lengths = self.row[places], self.start[places], self.lengths[places]


def in_batches(entries: Sequence[Entry], budget: int) -> list[MicroBatch]:
    """All waiting rows of some jobs and of no others, in as few batches as the budget allows."""
    waiting = Waiting({})
    waiting.add(entries)
    batches = []
    while len(waiting.lengths):
        batches.append(waiting.take(waiting.choose(budget)))
    return batches


def row_by_row(entry: Entry, last: int | None = None) -> list[MicroBatch]:
    """A batch for each waiting row of a job.

    Args:
        entry: the job.
        last: a row that goes last, if it waits.
    """
    rows = entry.waiting_rows()
    if last is not None:
        rows = np.concatenate([rows[rows != last], rows[rows == last]])
    starts, lengths = entry.tokens.offsets, entry.tokens.lengths.astype(np.int64)
    return [
        MicroBatch(
            (entry,),
            np.zeros(1, np.int64),
            np.array([row]),
            entry.tokens.ids[starts[row] : starts[row] + lengths[row]],
            lengths[row : row + 1],
        )
        for row in rows.tolist()
    ]


def join(first: MicroBatch, second: MicroBatch) -> MicroBatch:
    """One batch of two, which are of one adapter; the second may be empty."""
    if second.n_rows == 0:
        return first
    return MicroBatch(
        first.entries + second.entries,
        np.concatenate([first.owner, second.owner + len(first.entries)]),
        np.concatenate([first.row, second.row]),
        np.concatenate([first.ids, second.ids]),
        np.concatenate([first.lengths, second.lengths]),
    )
