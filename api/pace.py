"""How long a connection may keep us waiting: for its requests, and to take our answers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from embedstream.shared.logs import get_logger
from embedstream.shared.settings import Settings

_LATE_S = 0.05

log = get_logger()


class Alarm:
    """One moment that may be moved as often as one likes; a timer is set anew only when it comes closer.

    When it is the loop that is late, it first gets the time to read what lies there: nobody is cut for our own delay.

    Args:
        loop: whose clock it follows.
        ring: called when the moment has come.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop = loop
        self._ring = ring
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at_s = self._due_s = math.inf
        self._put_off = False

    @property
    def is_set(self) -> bool:
        """Whether there is such a moment."""
        return self._due_s != math.inf

    def set(self, within_s: float) -> None:
        """Ring after this time, whatever was said before."""
        self._put_off = False
        self._set(within_s)

    def _set(self, within_s: float) -> None:
        self._due_s = self._loop.time() + within_s
        if self._timer_at_s > self._due_s:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at_s = self._due_s
            self._timer = self._loop.call_at(self._due_s, self._look)

    def clear(self) -> None:
        """Do not ring."""
        self._due_s = math.inf

    def end(self) -> None:
        """Clear it, and leave no timer behind."""
        self.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer, self._timer_at_s = None, math.inf
        left_s = self._due_s - self._loop.time()
        if left_s < -_LATE_S and not self._put_off:  # uvloop looks at its timers before it reads
            self._put_off = True
            self._set(_LATE_S)
        elif left_s <= 0:
            self.clear()
            self._ring()
        elif self.is_set:
            self._set(left_s)


class BodyPace:
    """Whether a body comes fast enough.

    Args:
        settings: how fast that is.
        now_s: when its head had come.
    """

    def __init__(self, settings: Settings, now_s: float) -> None:
        self._settings = settings
        self._since_s = self._heard_s = self._judged_s = now_s
        self._bytes = 0

    @property
    def tick_s(self) -> float:
        """Time between two judgements."""
        return min(1.0, self._settings.read_timeout_s / 4)

    def heard(self, size: int, now_s: float) -> None:
        """So many bytes came."""
        self._bytes += size
        self._heard_s = now_s

    def verdict(self, now_s: float, *, held_up: bool) -> str | None:
        """What is wrong with it, or None.

        Args:
            now_s: the clock of the loop.
            held_up: it is us who do not read: that time does not count.
        """
        limits = self._settings
        if held_up:
            self._since_s += now_s - self._judged_s
            self._heard_s = now_s
        self._judged_s = now_s
        elapsed_s = now_s - self._since_s
        if now_s - self._heard_s >= limits.read_timeout_s:
            return f"No byte of the body came for {limits.read_timeout_s:g} s (--read-timeout-s)."
        if (elapsed_s - limits.read_timeout_s) * limits.min_rate_bytes_per_s > self._bytes:
            return (
                f"{self._bytes} bytes of the body came in {elapsed_s:.0f} s, fewer than "
                f"{limits.min_rate_bytes_per_s} a second (--min-rate-bytes-per-s)."
            )
        return None


class ReaderWatch:
    """Cuts a client off that does not take its answer.

    Args:
        loop: whose clock it follows.
        transport: of the connection.
        settings: how fast it must take it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, settings: Settings) -> None:
        self._loop = loop
        self._transport = transport
        self._timeout_s = settings.write_timeout_s
        self._least_bytes = max(1.0, settings.min_rate_bytes_per_s * settings.write_timeout_s)
        self._unsent_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Watch until `stop`, if anything lies here."""
        if self._timer is None:
            self._unsent_bytes = self._transport.get_write_buffer_size()
            if self._unsent_bytes:
                self._timer = self._loop.call_later(self._timeout_s, self._judge)

    def stop(self) -> None:
        """Little enough is left."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _judge(self) -> None:
        self._timer = None
        taken_bytes = self._unsent_bytes - self._transport.get_write_buffer_size()
        if taken_bytes < min(self._least_bytes, self._unsent_bytes):
            log.info("http.slow_reader", unsent_bytes=self._unsent_bytes, taken_bytes=taken_bytes)
            self._transport.abort()
        else:
            self.start()
