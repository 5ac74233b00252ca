"""Credit: how much work of one kind may be on the queue at a time.

Enough that no consumer waits for work, and no more: what is queued cannot make way for others any more, and takes
memory. By Little's law what is under way is the rate times the time it takes, so the limit is the rate of the last
seconds times the time an answer is to take. A fleet that answers sooner gets more, one that is busy with interactive
work gets less, without anybody telling.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

REQUEST_TOKENS = 4096
"""Most of one request of bulk work. A whole number of them is to fit the floor, or a slow fleet would idle between two
of them; smaller ones cost more than they bring."""
FLOOR_TOKENS = 3 * REQUEST_TOKENS
"""The least that may be under way: three batches of a CPU. More would be refused by a fleet that is so slow that they
are more than `--max-wait-s` of work; a fast one earns more within seconds."""
RATE_OVER_S = 2.0


class Credit:
    """Bounds the tokens and rows under way.

    Args:
        seconds: how long an answer is to take.
        most_rows: never more rows than this.
        clock: gives seconds.
    """

    def __init__(self, seconds: float, most_rows: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._most_rows = most_rows
        self._clock = clock
        self._tokens = self._rows = 0
        self._done: deque[tuple[float, int]] = deque()
        self._done_tokens = 0
        self._waiting: deque[tuple[asyncio.Future[None], int, int]] = deque()
        self.limit_tokens = FLOOR_TOKENS

    @asynccontextmanager
    async def of(self, n_tokens: int, n_rows: int) -> AsyncIterator[None]:
        """Wait for credit, in the order of asking, and hold it.

        What exceeds the limit alone goes when nothing else is under way.
        """
        if self._waiting or not self._fits(n_tokens, n_rows):
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append((turn, n_tokens, n_rows))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.cancelled():
                    self._admit()  # it may have stood before others that fit
                else:
                    self._give_back(n_tokens, n_rows)
                raise
        else:
            self._take(n_tokens, n_rows)
        try:
            yield
            self._learn(n_tokens)
        finally:
            self._give_back(n_tokens, n_rows)

    def refused(self) -> None:
        """The fleet has more work than it takes: halve what may be under way until it answers again."""
        self._done.clear()
        self._done_tokens = 0
        self.limit_tokens = max(FLOOR_TOKENS, self.limit_tokens // 2)

    def _fits(self, n_tokens: int, n_rows: int) -> bool:
        fits = self._tokens + n_tokens <= self.limit_tokens and self._rows + n_rows <= self._most_rows
        return fits or self._rows == 0

    def _take(self, n_tokens: int, n_rows: int) -> None:
        self._tokens += n_tokens
        self._rows += n_rows

    def _give_back(self, n_tokens: int, n_rows: int) -> None:
        self._tokens -= n_tokens
        self._rows -= n_rows
        self._admit()

    def _admit(self) -> None:
        while self._waiting:
            turn, tokens, rows = self._waiting[0]
            if not turn.done():
                if not self._fits(tokens, rows):
                    break
                self._take(tokens, rows)
                turn.set_result(None)
            self._waiting.popleft()

    def _learn(self, n_tokens: int) -> None:
        now = self._clock()
        self._done.append((now, n_tokens))
        self._done_tokens += n_tokens
        # The first one only says when the others began to come; however rare they become, there is one.
        while len(self._done) > 2 and self._done[1][0] <= now - RATE_OVER_S:
            self._done_tokens -= self._done.popleft()[1]
        over_s = now - self._done[0][0]
        if over_s > RATE_OVER_S / 2:
            self.limit_tokens = max(FLOOR_TOKENS, int((self._done_tokens - self._done[0][1]) / over_s * self._seconds))
