"""Micro-batches: rows of many jobs within a token budget. Pure; no I/O.

Rows wait as columns. The oldest one always goes, so nothing starves, and with it those that `CostModel` finds. A batch
is computed with one adapter, that of its oldest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedstream.shared.lanes import Lane
from embedstream.shared.tokenization import offsets

from .cost import CostModel
from .entries import Entry


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The rows of one forward pass.

    Args:
        entries: the jobs they come from, all of one adapter.
        owner: (rows,) place in `entries` of each row's job.
        row: (rows,) which row of its job.
        ids: (sum of lengths,) token ids.
        lengths: (rows,) tokens of each row.
        costs: what batches cost here.
    """

    entries: tuple[Entry, ...]
    owner: NDArray[np.int64]
    row: NDArray[np.int64]
    ids: NDArray[np.uint32]
    lengths: NDArray[np.int64]
    costs: CostModel = CostModel()  # noqa: RUF009 - frozen

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
        """What it costs, in tokens."""
        return self.costs.of(self.lengths)

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

    def halves(self, *, by_cost: bool = False) -> tuple[MicroBatch, MicroBatch]:
        """Two parts of at least one row each: the first and the second half of the rows, or of what they cost."""
        middle = (self.n_rows + 1) // 2
        if by_cost and not self.costs.fills_up:
            costs = np.cumsum(self.costs.of_rows(self.lengths))
            middle = int(np.clip(np.searchsorted(2 * costs, costs[-1]) + 1, 1, self.n_rows - 1))
        at = int(self.lengths[:middle].sum())
        return (
            _only_its_entries(self, slice(None, middle), slice(None, at)),
            _only_its_entries(self, slice(middle, None), slice(at, None)),
        )

    def alone(self, place: int) -> MicroBatch:
        """One of its rows."""
        at = int(self.lengths[:place].sum())
        return _only_its_entries(self, slice(place, place + 1), slice(at, at + int(self.lengths[place])))


def _only_its_entries(batch: MicroBatch, rows: slice, tokens: slice) -> MicroBatch:
    owners, owner = np.unique(batch.owner[rows], return_inverse=True)
    entries = tuple(batch.entries[place] for place in owners)
    return MicroBatch(entries, owner, batch.row[rows], batch.ids[tokens], batch.lengths[rows], batch.costs)


class Waiting:
    """The rows of one lane that wait, as columns in order of arrival.

    Args:
        numbers: of each adapter that has been met; shared by the lanes whose rows may go together.
        costs: what batches cost here.
    """

    def __init__(self, numbers: dict[str, int], costs: CostModel) -> None:
        self._costs = costs
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
        """Places of the rows that go next, as `CostModel.choose` finds them among those of the oldest row's adapter."""
        alike, choose = self._alike(self._oldest_adapter), self._costs.choose
        return choose(self.lengths, budget) if alike is None else alike[choose(self.lengths[alike], budget)]

    def beside(self, batch: MicroBatch, most: int) -> NDArray[np.int64]:
        """Places of the rows of a batch's adapter that fit into it, as `CostModel.beside` finds them."""
        alike, beside = self._alike(batch.adapter), self._costs.beside
        if alike is None:
            return beside(self.lengths, batch.lengths, most)
        return alike[beside(self.lengths[alike], batch.lengths, most)]

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
        return MicroBatch(entries, owner, row, ids, lengths, self._costs)

    def remove(self, gone: NDArray[np.bool_]) -> None:
        """Remove all rows of some entries: (entries,) which."""
        self._keep(np.flatnonzero(~gone[self.owner]))

    def _keep(self, places: NDArray[np.int64]) -> None:
        owners, self.owner = np.unique(self.owner[places], return_inverse=True)
        self.entries = [self.entries[place] for place in owners]
        self._adapters = self._adapters[owners]
        self.row, self.start, self.lengths = self.row[places], self.start[places], self.lengths[places]


def in_batches(entries: Sequence[Entry], budget: int, costs: CostModel) -> list[MicroBatch]:
    """All waiting rows of some jobs and of no others, in as few batches as the budget allows."""
    waiting = Waiting({}, costs)
    waiting.add(entries)
    batches = []
    while len(waiting.lengths):
        batches.append(waiting.take(waiting.choose(budget)))
    return batches


def row_by_row(entry: Entry, costs: CostModel, last: int | None = None) -> list[MicroBatch]:
    """A batch for each waiting row of a job.

    Args:
        entry: the job.
        costs: what batches cost here.
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
            costs,
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
        first.costs,
    )
