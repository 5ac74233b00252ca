"""A transport whose closing and reading the connection decides about."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


class Transport:
    """Stands between uvicorn's protocol and the real transport.

    Args:
        real: the connection's own.
        close: what happens instead of closing at once.
        may_read: whether reading may go on when that is asked for; who says no goes on by itself.
    """

    def __init__(self, real: asyncio.Transport, close: Callable[[], None], may_read: Callable[[], bool]) -> None:
        self._real = real
        self._close = close
        self._may_read = may_read
        self._closed = False
        self.write = real.write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def close(self) -> None:
        """Begin to close; for whoever writes it is closed now."""
        self._closed = True
        self._close()

    def is_closing(self) -> bool:
        """Whether nothing is to be written any more."""
        return self._closed or self._real.is_closing()

    def resume_reading(self) -> None:
        """Read on."""
        if self._may_read():
            self._real.resume_reading()
