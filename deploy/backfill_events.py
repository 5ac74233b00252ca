"""What a backfill tells programs: one JSON object a line on stdout. `docs/backfill.md` describes the fields."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import BinaryIO

import orjson

from embedstream.producer.backfill.backfill import Outcome
from embedstream.producer.backfill.progress import Progress
from embedstream.shared.errors import EmbedstreamError

EVERY_S = 1.0
"""Time between two events of progress."""
_WAITING = "waiting"
"""How states begin in which somebody else is waited for."""


class Events:
    """A view for programs.

    Args:
        progress: of the backfill.
        source: the input, as it was given.
        output: the output, as it was given.
        stdout: where events go.
        clock: seconds, as `time.monotonic`.
    """

    def __init__(
        self,
        progress: Progress,
        source: str,
        output: str,
        *,
        stdout: BinaryIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._progress = progress
        self._source = source
        self._output = output
        self._stdout: BinaryIO = stdout or sys.stdout.buffer
        self._clock = clock
        self._next_s = clock()
        self._started = False
        self._parts = 0
        self._waiting = ""

    def show(self) -> None:
        """Tell what is new."""
        progress = self._progress
        if progress.state != self._waiting:
            self._waiting = progress.state
            if progress.state.startswith(_WAITING):
                self._tell("waiting", reason=progress.state.removeprefix(_WAITING).lstrip(": "))
        if not progress.running:
            return
        if not self._started:
            self._started = True
            self._tell("started", **self._asked(), rows_total=progress.total_rows, rows_resumed=progress.resumed_rows)
        if progress.parts != self._parts:
            self._parts = progress.parts
            self._tell("part", parts=progress.parts, rows_committed=progress.resumed_rows + progress.rows)
        if self._clock() >= self._next_s:
            self._next_s = self._clock() + EVERY_S
            self._tell_progress()

    def stopping(self) -> None:
        """Tell that the parts under way are the last ones."""
        self._tell("stopping")

    def finished(self, outcome: Outcome) -> None:
        """Tell the whole."""
        self.show()
        self._tell(
            "finished",
            output=self._output,
            rows=outcome.rows,
            bad_rows=outcome.bad_rows,
            bad_rows_file=str(outcome.side_file) if outcome.bad_rows else None,
            rows_per_s=round(self._progress.rows / max(self._progress.working_s, 1e-9), 1),
        )

    def interrupted(self) -> None:
        """Tell that the same command goes on."""
        self._tell("interrupted", rows_committed=self._progress.resumed_rows + self._progress.rows)

    def failed(self, error: EmbedstreamError, exit_code: int) -> None:
        """Tell the error."""
        self._tell("failed", error=type(error).__name__, message=str(error), exit_code=exit_code)

    def close(self) -> None:
        """Nothing is held."""

    def _asked(self) -> dict[str, str]:
        return {"input": self._source, "output": self._output, "model": self._progress.model}

    def _tell_progress(self) -> None:
        progress = self._progress
        rows_a_second, tokens_a_second = progress.rates
        self._tell(
            "progress",
            rows=progress.resumed_rows + max(progress.rows, progress.computed_rows),
            rows_total=progress.total_rows,
            bad_rows=progress.bad_rows,
            tokens=progress.tokens,
            rows_per_s=round(rows_a_second, 1),
            tokens_per_s=round(tokens_a_second, 1),
            left_s=None if progress.left_s is None else round(progress.left_s, 1),
        )

    def _tell(self, event: str, **fields: object) -> None:
        line = {"event": event, "elapsed_s": round(self._progress.elapsed_s, 3), **fields}
        self._stdout.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        self._stdout.flush()
