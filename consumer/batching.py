"""Micro-batches: rows of many jobs within a token budget. Pure; no I/O.

Rows wait as columns. Of the rows that wait, those of like length go together, so that little is padded; the batch
that holds the oldest row goes first, so nothing starves. Interactive rows lead; bulk rows fill what is left, and lead
themselves once they are owed their share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from embedstream.shared.lanes import LANES, Lane
from embedstream.shared.tokenization import offsets

from .entries import Entry
from .pace import Pace

ABOUT_MS = 2000.0
"""Interactive work seen so lately is about to come again: bulk batches then keep to the latency slice."""
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


class Dropped(Enum):
    """Why rows are not computed although they could be."""

    EXPIRED = "expired"
    CANCELLED = "cancelled"


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

    def remove(self, gone: NDArray[np.bool_]) -> None:
        """Remove all rows of some entries: (entries,) which."""
        self._keep(np.flatnonzero(~gone[self.owner]))

    def _keep(self, places: NDArray[np.int64]) -> None:
        owners, self.owner = np.unique(self.owner[places], return_inverse=True)
        self.entries = [self.entries[place] for place in owners]
        self.row, self.start, self.lengths = self.row[places], self.start[places], self.lengths[places]


class RowQueue:
    """Rows that wait for a place in a micro-batch.

    Args:
        budget: most tokens of a batch, padding included.
        pace: how long batches take.
        slice_s: longest predicted time of a bulk batch while interactive work is about.
        bulk_share: part of tokens and time that bulk gets while interactive work keeps coming, below 1.
    """

    def __init__(self, budget: int, pace: Pace | None = None, slice_s: float = 0.05, bulk_share: float = 0.1) -> None:
        self.budget = budget
        self._pace = pace or Pace(budget)
        self._slice_s = slice_s
        self._bulk_share = bulk_share
        self._lanes = {lane: _Waiting() for lane in LANES}
        self._interactive_at_ms = float("-inf")
        self._earliest_ms = float("inf")  # no row's deadline is before it
        self._changes_seen: int | None = None  # of the abandoned requests, when all rows were looked at
        # Both are kept: of queries in a trickle the tokens are few and the time is all there is.
        self._owed_tokens = 0.0
        self._owed_s = 0.0

    def __len__(self) -> int:
        return sum(len(lane.lengths) for lane in self._lanes.values())

    def tokens(self, lane: Lane) -> int:
        """Tokens that wait on a lane."""
        return int(self._lanes[lane].lengths.sum())

    def add(self, lane: Lane, entries: Sequence[Entry]) -> None:
        """Let the rows of some jobs wait."""
        if entries:
            self._lanes[lane].add(entries)
            self._earliest_ms = min(self._earliest_ms, *(entry.deadline_ms for entry in entries))

    def drop(
        self, now_ms: float, cancelled: Mapping[bytes, int], changes: int | None = None
    ) -> list[tuple[Entry, Dropped]]:
        """Remove the rows of jobs nobody waits for.

        Args:
            now_ms: on Redis's clock.
            cancelled: requests that were abandoned, and when that was said, on the same clock.
            changes: how often something was added to them; where it is what it was, only deadlines are looked at. None
                looks at all.
        """
        dropped: list[tuple[Entry, Dropped]] = []
        if changes is not None and changes == self._changes_seen and now_ms <= self._earliest_ms:
            return dropped
        self._changes_seen = changes
        for lane in self._lanes.values():
            reasons = [_reason_to_drop(entry, now_ms, cancelled) for entry in lane.entries]
            if any(reasons):
                dropped += [(lane.entries[place], reason) for place, reason in enumerate(reasons) if reason]
                lane.remove(np.array([reason is not None for reason in reasons]))
        left = [entry.deadline_ms for lane in self._lanes.values() for entry in lane.entries]
        self._earliest_ms = min(left, default=float("inf"))
        return dropped

    def release(self) -> list[Entry]:
        """Remove and return the jobs of which no row has gone to the device; of the others the rest is still wanted."""
        released: list[Entry] = []
        for lane in self._lanes.values():
            released += [entry for entry in lane.entries if not entry.begun]
            if lane.entries:
                lane.remove(np.array([not entry.begun for entry in lane.entries]))
        return released

    def take(self, now_ms: float = 0.0) -> MicroBatch | None:
        """The next micro-batch, or None when nothing waits.

        Args:
            now_ms: on Redis's clock.
        """
        interactive, bulk = self._lanes[Lane.INTERACTIVE], self._lanes[Lane.BULK]
        if len(interactive.lengths):
            self._interactive_at_ms = now_ms
        slice_cost = self._slice_cost()
        bulk_leads = len(bulk.lengths) > 0 and (len(interactive.lengths) == 0 or self._is_owed(bulk, slice_cost))
        if bulk_leads:
            about = now_ms - self._interactive_at_ms < ABOUT_MS
            batch = self._lead(bulk, interactive, slice_cost if about else self.budget, self.budget)
        elif len(interactive.lengths):
            batch = self._lead(interactive, bulk, self.budget, slice_cost)
        else:
            return None
        self._settle(batch, bulk_waits=bulk_leads or len(bulk.lengths) > 0, bulk_leads=bulk_leads)
        for entry in batch.entries:
            entry.begun = True
        return batch

    def _slice_cost(self) -> int:
        return min(self.budget, self._pace.fitting(self._slice_s))

    def _lead(self, lead: _Waiting, other: _Waiting, lead_cost: int, most_beside: int) -> MicroBatch:
        """A batch of one lane's rows, with those of the other beside them that make it no wider.

        Args:
            lead: whose turn it is.
            other: fills what is left.
            lead_cost: most tokens with padding of the rows that lead.
            most_beside: as much as the batch may grow to by rows of the other lane.
        """
        places = choose(lead.lengths, lead_cost)
        longest = int(lead.lengths[places[0]])
        beside = fill(other.lengths, longest, most_beside // max(1, longest) - len(places))
        return _join(lead.take(places), other.take(beside))

    def _is_owed(self, bulk: _Waiting, slice_cost: int) -> bool:
        """Whether bulk has earned a turn of its own, as large as it can be now."""
        waiting = int(bulk.lengths.sum())
        return self._owed_tokens >= min(slice_cost, waiting) or self._owed_s >= self._slice_s

    def _settle(self, batch: MicroBatch, *, bulk_waits: bool, bulk_leads: bool) -> None:
        """Book a batch: what bulk is owed of it, less what bulk had."""
        if not bulk_waits:
            self._owed_tokens = self._owed_s = 0.0  # a quiet lane saves nothing up
            return
        of_bulk = batch.tokens_of(Lane.BULK)
        predicted_s = self._pace.predict_s(batch.cost)
        seconds = self._slice_s if predicted_s is None else predicted_s
        self._owed_tokens = max(0.0, self._owed_tokens + self._bulk_share * batch.n_tokens - of_bulk)
        # Only a turn of its own pays time off: what fills other batches are its short rows alone.
        self._owed_s = max(0.0, self._owed_s + self._bulk_share * seconds - (seconds if bulk_leads else 0.0))


def _reason_to_drop(entry: Entry, now_ms: float, cancelled: Mapping[bytes, int]) -> Dropped | None:
    if entry.is_called_off(cancelled):
        return Dropped.CANCELLED
    return Dropped.EXPIRED if now_ms > entry.deadline_ms else None


def in_batches(entries: Sequence[Entry], budget: int) -> list[MicroBatch]:
    """All waiting rows of some jobs and of no others, in as few batches as the budget allows."""
    waiting = _Waiting()
    waiting.add(entries)
    batches = []
    while len(waiting.lengths):
        batches.append(waiting.take(choose(waiting.lengths, budget)))
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
