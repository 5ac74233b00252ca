"""A backfill that nobody listens to any more goes on, and its exit code still tells how it ended."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable

from embedstream.producer.backfill.backfill import Outcome
from embedstream.shared.errors import EmbedstreamError

from .backfill_view import View


class Unheard:
    """Passes everything on to a view until its reader is gone: a pipe to `head`, a terminal that was closed.

    Args:
        view: what shows it.
    """

    def __init__(self, view: View) -> None:
        self._view = view

    def show(self) -> None:
        """As the view."""
        _tell(self._view.show)

    def stopping(self) -> None:
        """As the view."""
        _tell(self._view.stopping)

    def finished(self, outcome: Outcome) -> None:
        """As the view."""
        _tell(lambda: self._view.finished(outcome))

    def interrupted(self) -> None:
        """As the view."""
        _tell(self._view.interrupted)

    def failed(self, error: EmbedstreamError, exit_code: int) -> None:
        """As the view."""
        _tell(lambda: self._view.failed(error, exit_code))

    def close(self) -> None:
        """As the view."""
        _tell(self._view.close)


def open_missing() -> None:
    """Give stdout and stderr something to write to where the command was started with them closed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115 # for as long as the process lasts


def _tell(words: Callable[[], None]) -> None:
    try:
        words()
    except OSError:
        for stream in (sys.stdout, sys.stderr):
            watched = select.poll()
            watched.register(stream.fileno(), 0)  # asks for nothing but whether the other end is gone
            if watched.poll(0):
                # All that comes later goes nowhere: from logs, and from Python itself when it ends.
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
