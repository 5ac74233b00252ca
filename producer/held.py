"""Results that have come and cannot be handed on yet, as metrics tell it."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from embedstream.shared import metrics


class Held:
    """What one request holds; what is left of it when the request ends is let go."""

    def __init__(self) -> None:
        self._bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.change(-self._bytes)

    def change(self, by_bytes: int) -> None:
        """Hold more, or less."""
        self._bytes += by_bytes
        metrics.HELD_RESULT_BYTES.inc(by_bytes)
