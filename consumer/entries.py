"""Entries: jobs as read from a lane, and what has been computed for them so far."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedstream.shared.jobs import Job
from embedstream.shared.lanes import Lane
from embedstream.shared.results import ROW, ROW_TRUNCATED, ResultPart, Status, Timing
from embedstream.shared.tokenization import Tokens


@dataclass(frozen=True, slots=True)
class RawEntry:
    """A stream entry, not yet looked into.

    Args:
        lane: where it was read.
        entry_id: its id; the part before the dash is the time it was enqueued, in milliseconds of Redis's clock.
        fields: of the stream entry.
    """

    lane: Lane
    entry_id: bytes
    fields: dict[bytes, bytes]

    @property
    def enqueued_ms(self) -> int:
        """When it was enqueued, in milliseconds of Redis's clock."""
        return int(self.entry_id.partition(b"-")[0])


@dataclass(slots=True)
class Entry:
    """A job this consumer has in hand. It is finished when none of its rows is left to compute.

    Args:
        raw: the stream entry.
        job: what it says.
        reply_to: the caller's reply stream, or "" for none.
        tokens: its rows as columns, cut to their limits.
        truncated: (rows,) which rows lost tokens.
    """

    raw: RawEntry
    job: Job
    reply_to: str
    tokens: Tokens
    truncated: NDArray[np.bool_]
    started_ms: float | None = None
    inference_us: int = 0
    rows: NDArray[np.void] = field(init=False)
    _left: int = field(init=False)
    _messages: list[str] = field(init=False, default_factory=list)
    _vectors: list[NDArray[Any] | None] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = np.zeros(self.job.n_inputs, ROW)
        self.rows["tokens"] = self.tokens.lengths
        self.rows["flags"] = np.where(self.truncated, ROW_TRUNCATED, 0)
        self._left = self.job.n_inputs
        self._vectors = [None] * self.job.n_inputs

    @property
    def done(self) -> bool:
        """Whether every row has its vectors or its error."""
        return self._left == 0

    def waiting_rows(self) -> NDArray[np.int64]:
        """Rows that have not failed, to be computed."""
        return np.flatnonzero(self.rows["status"] == Status.OK)

    def store(self, rows: Iterable[int], vectors: Iterable[NDArray[Any]]) -> None:
        """Keep the vectors of some rows: each (vectors, dim) in the job's number format."""
        for row, matrix in zip(rows, vectors, strict=True):
            self._vectors[row] = matrix
            self.rows["vectors"][row] = len(matrix)
            self._left -= 1

    def fail(self, rows: Iterable[int], status: Status, message: str) -> None:
        """Give some rows up, all for one reason."""
        self._messages.append(message)
        for row in rows:
            self.rows["status"][row] = status
            self.rows["message"][row] = len(self._messages)
            self._left -= 1

    def result(self, fingerprint: bytes) -> ResultPart:
        """The whole answer, to be split into parts."""
        matrices = [matrix for matrix in self._vectors if matrix is not None]
        dtype = self.job.options.dtype
        vectors: NDArray[Any] = np.concatenate(matrices) if matrices else np.empty((0, 0), dtype.numpy)
        waited_ms = 0.0 if self.started_ms is None else self.started_ms - self.raw.enqueued_ms
        computed = self.rows["tokens"][self.rows["status"] == Status.OK]
        return ResultPart(
            request_id=self.job.request_id,
            fingerprint=fingerprint,
            job=self.job.index,
            n_jobs=self.job.count,
            part=0,
            n_parts=1,
            first_row=self.job.first_input,
            rows=self.rows,
            vectors=vectors,
            dtype=dtype,
            messages=tuple(self._messages),
            timing=Timing(max(0, int(waited_ms * 1000)), self.inference_us, int(computed.sum(dtype=np.int64))),
        )
