"""Rows back to inputs: the parts of a request, in order, become slices that each hold whole inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedstream.shared.chunks import NOT_FINITE, join
from embedstream.shared.errors import JobFailed
from embedstream.shared.results import ROW, ROW_CONTINUES, ROW_TRUNCATED, ResultPart, Status, Timing
from embedstream.shared.tokenization import offsets

from .failures import InputFailure, failure_of
from .request import EmbeddedSlice, Prepared
from .rows import RowPlan

_NOT_FINITE = InputFailure(Status.FAILED, NOT_FINITE)
_MISFIT = "The consumers' answers do not fit the rows of the request."


class Merger:
    """Takes the parts of a request in order, and gives a slice as soon as another input is complete.

    Args:
        plan: which rows make up which input.
        refused: inputs that have no rows, and why.
        cut: (inputs,) which inputs lost tokens before they were sent; None for none.
        dimension: components of a vector; None while nobody has told.
        partial: whether inputs that fail leave the others their vectors; if not, they end the request.
    """

    def __init__(
        self,
        plan: RowPlan,
        *,
        refused: Mapping[int, InputFailure] | None = None,
        cut: NDArray[np.bool_] | None = None,
        dimension: int | None = None,
        partial: bool = False,
    ) -> None:
        self._plan = plan
        self._is_plain = plan.is_plain
        self._ends = offsets(plan.counts)[1:]
        self._refused = refused or {}
        self._cut = cut
        self._dimension = dimension or 0
        self._partial = partial
        self._n_rows = 0  # that are whole
        self._n_inputs = 0  # that were given
        self._tables: list[NDArray[np.void]] = []  # of rows that are not given yet
        self._vectors: list[NDArray[Any]] = []
        self._failures: dict[InputFailure, int] = {}  # that these rows' messages count, from 1; none of them twice
        self._timing = Timing()

    @classmethod
    def of(cls, prepared: Prepared) -> Merger:
        """For the parts of a request that was sent here."""
        return cls(
            prepared.plan,
            refused=prepared.failures,
            cut=prepared.tokens.cut,
            dimension=prepared.dimension,
            partial=prepared.options.partial,
        )

    @property
    def held_bytes(self) -> int:
        """Size of the vectors that wait for the rest of their input."""
        return sum(vectors.nbytes for vectors in self._vectors)

    def add(self, part: ResultPart) -> EmbeddedSlice | None:
        """Take the next part; the inputs that it completes, if any.

        Raises:
            JobFailed: its rows do not follow those before it, or are more than there should be.
            EmbedstreamError: what an input failed of, unless `partial`.
        """
        if part.first_row != self._n_rows:  # a row that goes on is the first of the next part again
            raise JobFailed(_MISFIT)
        goes_on = bool(part.rows["flags"][-1] & ROW_CONTINUES)
        self._timing = longest(self._timing, part)
        self._n_rows += part.n_rows - goes_on
        if self._n_rows + goes_on > self._plan.n_rows:
            raise JobFailed(_MISFIT)
        end = int(np.searchsorted(self._ends, self._n_rows, side="right"))
        if self._is_plain and not self._tables and not goes_on and not part.rows["status"].any():
            return self._slice(end, part.vectors, part.rows["tokens"], part.rows, {})  # nothing to be copied
        self._tables.append(self._numbered(part))
        self._vectors.append(part.vectors)
        return self._join(end) if end > self._n_inputs else None

    def finish(self) -> EmbeddedSlice | None:
        """What is left when all parts have come: inputs without rows, where no other followed them.

        Raises:
            JobFailed: rows are missing.
        """
        if self._n_rows < self._plan.n_rows:
            raise JobFailed(_MISFIT)
        return self._join(len(self._ends)) if self._n_inputs < len(self._ends) else None

    def _numbered(self, part: ResultPart) -> NDArray[np.void]:
        """The part's rows, their messages counted among those of all rows that are not given yet."""
        failed = part.rows["status"].nonzero()[0].tolist()
        if not failed:
            return part.rows
        rows = part.rows.copy()
        for row in failed:
            # Most fail of the same: the table has room for 65,535 numbers, and a request may have more rows.
            rows["message"][row] = self._failures.setdefault(failure_of(part, row), len(self._failures) + 1)
        return rows

    def _join(self, end: int) -> EmbeddedSlice:
        """Make inputs of the rows at hand, and keep those of the next input."""
        first, counts = self._n_inputs, self._plan.counts[self._n_inputs : end]
        table, vectors = self._at_hand()
        # A row that goes on in the next part is told again there.
        whole = np.flatnonzero(table["flags"] & ROW_CONTINUES == 0)[: int(counts.sum(dtype=np.int64))]
        ends = np.cumsum(table["vectors"], dtype=np.int64)[whole]
        rows, n_entries, n_vectors = table[whole], *((int(whole[-1]) + 1, int(ends[-1])) if len(whole) else (0, 0))
        rows["vectors"] = np.diff(ends, prepend=0)
        numbers = len(self._failures) + 1
        joined, kept = join(
            rows, vectors[:n_vectors], counts, self._plan.options, normalize=self._plan.normalize, not_finite=numbers
        )
        reasons, failures = [*self._failures, _NOT_FINITE], {}
        for place in np.flatnonzero(joined["status"] != Status.OK).tolist():
            index, number = first + place, int(joined["message"][place])
            failure = reasons[number - 1] if number else self._refused[index]
            if not self._partial:
                raise failure.error()
            failures[index] = failure
        self._keep(table[n_entries:], vectors[n_vectors:])
        return self._slice(end, self._placed(joined, kept), _tokens(joined), joined, failures)

    def _at_hand(self) -> tuple[NDArray[np.void], NDArray[Any]]:
        some = [vectors for vectors in self._vectors if len(vectors)]
        if not some:
            dtype = self._plan.travelling.dtype.numpy
            some = [np.empty((0, self._dimension), dtype)]
        tables = self._tables or [np.empty(0, ROW)]
        return (
            tables[0] if len(tables) == 1 else np.concatenate(tables),
            some[0] if len(some) == 1 else np.concatenate(some),
        )

    def _keep(self, table: NDArray[np.void], vectors: NDArray[Any]) -> None:
        self._tables, self._vectors = ([table], [vectors]) if len(table) else ([], [])
        if not len(table):
            self._failures = {}

    def _placed(self, joined: NDArray[np.void], vectors: NDArray[Any]) -> NDArray[Any]:
        """(inputs, dim) with zeros where an input failed; per-token vectors as they are."""
        if self._plan.options.per_token or len(vectors) == len(joined):
            return vectors
        placed = np.zeros((len(joined), vectors.shape[1]), vectors.dtype)
        placed[joined["status"] == Status.OK] = vectors
        return placed

    def _slice(
        self,
        end: int,
        vectors: NDArray[Any],
        tokens: NDArray[np.uint32],
        rows: NDArray[np.void],
        failures: dict[int, InputFailure],
    ) -> EmbeddedSlice:
        first, self._n_inputs = self._n_inputs, end
        lost = rows["flags"] & ROW_TRUNCATED != 0
        if self._cut is not None:
            lost |= self._cut[first:end]
        lost &= rows["status"] == Status.OK
        timing, self._timing = self._timing, Timing()
        return EmbeddedSlice(first, vectors, tokens, int(np.count_nonzero(lost)), timing, failures)


def longest(timing: Timing, part: ResultPart) -> Timing:
    """The longest wait and forward pass so far, and the sum of computed tokens, told by each part of a job."""
    tokens = part.timing.compute_tokens if part.part == 0 else 0
    return Timing(
        max(timing.queue_us, part.timing.queue_us),
        max(timing.inference_us, part.timing.inference_us),
        timing.compute_tokens + tokens,
    )


def _tokens(joined: NDArray[np.void]) -> NDArray[np.uint32]:
    return np.where(joined["status"] == Status.OK, joined["tokens"], 0).astype(np.uint32)
