"""A backfill from its first row to its last: read, embed, write, commit; three stages at a time, in bounded memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from embedstream.producer.failures import InputFailure
from embedstream.shared.logs import get_logger
from embedstream.shared.results import Status

from .blocks import BadReason, BadRow, Block, Window
from .embedding import Embedding, WindowVectors
from .plan import PartId, Shard
from .progress import Progress
from .records import PartRecord
from .sink import PartWriter, Sink
from .source import ShardReader, Source
from .state import State
from .windows import Windows

_AHEAD = 2
"""Windows that are read while others are embedded: with the one at each end, four are in memory."""
_WAIT_S = 1.0

log = get_logger()

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PartEnd:
    """All windows of a part have been read.

    Args:
        part: which one.
        taken: rows of the input it stands for.
        bad: rows that reading found bad, of all its windows.
    """

    part: PartId
    taken: int
    bad: tuple[BadRow, ...]


@dataclass(frozen=True, slots=True)
class _Step:
    """What the writer takes up next: a window under way, or the end of a part."""

    part: PartId
    window: Window | None = None
    vectors: asyncio.Task[WindowVectors] | None = None
    end: PartEnd | None = None


class Runner:
    """Does the work of one process; several may share one backfill.

    Args:
        source: what is read.
        shards: its files, grouped.
        sink: where it goes.
        state: remembers what is done.
        embedding: makes vectors of texts.
        progress: told of everything.
        part_rows: rows of the input in a part.
        window_bytes: most bytes embedded together.
        id_column: names a bad row; None where rows have no ids.
    """

    def __init__(
        self,
        source: Source,
        shards: Sequence[Shard],
        sink: Sink,
        state: State,
        embedding: Embedding,
        progress: Progress,
        *,
        part_rows: int,
        window_bytes: int,
        id_column: str | None = None,
    ) -> None:
        self._source = source
        self._shards = shards
        self._sink = sink
        self._state = state
        self._embedding = embedding
        self._progress = progress
        self._part_rows = part_rows
        self._windows = Windows(window_bytes)
        self._id_column = id_column
        self._reading = ThreadPoolExecutor(1, "backfill-read")
        self._writing = ThreadPoolExecutor(1, "backfill-write")
        self._stopping = False

    def stop(self) -> None:
        """Read no further; what is under way is finished and committed as far as its part is whole."""
        self._stopping = True

    async def run(self) -> None:
        """Work until every part is committed, by this process or another, and the output is whole.

        Raises:
            EmbedstreamError: as `Embedding.embed` says; parts that are committed by then stay.
        """
        try:
            missing = await self._missing()
            while missing:
                before = self._progress.parts
                await self._pass([self._shards[number] for number in missing])
                if self._stopping:
                    return
                missing = await self._missing()
                await self._count()
                if missing and self._progress.parts == before:
                    self._progress.state = "waiting for parts that other processes work on"
                    await asyncio.sleep(_WAIT_S)
            parts = [record.part for record in await _on(self._reading, self._state.records) if record.rows]
            self._progress.state = "finishing the output"
            await _on(self._writing, self._sink.finish, parts)
            await _on(self._writing, self._state.finish)
            self._progress.state = ""
        finally:
            self._reading.shutdown(wait=False, cancel_futures=True)
            self._writing.shutdown(wait=True)

    async def _missing(self) -> tuple[int, ...]:
        return await _on(self._reading, self._state.missing, len(self._shards))

    async def _count(self) -> None:
        """Take note of what all processes have committed, earlier ones included."""
        records = await _on(self._writing, self._state.records)
        self._progress.resumed_rows = sum(record.taken for record in records) - self._progress.rows
        self._progress.bad_rows = sum(record.bad_rows for record in records)

    async def _pass(self, shards: Sequence[Shard]) -> None:
        """Go through shards once, doing the parts that nobody else does."""
        steps: asyncio.Queue[_Step | None] = asyncio.Queue(_AHEAD)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read(shards, steps, group))
                group.create_task(self._write(steps))
        except BaseExceptionGroup as several:
            raise _first(several) from several

    async def _read(
        self, shards: Sequence[Shard], steps: asyncio.Queue[_Step | None], group: asyncio.TaskGroup
    ) -> None:
        going = self._steps(shards)
        while (step := await _on(self._reading, _next, going)) is not None:
            if isinstance(step, PartEnd):
                await steps.put(_Step(step.part, end=step))
            else:
                part, window = step
                await steps.put(_Step(part, window, group.create_task(self._embedding.embed(window.texts))))
        await steps.put(None)

    def _steps(self, shards: Sequence[Shard]) -> Iterator[tuple[PartId, Window] | PartEnd]:
        for shard in shards:
            if self._stopping:
                return
            with self._source.open(shard) as reader:
                chunk = total = 0
                while not self._stopping:
                    part = PartId(shard.number, chunk)
                    if self._state.is_committed(part) or not self._state.claim(part):
                        taken = reader.skip(self._part_rows)
                    elif self._state.is_committed(part):  # by somebody who has let go of it just now
                        self._state.release(part)
                        taken = reader.skip(self._part_rows)
                    else:
                        taken = yield from self._part(part, reader)
                    total += taken
                    chunk += taken > 0
                    if taken < self._part_rows:
                        self._state.shard_ended(shard.number, chunk, total)
                        break

    def _part(self, part: PartId, reader: ShardReader) -> Generator[tuple[PartId, Window] | PartEnd, None, int]:
        taken = 0
        bad: list[BadRow] = []

        def blocks() -> Iterator[Block]:
            nonlocal taken
            for block in reader.take(self._part_rows):
                taken += block.taken
                bad.extend(block.bad)
                yield block

        for window in self._windows.of(blocks()):
            yield part, window
        if taken:
            yield PartEnd(part, taken, tuple(bad))
        else:
            self._state.release(part)
        return taken

    async def _write(self, steps: asyncio.Queue[_Step | None]) -> None:
        writer: PartWriter | None = None
        rows = texts = tokens = 0
        bad: list[BadRow] = []
        try:
            while (step := await steps.get()) is not None:
                if step.window is not None and step.vectors is not None:
                    result = await step.vectors
                    if writer is None:
                        writer = await _on(self._writing, self._sink.begin, step.part)
                    failed = await _on(self._writing, _write_window, writer, step.window, result, self._id_column)
                    bad += failed
                    rows += step.window.n_rows - len(failed)
                    texts, tokens = texts + result.texts, tokens + result.tokens
                elif step.end is not None:
                    bad = self._in_order(step.part, (*step.end.bad, *bad))
                    record = PartRecord(step.part, step.end.taken, rows, texts, tokens, len(bad))
                    await _on(self._writing, self._commit, writer if rows else None, record, bad)
                    self._progress.rows += record.taken
                    self._progress.parts += 1
                    await self._count()
                    if writer is not None:
                        await _on(self._writing, writer.abort)  # without rows there is no part
                    writer, rows, texts, tokens, bad = None, 0, 0, 0, []
        finally:
            if writer is not None:
                await _on(self._writing, writer.abort)

    def _in_order(self, part: PartId, bad: Sequence[BadRow]) -> list[BadRow]:
        """As they stand in the input."""
        files = {file.path: place for place, file in enumerate(self._shards[part.shard].files)}
        return sorted(bad, key=lambda row: (files[row.file], row.row))

    def _commit(self, writer: PartWriter | None, record: PartRecord, bad: Sequence[BadRow]) -> None:
        if writer is not None:
            writer.commit()
        self._state.commit(record, bad)


def _first(several: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that ended a group: what else failed then, failed of it."""
    error: BaseException = several
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _on(pool: ThreadPoolExecutor, function: Callable[..., T], *arguments: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)


