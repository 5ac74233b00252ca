"""What a consumer has in hand: every entry from the moment it is read until Redis has confirmed its answer.

Entries that Redis holds pending for us and that are not in here have gone astray: the reply to a read was lost.
"""

from __future__ import annotations

from collections.abc import Iterable

from embedstream.shared.lanes import Lane

from .entries import RawEntry

Place = tuple[Lane, bytes]
"""Lane and entry id."""


class Hand:
    """The entries in hand. All calls come from the event loop."""

    def __init__(self) -> None:
        self._entries: dict[Place, RawEntry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, place: Place) -> bool:
        return place in self._entries

    def take(self, entries: Iterable[RawEntry]) -> list[RawEntry]:
        """Take entries up, and return those that were not in hand already: a group made anew reads them twice."""
        fresh = []
        for raw in entries:
            if raw.place not in self._entries:
                self._entries[raw.place] = raw
                fresh.append(raw)
        return fresh

    def give(self, entries: Iterable[RawEntry]) -> None:
        """Let go of entries: answered, given back, or taken by somebody else."""
        for raw in entries:
            self._entries.pop(raw.place, None)
