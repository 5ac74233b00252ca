"""The token budget of a running consumer: lowered when a batch does not fit into memory, raised after many that did."""

from __future__ import annotations

from collections.abc import Callable

from embedstream.shared.logs import get_logger

GOOD_BATCHES = 100
"""After so many batches that fitted, a lowered budget rises by a quarter."""

log = get_logger()


class Budget:
    """Highest cost of a micro-batch. All calls come from the thread that owns the device.

    Args:
        full: as it was measured or asked for, in tokens.
        now: where it begins, as an earlier run has left it; never above `full`.
        remember: told of each change, for the next run.
    """

    def __init__(self, full: int, now: int | None = None, remember: Callable[[int], None] = lambda _: None) -> None:
        self.full = full
        self.now = full if now is None else max(1, min(full, now))
        self._remember = remember
        self._good_batches = 0  # since one did not fit
        self._fitted = True  # whether the batch under way has fitted so far

    def begin(self) -> None:
        """A batch begins."""
        self._fitted = True

    def too_large(self, cost: int, n_rows: int) -> None:
        """There was not enough memory for a batch or a part of it: keep below its size.

        The parts of a batch that failed say no more than it did: the memory may have gone elsewhere for a moment. A
        single row says nothing at all, for it runs whatever the budget is.

        Args:
            cost: of the batch or part.
            n_rows: sequences in it.
        """
        lowered = max(1, min(self.now, cost) * 3 // 4)
        if self._fitted and n_rows > 1 and lowered < self.now:
            log.warning("batch.budget_lowered", tokens=lowered, before=self.now)
            self._change(lowered)
        self._fitted = False

    def end(self) -> None:
        """The batch has ended: after many that fitted, try larger ones again."""
        self._good_batches = self._good_batches + 1 if self._fitted else 0
        if self._good_batches >= GOOD_BATCHES and self.now < self.full:
            self._good_batches = 0
            raised = min(self.full, self.now * 5 // 4 + 1)
            log.info("batch.budget_raised", tokens=raised, full=self.full)
            self._change(raised)

    def _change(self, tokens: int) -> None:
        self.now = tokens
        self._remember(tokens)
