"""What a backfill shows while it runs: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from embedstream.producer.backfill.backfill import Outcome
from embedstream.producer.backfill.progress import Progress
from embedstream.shared.errors import EmbedstreamError

LINE_S = 10.0
"""Time between two lines where nobody watches."""
_MINUTES_FROM_S = 120
_HOURS_FROM_S = 7200


class View(Protocol):
    """Shows one backfill, on the main thread."""

    def show(self) -> None:
        """Show how far it is; called a few times a second."""
        ...

    def stopping(self) -> None:
        """Somebody asked us to stop; parts under way are finished."""
        ...

    def finished(self, outcome: Outcome) -> None:
        """It is complete."""
        ...

    def interrupted(self) -> None:
        """It was stopped; the same command goes on."""
        ...

    def failed(self, error: EmbedstreamError, exit_code: int) -> None:
        """It ended with an error, which is told on stderr as well."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was."""
        ...


class Lines:
    """For people: words on stderr, and the last line, if all went well, on stdout.

    Args:
        progress: of the backfill.
        output: as it was given.
        loading: what consumers of its own do until they serve the model; "" where it joins others.
        stderr: where words go.
        clock: seconds, as `time.monotonic`.
    """

    def __init__(
        self,
        progress: Progress,
        output: str,
        loading: str,
        *,
        stderr: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._progress = progress
        self._output = output
        self._here = Path.cwd()
        self._loading = loading
        self._stderr = stderr
        self._clock = clock
        self._next_s = clock() + LINE_S
        self._began = False
        self._told = ""

    def show(self) -> None:
        """Write a line, if it is time, or if something is amiss that was not before."""
        self._tell_begin()
        doing = _doing(self._progress, self._loading)
        is_new = doing not in {"", self._told}
        self._told = doing or self._told
        if is_new or self._clock() >= self._next_s:
            self._next_s = self._clock() + LINE_S
            self._say(" · ".join([_how_many(self._progress), *_facts(self._progress, self._loading)]))

    def stopping(self) -> None:
        """Say what happens now, and how long it may take."""
        part_s = self._progress.part_s
        may_take = "" if part_s is None else f", which may take {_duration(part_s)}"
        self._say(
            f"Stopping: parts under way are finished first{may_take}. Once more stops at once; they are made again."
        )

    def finished(self, outcome: Outcome) -> None:
        """Sum up, on stdout."""
        sys.stdout.write(f"{_sum(self._progress, outcome, self._output, self._here)}\n")
        sys.stdout.flush()

    def interrupted(self) -> None:
        """Say how to go on."""
        if self._progress.running:
            done = self._progress.resumed_rows + self._progress.rows
            self._say(f"Stopped with {done:,} rows done. The same command goes on from there.")
        else:
            self._say("Stopped before anything was embedded.")

    def failed(self, error: EmbedstreamError, exit_code: int) -> None:
        """The error's own line comes after this."""
        if self._progress.running:
            self.interrupted()

    def close(self) -> None:
        """Nothing is held."""

    def _tell_begin(self) -> None:
        if self._progress.running and not self._began:
            self._began = True
            if self._progress.resumed_rows:
                self._say(f"Going on: {self._progress.resumed_rows:,} rows are done already.")

    def _say(self, text: str) -> None:
        stream = self._stderr or sys.stderr
        stream.write(f"{text}\n")
        stream.flush()


class Bar(Lines):
    """A bar at the bottom of the terminal, above it whatever else is said on stderr."""

    def __init__(self, progress: Progress, output: str, loading: str, *, console: Console | None = None) -> None:
        super().__init__(progress, output, loading)
        # Drawn by `show` alone: a thread of its own would take the interpreter from those who work.
        self._live = Live(
            console=console or Console(stderr=True),
            auto_refresh=False,
            transient=True,
            get_renderable=self._drawn,
        )
        self._live.start()

    def show(self) -> None:
        """Draw it anew."""
        self._tell_begin()
        self._live.refresh()

    def finished(self, outcome: Outcome) -> None:
        """Sum up in place of the bar."""
        self._live.stop()
        super().finished(outcome)

    def close(self) -> None:
        """Take the bar away."""
        self._live.stop()

    def _drawn(self) -> Group:
        progress = self._progress
        bar = ProgressBar(
            None if progress.total_rows is None else max(1, progress.total_rows),
            _done(progress),
            width=30,
            pulse=progress.total_rows is None or not progress.running,
            animation_time=self._clock(),
        )
        line = Table.grid(padding=(0, 1))
        line.add_row(bar, Text(_how_many(progress)))
        return Group(line, Text(" · ".join(_facts(progress, self._loading)), no_wrap=True, overflow="ellipsis"))


def _done(progress: Progress) -> int:
    return progress.resumed_rows + max(progress.rows, progress.computed_rows)


def _how_many(progress: Progress) -> str:
    done = _done(progress)
    if progress.total_rows is None:
        return f"{done:,} rows"
    percent = 100 * done // max(1, progress.total_rows)
    if progress.total_is_exact:
        return f"{percent} % · {done:,} of {progress.total_rows:,} rows"
    return f"{min(percent, 99)} % · {done:,} of about {max(done, progress.total_rows):,} rows"


def _facts(progress: Progress, loading: str) -> list[str]:
    """Speed, time left, bad rows, and what is amiss."""
    doing = _doing(progress, loading)
    if not progress.running:
        return [doing or "preparing"]
    rows_a_second, tokens_a_second = progress.rates
    facts = [f"{rows_a_second:,.0f} rows/s", f"{tokens_a_second:,.0f} tokens/s"]
    if progress.left_s is not None:
        facts.append(f"{_duration(progress.left_s)} left")
    if progress.bad_rows:
        facts.append(_bad_rows(progress.bad_rows))
    return [*facts, doing] if doing else facts


def _doing(progress: Progress, loading: str) -> str:
    """What it does besides its work."""
    return progress.state if progress.model or not loading else loading


def _sum(progress: Progress, outcome: Outcome, output: str, here: Path) -> str:
    told = f", told in {_seen_from(here, outcome.side_file)}" if outcome.bad_rows else ""
    speed = f" · {progress.rows / progress.working_s:,.0f} rows/s" if progress.rows else ""
    rows = "1 row" if outcome.rows == 1 else f"{outcome.rows:,} rows"
    return f"{rows} in {output} · {_bad_rows(outcome.bad_rows)}{told} · {progress.elapsed_s:,.1f} s{speed}"


def _seen_from(folder: Path, path: Path) -> Path:
    """As people name it who work in this folder."""
    return path.relative_to(folder) if path.is_relative_to(folder) else path


def _bad_rows(number: int) -> str:
    return "no bad rows" if not number else "1 bad row" if number == 1 else f"{number:,} bad rows"


def _duration(seconds: float) -> str:
    if seconds < _MINUTES_FROM_S:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < _HOURS_FROM_S else f"{seconds / 3600:.1f} h"
