"""Equal texts are computed once: within a window, and again within what the last windows have computed."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from embedstream.producer.failures import InputFailure

MOST_BYTES = 64 * 1024 * 1024
"""Of texts and vectors that are remembered."""


@dataclass(slots=True)
class Computed:
    """Unique texts of one window and what became of them.

    Args:
        texts: (unique,) large strings.
        vectors: (unique, dim), filled as answers come.
        failures: why texts have none, by their place.
        done: set when nothing of it is missing any more; holds the error that ended it.
    """

    texts: pa.LargeStringArray
    vectors: NDArray[Any]
    failures: dict[int, InputFailure] = field(default_factory=dict)
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def n_bytes(self) -> int:
        """Memory it takes."""
        return int(self.texts.nbytes + self.vectors.nbytes)


@dataclass(frozen=True, slots=True)
class Places:
    """Where the vectors of some texts are.

    Args:
        owners: the windows that compute, or have computed, some of them.
        owner: (unique,) index into `owners`; -1 for a text that nobody has.
        place: (unique,) place among the owner's texts.
    """

    owners: tuple[Computed, ...]
    owner: NDArray[np.int64]
    place: NDArray[np.int64]


class Seen:
    """The newest windows, those under way included, up to a bound of memory."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._windows: deque[Computed] = deque()

    def find(self, texts: pa.LargeStringArray) -> Places:
        """Look (unique,) texts up among those of the windows that are remembered."""
        owners = tuple(self._windows)
        owner, place = np.full(len(texts), -1), np.zeros(len(texts), np.int64)
        for number, window in enumerate(owners):
            found = pc.index_in(texts, value_set=window.texts)
            known = np.asarray(found.is_valid())
            owner[known] = number
            place[known] = np.asarray(found.fill_null(0))[known]
        return Places(owners, owner, place)

    def remember(self, window: Computed) -> None:
        """Take a window in; the oldest go, but for those under way."""
        self._windows.append(window)
        total = sum(known.n_bytes for known in self._windows)
        while total > self._most_bytes and len(self._windows) > 1 and self._windows[0].done.done():
            total -= self._windows.popleft().n_bytes
