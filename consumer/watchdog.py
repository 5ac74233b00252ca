"""The watchdog: what does not move any more gives up its lease.

A heartbeat that only says that the process runs keeps the work of a hung device for ever, and one sent by the loop that
works is late whenever there is much to do. So the heartbeat has a thread of its own, and before each beat it looks
whether the device's batch ends and the event loop turns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

PREDICTION_FACTOR = 5.0
"""A batch may take so many times its prediction: other work on the machine, a first kernel, a long sequence."""
UNKNOWN_FACTOR = 6.0
"""While no batch has run yet, a batch may take so many times the limit."""


class State(Enum):
    """What the watchdog thinks."""

    MOVING = "moving"
    HUNG = "hung"
    """For longer than the limit: the lease is given up."""
    LOST = "lost"
    """For twice as long: it will not come back."""


@dataclass(slots=True)
class _Watched:
    """Something that must go on: its step as seen last, and how long that has been the same."""

    step: int = -1
    still_s: float = 0.0

    def look(self, step: int, passed_s: float) -> float:
        self.still_s = self.still_s + passed_s if step == self.step else 0.0
        self.step = step
        return self.still_s


@dataclass(slots=True)
class Watchdog:
    """Follows one device thread and one event loop. Each of its methods is called by one thread.

    Args:
        limit_s: longest time of a batch, unless it was predicted to take long.
    """

    limit_s: float
    _step: int = 0
    _batch_limit_s: float | None = None
    _loop_step: int = 0
    _device: _Watched = field(default_factory=_Watched)
    _loop: _Watched = field(default_factory=_Watched)

    def begin(self, predicted_s: float | None) -> None:
        """A batch begins. Called by the device thread."""
        self._step += 1
        slow_s = self.limit_s * UNKNOWN_FACTOR if predicted_s is None else predicted_s * PREDICTION_FACTOR
        self._batch_limit_s = max(self.limit_s, slow_s)

    def end(self) -> None:
        """The batch has ended, one way or the other. Called by the device thread."""
        self._batch_limit_s = None

    def turn(self) -> None:
        """The event loop has turned. Called by it, several times within the limit."""
        self._loop_step += 1

    def look(self, passed_s: float) -> State:
        """Look whether things move. Called by the heartbeat's thread.

        Args:
            passed_s: since it looked last, of the time in which this process ran: one that was stopped is not hung.
        """
        batch_limit_s = self._batch_limit_s
        device_s = self._device.look(self._step, passed_s) if batch_limit_s is not None else 0.0
        loop_s = self._loop.look(self._loop_step, passed_s)
        limits = [(device_s, batch_limit_s or self.limit_s), (loop_s, self.limit_s)]
        if any(still_s > 2 * limit_s for still_s, limit_s in limits):
            return State.LOST
        return State.HUNG if any(still_s > limit_s for still_s, limit_s in limits) else State.MOVING
