"""One supervised process: started, watched, started again, stopped."""

from __future__ import annotations

import math
import signal
import subprocess
import time
from collections.abc import Callable

from embedstream.shared import exits

from .spawn import end_group

_LONGEST_PAUSE_S = 30.0
_GOOD_RUN_S = 60.0


class Backoff:
    """Pauses before restarts: none at first, then 1 s, doubling up to 30 s; a run of 60 s begins anew."""

    def __init__(self) -> None:
        self._next_s = 0.0

    def pause_s(self, ran_s: float) -> float:
        """How long to wait before the next start.

        Args:
            ran_s: how long the process ran that has just ended.
        """
        pause = 0.0 if ran_s >= _GOOD_RUN_S else self._next_s
        self._next_s = min(max(1.0, pause * 2), _LONGEST_PAUSE_S)
        return pause


class Child:
    """A process that is started again when it ends, unless it says that restarting is no help.

    Args:
        name: shown in log lines.
        launch: starts the process.
        last_words: what it has written at its end, for the log; None where that is on our stderr anyway.
        clock: seconds, as `time.monotonic`.
    """

    def __init__(
        self,
        name: str,
        launch: Callable[[], subprocess.Popen[bytes]],
        *,
        last_words: Callable[[], str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.last_words = last_words
        self.process: subprocess.Popen[bytes] | None = None
        self.final = False
        self.restart_at: float | None = None
        self._launch = launch
        self._clock = clock
        self._backoff = Backoff()
        self._started_at = clock()

    def start(self) -> None:
        """Start the process."""
        self.restart_at = None
        self._started_at = self._clock()
        self.process = self._launch()

    def reap(self) -> int | None:
        """Notice an end, once: its exit code, negative for a signal. It also plans the next start."""
        if self.process is None or (code := self.process.poll()) is None:
            return None
        end_group(self.process)  # what it had started may not go on without it
        self.process = None
        if code == exits.FINAL:
            self.final = True
        else:
            self.restart_at = self._clock() + self._backoff.pause_s(self._clock() - self._started_at)
        return code

    @property
    def due_in_s(self) -> float:
        """Time until the next start; infinite where none is planned."""
        return math.inf if self.restart_at is None else max(0.0, self.restart_at - self._clock())

    @property
    def is_due(self) -> bool:
        """Whether the process is to be started now."""
        return self.due_in_s <= 0

    def postpone(self) -> None:
        """Plan the next start after one that failed."""
        self.restart_at = self._clock() + self._backoff.pause_s(0)

    def ask_to_stop(self) -> None:
        """Send SIGTERM, and plan no other start."""
        self.restart_at = None
        if self.process is not None:
            self.process.terminate()

    @property
    def has_ended(self) -> bool:
        """Whether no process runs now."""
        return self.process is None or self.process.poll() is not None

    def kill(self) -> bool:
        """End the process and all it started, at once; says whether it was still running."""
        if self.process is None:
            return False
        was_running = self.process.poll() is None
        end_group(self.process)
        self.process = None
        return was_running


def ending_of(code: int) -> str:
    """How a process ended, in words."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
