"""What became of a micro-batch, and how it reaches its jobs. Numpy only: a consumer's loop needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from embedstream.shared.results import Status

from .batching import MicroBatch

_NOT_FINITE = "The model computed a vector that is not finite (NaN or infinity)."


@dataclass(frozen=True, slots=True)
class RowVectors:
    """What the rows of a micro-batch with equal options became.

    Args:
        rows: (n,) places in the micro-batch.
        vectors: (sum of their vectors, dim) in the number format asked for.
        bounds: (n + 1,) where each row's token vectors begin; None for one vector a row.
        finite: (n,) whether the row's float32 vectors were all finite.
    """

    rows: NDArray[np.int64]
    vectors: NDArray[Any]
    bounds: NDArray[np.int64] | None
    finite: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Embedded:
    """A micro-batch after its forward pass."""

    groups: list[RowVectors]
    duration_s: float


class Embeds(Protocol):
    """Runs micro-batches: a model on its device, or in tests something that stands for one.

    All calls come from one thread. Whatever an implementation raises is the fault of some row of the batch, unless
    `faults.fault_of` knows better.
    """

    def embed(self, batch: MicroBatch) -> Embedded:
        """Vectors for every row of the batch."""

    def free(self) -> None:
        """Give back memory that is not in use: a batch has not fitted."""


@runtime_checkable
class EmbedsAhead(Embeds, Protocol):
    """Its device may compute by itself, so that the host prepares the next batch meanwhile."""

    @property
    def overlaps(self) -> bool:
        """Whether it does; else a launch is all of the work."""

    def launch(self, batch: MicroBatch) -> Callable[[], Embedded]:
        """Begin with a batch.

        Batches end in the order in which they were launched; `embed` launches and waits.

        Returns:
            What waits for its vectors.
        """


def deliver(batch: MicroBatch, embedded: Embedded, started_ms: float) -> None:
    """Hand the vectors to the jobs they belong to.

    Args:
        batch: as it was embedded.
        embedded: what became of it.
        started_ms: when the forward pass began, on Redis's clock.
    """
    for entry in batch.entries:
        entry.started_ms = started_ms if entry.started_ms is None else entry.started_ms
        entry.inference_us += int(embedded.duration_s * 1e6)
    for group in embedded.groups:
        for owner, places in _by_owner(batch.owner[group.rows]):
            entry = batch.entries[owner]
            rows = batch.row[group.rows[places]]
            good = group.finite[places]
            if group.bounds is None:
                entry.store(rows[good], group.vectors[places[good]])
            else:
                for row, place in zip(rows[good].tolist(), places[good], strict=True):
                    entry.store_tokens(row, group.vectors[group.bounds[place] : group.bounds[place + 1]])
            if not good.all():
                entry.fail(rows[~good], Status.FAILED, _NOT_FINITE)


def fail(batch: MicroBatch, message: str) -> None:
    """Give up all rows of a batch."""
    for owner, places in _by_owner(batch.owner):
        batch.entries[owner].fail(batch.row[places], Status.FAILED, message)


def _by_owner(owner: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Rows of each job: (place of the job, places in `owner`)."""
    order = np.argsort(owner, kind="stable")
    owners, starts = np.unique(owner[order], return_index=True)
    yield from zip(owners.tolist(), np.split(order, starts[1:]), strict=True)
