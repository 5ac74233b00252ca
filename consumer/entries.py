"""Entries: jobs as read from a lane, and what has been computed for them so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedstream.shared.chunks import NOT_FINITE, join
from embedstream.shared.jobs import Job
from embedstream.shared.lanes import Lane
from embedstream.shared.options import VectorOptions
from embedstream.shared.results import ROW, ROW_TRUNCATED, ResultPart, Status, Timing
from embedstream.shared.tokenization import Tokens


@dataclass(frozen=True, slots=True)
class RawEntry:
    """A stream entry, not yet looked into.

    Args:
        lane: where it was read.
        entry_id: its id; the part before the dash is the time it was enqueued, in milliseconds of Redis's clock.
        fields: of the stream entry.
        deaths: consumers that have died with it in hand, or on their device; above 0 it is a suspect.
    """

    lane: Lane
    entry_id: bytes
    fields: dict[bytes, bytes]
    deaths: int = 0

    @property
    def place(self) -> tuple[Lane, bytes]:
        """What names it among all entries of the model."""
        return self.lane, self.entry_id

    @property
    def enqueued_ms(self) -> int:
        """When it was enqueued, in milliseconds of Redis's clock."""
        return int(self.entry_id.partition(b"-")[0])


@dataclass(frozen=True, slots=True)
class Pieces:
    """How the rows of a job make up its inputs, where some input is several.

    Args:
        counts: (inputs,) rows of each input.
        options: what the caller asked for; the job of the entry asks for what pieces are computed in.
        normalize: whether a mean of several rows is scaled to unit length.
    """

    counts: NDArray[np.uint32]
    options: VectorOptions
    normalize: bool


@dataclass(slots=True)
class Entry:
    """A job this consumer has in hand. It is finished when none of its rows is left to compute.

    Args:
        raw: the stream entry.
        job: what it says.
        reply_to: the caller's reply stream, or "" for none.
        tokens: its rows as columns, cut to their limits.
        truncated: (rows,) which rows lost tokens.
        pieces: which rows make up which input; None when each is one.
        adapter: of the model, that its rows are computed with; "" for the bare model.
        skip: leading tokens of each row that are not pooled: those of a prompt that the recipe leaves out.
        begun: whether a row of it has been given to the device.
        dead_letter: why it is kept as a dead letter although the rest of it is answered, or "".
        dead_row: the row of it that is given up, by its place in the request.
    """

    raw: RawEntry
    job: Job
    reply_to: str
    tokens: Tokens
    truncated: NDArray[np.bool_]
    pieces: Pieces | None = None
    adapter: str = ""
    skip: int = 0
    begun: bool = False
    dead_letter: str = ""
    dead_row: int | None = None
    started_ms: float | None = None
    inference_us: int = 0
    rows: NDArray[np.void] = field(init=False)
    _left: int = field(init=False)
    _messages: list[str] = field(init=False, default_factory=list)
    _pooled: NDArray[Any] | None = field(init=False, default=None)
    _per_token: dict[int, NDArray[Any]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = np.zeros(len(self.tokens), ROW)
        self.rows["tokens"] = self.tokens.lengths
        self.rows["flags"] = np.where(self.truncated, ROW_TRUNCATED, 0)
        self._left = len(self.rows)

    @property
    def done(self) -> bool:
        """Whether every row has its vectors or its error."""
        return self._left == 0

    @property
    def deadline_ms(self) -> float:
        """When nobody waits for it any more, in milliseconds of Redis's clock."""
        return self.raw.enqueued_ms + self.job.ttl_ms

    def waiting_rows(self) -> NDArray[np.int64]:
        """Rows that have neither their vectors nor an error."""
        return np.flatnonzero((self.rows["status"] == Status.OK) & (self.rows["vectors"] == 0))

    def places(self) -> NDArray[np.int64]:
        """(rows,) place in the request of the input that each row belongs to."""
        inputs = np.arange(self.job.n_inputs) + self.job.first_input
        return inputs if self.pieces is None else np.repeat(inputs, self.pieces.counts)

    def store(self, rows: NDArray[np.int64], vectors: NDArray[Any]) -> None:
        """Keep one vector for each of some rows: (rows, dim) in the job's number format."""
        if self._pooled is None:
            self._pooled = np.empty((len(self.rows), vectors.shape[1]), vectors.dtype)
        self._pooled[rows] = vectors
        self.rows["vectors"][rows] = 1
        self._left -= len(rows)

    def store_tokens(self, row: int, vectors: NDArray[Any]) -> None:
        """Keep the token vectors of a row: (tokens, dim) in the job's number format."""
        self._per_token[row] = vectors
        self.rows["vectors"][row] = len(vectors)
        self._left -= 1

    def fail(self, rows: NDArray[np.int64], status: Status, message: str) -> None:
        """Give some rows up, all for one reason."""
        self._messages.append(message)
        self.rows["status"][rows] = status
        self.rows["message"][rows] = len(self._messages)
        self._left -= len(rows)

    def fail_rest(self, status: Status, message: str) -> None:
        """Give up every row that has neither its vectors nor an error."""
        rows = self.waiting_rows()
        if len(rows):
            self.fail(rows, status, message)

    def is_called_off(self, cancelled: Mapping[bytes, int]) -> bool:
        """Whether its request was abandoned after it was enqueued.

        Args:
            cancelled: request ids, and when that was said, in milliseconds of Redis's clock.
        """
        said_ms = cancelled.get(self.job.request_id)
        return said_ms is not None and self.raw.enqueued_ms <= said_ms

    def cancel(self) -> None:
        """Give up what is left, for its caller has gone: only its result key is told, if it has one."""
        self.reply_to = ""
        self.fail_rest(Status.FAILED, "The request was cancelled by its caller.")

    @property
    def result_bytes(self) -> int:
        """Size of the vectors kept."""
        pooled = 0 if self._pooled is None else self._pooled.nbytes
        return pooled + sum(vectors.nbytes for vectors in self._per_token.values())

    def result(self, fingerprint: bytes) -> ResultPart:
        """The whole answer, to be split into parts."""
        dtype = self.job.options.dtype
        rows, messages = self.rows, tuple(self._messages)
        vectors: NDArray[Any] = np.empty((0, 0), dtype.numpy)
        if self._pooled is not None:
            vectors = self._pooled[self.rows["vectors"] > 0]
        elif self._per_token:
            vectors = np.concatenate([self._per_token[row] for row in sorted(self._per_token)])
        waited_ms = 0.0 if self.started_ms is None else self.started_ms - self.raw.enqueued_ms
        computed = self.rows["tokens"][self.rows["status"] == Status.OK]
        if self.pieces is not None:
            counts, options, normalize = self.pieces.counts, self.pieces.options, self.pieces.normalize
            messages = (*messages, NOT_FINITE)
            rows, vectors = join(rows, vectors, counts, options, normalize=normalize, not_finite=len(messages))
            dtype = options.dtype
        return ResultPart(
            request_id=self.job.request_id,
            fingerprint=fingerprint,
            job=self.job.index,
            n_jobs=self.job.count,
            part=0,
            n_parts=1,
            first_row=self.job.first_input,
            rows=rows,
            vectors=vectors,
            dtype=dtype,
            messages=messages,
            timing=Timing(max(0, int(waited_ms * 1000)), self.inference_us, int(computed.sum(dtype=np.int64))),
        )
