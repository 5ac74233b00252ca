"""Signals as something to wait for on the main thread, beside sockets."""

from __future__ import annotations

import select
import signal
import socket
import time
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Protocol, Self

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ECHO_S = 0.2
"""`timeout`, `npm` and others pass a signal on that the terminal sends as well: so close a second one is no second."""


class HasFileno(Protocol):
    """Anything `select` takes."""

    def fileno(self) -> int:
        """The number of its open file."""
        ...


class Signals:
    """While entered, SIGINT, SIGTERM and SIGHUP count as wishes to stop, and the end of a child wakes `wait`."""

    def __init__(self) -> None:
        self.stops = 0
        self.first_stop: signal.Signals | None = None
        """What asked us to stop."""
        self._last_stop = float("-inf")
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._handlers: dict[signal.Signals, object] = {}
        self._wakeup_fd = -1

    @property
    def stopping(self) -> bool:
        """Whether somebody asked us to stop."""
        return self.stops > 0

    @property
    def urgent(self) -> bool:
        """Whether somebody asked again."""
        return self.stops > 1

    def wait(self, timeout_s: float | None, files: Sequence[HasFileno] = ()) -> bool:
        """Sleep until a signal comes, one of the files is readable or the time is over.

        Returns:
            Whether a file is readable.
        """
        ready, _, _ = select.select([self._reader, *files], [], [], timeout_s)
        if self._reader in ready:
            self._reader.recv(4096)
        return any(file in ready for file in files)

    def __enter__(self) -> Self:
        self._wakeup_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in (*_STOPPING, signal.SIGCHLD):
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # started by nohup
            self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned
        signal.set_wakeup_fd(self._wakeup_fd)
        self._reader.close()
        self._writer.close()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGCHLD:
            return
        now = time.monotonic()
        if now - self._last_stop > _ECHO_S:
            self.stops += 1
            self.first_stop = self.first_stop or signal.Signals(number)
            self._last_stop = now
