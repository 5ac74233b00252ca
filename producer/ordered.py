"""Results in the order of the inputs, whatever order the jobs are done in."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import numpy as np

from embedstream.shared.results import ROW_TRUNCATED, ResultPart, Status

from .failures import failure_of
from .request import EmbeddedSlice


async def in_order(parts: AsyncGenerator[ResultPart, None]) -> AsyncGenerator[EmbeddedSlice, None]:
    """The parts of a request as slices without gaps, each as soon as all before it are there."""
    waiting: dict[int, list[ResultPart]] = {}
    job = 0
    async with aclosing(parts):
        async for part in parts:
            waiting.setdefault(part.job, []).append(part)
            while len(waiting.get(job, ())) and len(waiting[job]) == waiting[job][0].n_parts:
                for whole in waiting.pop(job):
                    yield slice_of(whole)
                job += 1


def slice_of(part: ResultPart) -> EmbeddedSlice:
    """A part by itself."""
    failures = {part.first_row + row: failure_of(part, row) for row in part.rows["status"].nonzero()[0].tolist()}
    vectors, tokens = part.vectors, part.rows["tokens"]
    if failures:
        good = part.rows["status"] == Status.OK
        whole = np.zeros((part.n_rows, part.vectors.shape[1]), part.vectors.dtype)
        whole[good] = part.vectors
        vectors, tokens = whole, np.where(good, tokens, 0).astype(np.uint32)
    truncated = int(np.count_nonzero(part.rows["flags"] & ROW_TRUNCATED))
    return EmbeddedSlice(part.first_row, vectors, tokens, truncated, part.timing, failures)
