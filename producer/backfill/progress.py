"""How far a backfill is: numbers that its work counts up and its view reads."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

RATE_OVER_S = 20.0
"""Rates are those of so many seconds."""


@dataclass(slots=True)
class Progress:
    """Counted by one event loop; read at any time.

    Args:
        total_rows: of the input, where it is known or can be estimated.
        total_is_exact: whether it is known; lines of text are counted only while they are read.
        resumed_rows: rows of parts that an earlier run, or another process, has committed by now.
        rows: rows of this process that are done: in a part that is committed, bad and left-out ones included.
        computed_rows: rows of this process that have a vector; more than `rows` while parts are under way.
        computed_texts: unique texts that were sent to the queue.
        tokens: of those texts.
        bad_rows: among the resumed rows, and of this process.
        parts: committed by this process.
        part_rows: rows of the input in a part, once that is known.
        model: its name, once a consumer serves it.
        state: what it does now, in words for people; "" while it works.
    """

    total_rows: int | None = None
    total_is_exact: bool = True
    resumed_rows: int = 0
    rows: int = 0
    computed_rows: int = 0
    computed_texts: int = 0
    tokens: int = 0
    bad_rows: int = 0
    parts: int = 0
    part_rows: int = 0
    model: str = ""
    state: str = ""
    started_s: float = field(default_factory=time.monotonic)
    _began_s: float | None = None
    _samples: deque[tuple[float, int, int]] = field(default_factory=deque)

    def begin(self, part_rows: int) -> None:
        """Input, model and state are ready: from now on parts of so many rows are made."""
        self.part_rows = part_rows
        self._began_s = time.monotonic()

    @property
    def running(self) -> bool:
        """Whether parts are made, or were."""
        return self._began_s is not None

    @property
    def working_s(self) -> float:
        """Since the first part was begun: without loading the model."""
        return 0.0 if self._began_s is None else time.monotonic() - self._began_s

    def computed(self, rows: int, texts: int, tokens: int) -> None:
        """Rows got their vectors."""
        self.computed_rows += rows
        self.computed_texts += texts
        self.tokens += tokens
        now = time.monotonic()
        self._samples.append((now, self.computed_rows, self.tokens))
        while len(self._samples) > 2 and self._samples[1][0] < now - RATE_OVER_S:
            self._samples.popleft()

    @property
    def elapsed_s(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started_s

    @property
    def rates(self) -> tuple[float, float]:
        """Rows and tokens a second, over the last `RATE_OVER_S` seconds; 0 while nothing is known."""
        if len(self._samples) < 2:
            seconds = max(self.working_s, 1e-9)
            return self.computed_rows / seconds, self.tokens / seconds
        (then, rows, tokens), (_, rows_now, tokens_now) = self._samples[0], self._samples[-1]
        seconds = max(time.monotonic() - then, 1e-9)
        return (rows_now - rows) / seconds, (tokens_now - tokens) / seconds

    @property
    def part_s(self) -> float | None:
        """Time that a part takes, as it goes now; None while nobody knows."""
        rate = self.rates[0]
        return self.part_rows / rate if rate > 0 else None

    @property
    def left_s(self) -> float | None:
        """Time until all is done, as it goes now; None while nobody knows."""
        rate = self.rates[0]
        if self.total_rows is None or rate <= 0:
            return None
        return max(0.0, self.total_rows - self.resumed_rows - max(self.rows, self.computed_rows)) / rate
