"""Turns on the event loop, for work that is done in pieces because it keeps the interpreter lock."""

from __future__ import annotations

import asyncio
from types import TracebackType


class Turns:
    """One piece of work at a time, whoever's it is: `async with turns` around each.

    Without it, each of 32 large answers would have its millisecond before a probe has its tenth of one; so all of them
    together have one millisecond at a time. They take turns, for the lock is given in the order it was asked for.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> None:
        await self._lock.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                await asyncio.sleep(0)  # with the lock in hand: else the next one would have it in the same iteration
        finally:
            self._lock.release()
