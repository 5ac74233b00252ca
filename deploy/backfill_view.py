"""What a backfill shows while it runs: plain lines."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from embedstream.producer.backfill.progress import Progress

LINE_S = 10.0
"""Time between two lines where nobody watches."""


class Lines:
    """Plain lines on stderr."""

    def __init__(self, progress: Progress, stream: TextIO | None = None) -> None:
        self._progress = progress
        self._stream = stream or sys.stderr
        self._next_s = time.monotonic() + LINE_S

    def show(self) -> None:
        """Show how far it is, if it is time."""
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + LINE_S
            self.say(line_of(self._progress))

    def say(self, text: str) -> None:
        """Say something at once."""
        self._stream.write(f"{text}\n")
        self._stream.flush()


def line_of(progress: Progress) -> str:
    """How far it is, in one line."""
    rows = progress.resumed_rows + max(progress.rows, progress.computed_rows)
    of = "" if progress.total_rows is None else f" of {progress.total_rows:,}"
    rows_a_second, tokens_a_second = progress.rates
    parts = [f"{rows:,}{of} rows", f"{rows_a_second:,.0f} rows/s", f"{tokens_a_second:,.0f} tokens/s"]
    if progress.left_s is not None:
        parts.append(f"{progress.left_s:,.0f} s left")
    if progress.bad_rows:
        parts.append(f"{progress.bad_rows:,} bad rows")
    if progress.state:
        parts.append(progress.state)
    return ", ".join(parts)