def _next(steps: Iterator[T]) -> T | None:
    return next(steps, None)  # a StopIteration cannot pass through a future


def _write_window(writer: PartWriter, window: Window, result: WindowVectors, id_column: str | None) -> list[BadRow]:
    """Write the rows that have a vector; the others are returned."""
    bad: list[BadRow] = []
    first = 0
    for block in window.blocks:
        n_rows = len(block.rows)
        failed = [place for place in result.failures if first <= place < first + n_rows]
        carried, vectors = block.carried, result.vectors[first : first + n_rows]
        if failed:
            bad += [_bad(block, place - first, result.failures[place], id_column) for place in failed]
            keep = np.ones(n_rows, np.bool_)
            keep[np.array(failed) - first] = False
            carried, vectors = carried.filter(pa.array(keep)), vectors[keep]
        if len(vectors):
            writer.write(carried, vectors)
        first += n_rows
    return bad


_REASONS = {Status.INPUT_TOO_LONG: BadReason.TOO_LONG, Status.INVALID_INPUT: BadReason.INVALID}


def _bad(block: Block, place: int, why: InputFailure, id_column: str | None) -> BadRow:
    name = None if id_column is None else str(block.carried.column(id_column)[place])
    return BadRow(block.file, int(block.rows[place]), _REASONS.get(why.status, BadReason.FAILED), why.message, name)
