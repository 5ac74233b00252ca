"""Results in the order of the inputs, whatever order the jobs are done in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from embedstream.shared.results import ResultPart

from .held import Held
from .merging import Merger
from .request import EmbeddedSlice

ON_LOOP_BYTES = 1024 * 1024
"""Vectors up to this size, the most of one part, are copied and joined on the event loop, in less than 1 ms."""


async def in_order(parts: AsyncGenerator[ResultPart, None], merger: Merger) -> AsyncGenerator[EmbeddedSlice, None]:
    """Slices without gaps, each as soon as its inputs and all before them are done.

    Args:
        parts: of all jobs of a request: those of one job in order and without others between, the jobs in any order.
        merger: makes inputs of them.

    Raises:
        EmbedstreamError: as `parts` and `merger` do.
    """
    with Held() as held:
        async with aclosing(parts), aclosing(jobs_in_order(parts, held)) as ordered:
            async for part in ordered:
                before, big = merger.held_bytes, merger.held_bytes + part.vectors.nbytes > ON_LOOP_BYTES
                piece = await asyncio.to_thread(merger.add, part) if big else merger.add(part)
                held.change(merger.held_bytes - before)
                if piece is not None:
                    yield piece
                await asyncio.sleep(0)  # when all jobs are done at once, 32 parts in one turn would be too many
        last = merger.finish()
        if last is not None:
            yield last


async def jobs_in_order(parts: AsyncGenerator[ResultPart, None], held: Held) -> AsyncGenerator[ResultPart, None]:
    """The same parts, those of an earlier job first."""
    waiting: dict[int, list[ResultPart]] = {}
    job = 0
    async for part in parts:
        waiting.setdefault(part.job, []).append(part)
        held.change(part.vectors.nbytes)
        while job in waiting and len(waiting[job]) == waiting[job][0].n_parts:
            for whole in waiting.pop(job):
                held.change(-whole.vectors.nbytes)
                yield whole
            job += 1
