"""What stands on a lane, in tokens and bytes, told from counters that only ever grow.

Everybody who adds a job adds its cost to the lane's totals in the same script; nobody ever takes anything off, for a
counter that a consumer must lower drifts when the consumer dies, and cannot be written when memory is full. Jobs leave
a lane about in the order they came, and a finished job is deleted, so what is on the lane now is the newest XLEN jobs.
What all others cost, the base, is read off a history of the totals, and totals less base is what stands ahead.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

MAX_POINTS = 512
"""Samples remembered of one lane: at five a second, 100 s of backlog at full resolution, and longer ones thinned."""
GUESSED_JOB_TOKENS = 256
GUESSED_JOB_BYTES = 1024
"""Of a job whose sender keeps no totals, while nothing else is known."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over jobs: all that were ever put on a lane, those that have left it, or those that are there.

    Args:
        jobs: their number.
        tokens: that they cost to compute.
        size_bytes: of their headers and bodies.
    """

    jobs: int = 0
    tokens: int = 0
    size_bytes: int = 0


NOTHING = Totals()


class LaneBacklog:
    """Follows one lane by samples of its length and its totals."""

    def __init__(self) -> None:
        self._points = [NOTHING]  # growing in jobs; the first is at or before the base
        self.waiting = 0
        self.base = NOTHING

    @property
    def totals(self) -> Totals:
        """As they were at the last sample."""
        return self._points[-1]

    def observe(self, waiting: int, totals: Totals) -> bool:
        """Take in a sample.

        Args:
            waiting: jobs on the lane, waiting or running.
            totals: all that was ever put on it, read at the same moment.

        Returns:
            Whether the totals went back: the server lost them, and with them perhaps everything.
        """
        last = self._points[-1]
        lost = totals.jobs < last.jobs or totals.tokens < last.tokens or totals.size_bytes < last.size_bytes
        if lost:
            self._points = [NOTHING]
        if totals.jobs > self._points[-1].jobs:
            self._points.append(totals)
        elif len(self._points) > 1:
            self._points[-1] = totals
        self.waiting = waiting
        self._find_base(totals.jobs - waiting)
        if len(self._points) > MAX_POINTS:
            self._thin()
        return lost

    def _thin(self) -> None:
        """Forget the sample whose neighbours are closest, so that all lie about as far apart."""
        points = self._points
        place = min(range(1, len(points) - 1), key=lambda place: points[place + 1].jobs - points[place - 1].jobs)
        del points[place]

    def _find_base(self, left: int) -> None:
        """The totals when `left` jobs had come: between two samples, jobs count as equal."""
        place = bisect_right(self._points, left, key=lambda point: point.jobs)
        if place == 0:  # others add without the totals, so that more seem to be there than were counted
            self.base = self._points[0]
            return
        del self._points[: place - 1]  # what has left stays away
        before = self._points[0]
        if len(self._points) == 1:
            self.base = before
            return
        after = self._points[1]
        part = (left - before.jobs) / (after.jobs - before.jobs)
        self.base = Totals(
            left,
            before.tokens + int(part * (after.tokens - before.tokens)),
            before.size_bytes + int(part * (after.size_bytes - before.size_bytes)),
        )

    def on_lane(self) -> Totals:
        """What stood on the lane at the last sample; `enqueue.lua` reckons in the same way, with newer numbers."""
        if self.waiting == 0:
            return NOTHING
        base = self.base if self.totals.jobs > self.base.jobs else NOTHING
        jobs = self.totals.jobs - base.jobs
        if jobs <= 0:
            return Totals(self.waiting, self.waiting * GUESSED_JOB_TOKENS, self.waiting * GUESSED_JOB_BYTES)
        scale = self.waiting / jobs
        return Totals(
            self.waiting,
            int(scale * (self.totals.tokens - base.tokens)),
            int(max(1.0, scale) * (self.totals.size_bytes - base.size_bytes)),
        )
