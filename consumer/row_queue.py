"""Rows that wait for a place in a micro-batch, lane by lane. Pure; no I/O.

Interactive rows lead; bulk rows fill up what a pass costs anyway, and lead themselves when no others wait, or once they
are owed their share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum

import numpy as np

from embedstream.shared.lanes import LANES, Lane

from .batching import MicroBatch, Waiting, join
from .budget import Budget
from .entries import Entry
from .pace import Pace

ABOUT_MS = 2000.0
"""Interactive work seen so lately is about to come again: bulk batches then keep to the latency slice."""


class Dropped(Enum):
    """Why rows are not computed although they could be."""

    EXPIRED = "expired"
    CANCELLED = "cancelled"


class RowQueue:
    """Rows that wait for a place in a micro-batch.

    Args:
        budget: highest cost of a batch, in tokens.
        pace: how long batches take, and what they cost.
        slice_s: longest predicted time of a bulk batch while interactive work is about.
        bulk_share: part of tokens and time that bulk gets while interactive work keeps coming, below 1.
    """

    def __init__(self, budget: Budget, pace: Pace, slice_s: float = 0.05, bulk_share: float = 0.1) -> None:
        self.budget = budget
        self._pace = pace
        self._slice_s = slice_s
        self._bulk_share = bulk_share
        numbers: dict[str, int] = {}
        self._lanes = {lane: Waiting(numbers, self._pace.costs) for lane in LANES}
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

    def take(self, now_ms: float = 0.0, *, beside: bool = False) -> MicroBatch | None:
        """The next micro-batch, or None when nothing waits.

        Args:
            now_ms: on Redis's clock.
            beside: another batch is on the device. While interactive work is about, bulk does not lead then: who comes
                next would wait for two slices.
        """
        interactive, bulk = self._lanes[Lane.INTERACTIVE], self._lanes[Lane.BULK]
        if len(interactive.lengths):
            self._interactive_at_ms = now_ms
        slice_cost = self._slice_cost()
        bulk_leads = len(bulk.lengths) > 0 and (len(interactive.lengths) == 0 or self._is_owed(bulk, slice_cost))
        if bulk_leads:
            about = now_ms - self._interactive_at_ms < ABOUT_MS
            if about and beside:
                return None
            lead_cost = slice_cost if about else self.budget.now
            batch = self._lead(bulk, interactive, lead_cost, self.budget.now, self.budget.now)
        elif len(interactive.lengths):
            batch = self._lead(interactive, bulk, self.budget.now, slice_cost, self._pace.costs.pass_tokens)
        else:
            return None
        self._settle(batch, bulk_waits=bulk_leads or len(bulk.lengths) > 0, bulk_leads=bulk_leads)
        for entry in batch.entries:
            entry.begun = True
        return batch

    def _slice_cost(self) -> int:
        return min(self.budget.now, self._pace.fitting(self._slice_s))

    def _lead(self, lead: Waiting, other: Waiting, lead_cost: int, most: int, most_more: int) -> MicroBatch:
        """A batch of one lane's rows, with those of the other beside them that fit; of one adapter all.

        Args:
            lead: whose turn it is.
            other: fills what is left.
            lead_cost: highest cost of the rows that lead.
            most: as much as the batch's cost may grow to by rows of the other lane.
            most_more: as much as it may grow by them. Bulk so never makes a short query take long, but where a pass
                costs more than the query, it takes what is nearly free.
        """
        batch = lead.take(lead.choose(lead_cost))
        return join(batch, other.take(other.beside(batch, min(most, batch.cost + most_more))))

    def _is_owed(self, bulk: Waiting, slice_cost: int) -> bool:
        """Whether bulk has earned a turn of its own, as large as it can be now."""
        return self._owed_tokens >= min(slice_cost, bulk.tokens_of_turn) or self._owed_s >= self._slice_s

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
