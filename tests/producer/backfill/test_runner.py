"""A backfill from its first row to its last, with a source and a sink in memory and vectors made on the spot."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from embedstream.producer.backfill.blocks import BadReason, BadRow, Block
from embedstream.producer.backfill.embedding import WindowVectors
from embedstream.producer.backfill.manifest import manifest_of
from embedstream.producer.backfill.options import BackfillOptions, InputOptions, OutputOptions
from embedstream.producer.backfill.plan import InputFile, PartId, Shard, shards_of
from embedstream.producer.backfill.progress import Progress
from embedstream.producer.backfill.records import PartRecord
from embedstream.producer.backfill.runner import Runner
from embedstream.producer.failures import InputFailure
from embedstream.producer.request import Options
from embedstream.shared.errors import Unavailable
from embedstream.shared.results import Status

BLOCK = 4


def table(rows: Sequence[int]) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array(rows, pa.int64())], ["id"])


class Numbers:
    """Files of texts `file:row`; every row that ends in 7 is bad, and rows that end in 9 are left out."""

    def __init__(self, *sizes: int) -> None:
        self.files = tuple(InputFile(f"f{number}", 10, "1", "", size) for number, size in enumerate(sizes))
        self.schema = table([]).schema
        self.read_rows: list[tuple[str, int]] = []

    def estimated_rows(self) -> int:
        return sum(file.n_rows or 0 for file in self.files)

    @contextmanager
    def open(self, shard: Shard) -> Iterator[Reader]:
        yield Reader(self, shard)


class Reader:
    def __init__(self, source: Numbers, shard: Shard) -> None:
        self._rows = [(file.path, row) for file in shard.files for row in range(file.n_rows or 0)]
        self._at = 0
        self._source = source

    def skip(self, n_rows: int) -> int:
        taken = min(n_rows, len(self._rows) - self._at)
        self._at += taken
        return taken

    def take(self, n_rows: int) -> Iterator[Block]:
        end = min(self._at + n_rows, len(self._rows))
        while self._at < end:
            path = self._rows[self._at][0]
            some = [row for name, row in self._rows[self._at : min(end, self._at + BLOCK)] if name == path]
            self._source.read_rows += [(path, row) for row in some]
            good = [row for row in some if row % 10 not in (7, 9)]
            bad = tuple(BadRow(path, row, BadReason.NULL, "no text") for row in some if row % 10 == 7)
            texts = pa.array([f"{path}:{row}" for row in good], pa.string())
            yield Block(path, np.array(good, np.int64), texts, table(good), len(some), bad)
            self._at += len(some)


class Memory:
    """Parts as lists of (id, vector)."""

    def __init__(self) -> None:
        self.parts: dict[PartId, list[tuple[int, float]]] = {}
        self.begun: list[PartId] = []
        self.open_writers = 0
        self.finished: list[PartId] | None = None
        self.fail_at: PartId | None = None

    def begin(self, part: PartId) -> MemoryPart:
        self.begun.append(part)
        self.open_writers += 1
        return MemoryPart(self, part)

    def finish(self, parts: Sequence[PartId]) -> None:
        self.finished = list(parts)

    def close(self) -> None:
        """Nothing is held."""

    @property
    def ids(self) -> list[int]:
        return [number for part in sorted(self.parts) for number, _ in self.parts[part]]


class MemoryPart:
    def __init__(self, sink: Memory, part: PartId) -> None:
        self._sink, self._part = sink, part
        self._rows: list[tuple[int, float]] = []
        self._is_open = True

    def write(self, carried: pa.RecordBatch, vectors: Any) -> None:
        assert self._is_open
        self._rows += zip(carried.column(0).to_pylist(), vectors[:, 0].tolist(), strict=True)

    def commit(self) -> None:
        if self._part == self._sink.fail_at:
            raise OSError(28, "No space left on device")
        self._sink.parts[self._part] = self._rows

    def abort(self) -> None:
        self._sink.open_writers -= self._is_open
        self._is_open = False


class Embeds:
    """Makes of `f1:12` the vector (12,); windows end in any order."""

    def __init__(self, fails: Callable[[str], bool] = lambda _: False) -> None:
        self.fails = fails
        self.windows: list[list[str]] = []
        self.under_way = self.most_under_way = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def embed(self, texts: pa.ChunkedArray) -> WindowVectors:
        items = texts.to_pylist()
        self.windows.append(items)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        await self.gate.wait()
        await asyncio.sleep(0.01 * (len(self.windows) % 3))
        self.under_way -= 1
        vectors = np.array([[float(text.split(":")[1])] for text in items], np.float32).reshape(-1, 1)
        failures = {
            place: InputFailure(Status.INPUT_TOO_LONG, "too long")
            for place, text in enumerate(items)
            if self.fails(text)
        }
        return WindowVectors(vectors, failures, len(items), 2 * len(items))


Make = Callable[..., Runner]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    from embedstream.producer.backfill.state import State

    def make(
        source: Numbers, sink: Memory, embeds: Any, *, progress: Progress | None = None, **others: Any
    ) -> tuple[Runner, State]:
        state = open_state(tmp_path / "state")
        shards = tuple(shards_of(source.files, most_bytes=20))
        options: dict[str, Any] = {"part_rows": 10, "window_bytes": 1 << 20, "id_column": "id"} | others
        return Runner(source, shards, sink, state, embeds, progress or Progress(), **options), state

    return make  # type: ignore[return-value]


def open_state(folder: Path) -> Any:
    from embedstream.producer.backfill.state import State

    options = BackfillOptions(InputOptions("in"), OutputOptions("out"), Options())
    return State(folder, manifest_of(options, (), pa.schema([("id", pa.int64())])))


def side_file(state: Any) -> list[dict[str, Any]]:
    state.write_side_file()
    return [json.loads(line) for line in state.bad_rows_path.read_text().splitlines()]


def good_ids(*sizes: int) -> list[int]:
    return [row for size in sizes for row in range(size) if row % 10 not in (7, 9)]


async def test_every_row_is_once_in_order(make: Any) -> None:
    source, sink, embeds, progress = Numbers(25, 4, 40, 0, 7), Memory(), Embeds(), Progress()
    runner, state = make(source, sink, embeds, progress=progress)
    await runner.run()
    assert sink.ids == good_ids(25, 4, 40, 0, 7)
    assert all(number == vector for rows in sink.parts.values() for number, vector in rows)
    assert sink.finished == sorted(sink.parts)
    assert sink.open_writers == 0
    records = state.records()
    assert sum(record.taken for record in records) == 76 == progress.rows
    bad = [(row["file"], row["row"]) for row in side_file(state)]
    assert bad == [("f0", 7), ("f0", 17), ("f1", 7)[:0] or ("f2", 7), ("f2", 17), ("f2", 27), ("f2", 37)]
    assert progress.bad_rows == 6
    state.close()


async def test_rows_that_fail_are_told_with_file_row_id_and_reason(make: Any) -> None:
    sink = Memory()
    runner, state = make(Numbers(12), sink, Embeds(fails=lambda text: text in {"f0:3", "f0:11"}))
    await runner.run()
    assert sink.ids == [0, 1, 2, 4, 5, 6, 8, 10]
    told = [(row["row"], row["reason"], row["id"]) for row in side_file(state)]
    assert told == [(3, "too_long", "3"), (7, "null", None), (11, "too_long", "11")]
    state.close()


async def test_a_part_without_good_rows_is_committed_and_has_no_file(make: Any) -> None:
    sink = Memory()
    runner, state = make(Numbers(20), sink, Embeds(fails=lambda text: int(text[3:]) < 10))
    await runner.run()
    assert list(sink.parts) == [PartId(0, 1)] == sink.finished
    assert len(state.records()) == 2
    assert sink.open_writers == 0
    state.close()


async def test_what_is_committed_is_not_read_again(make: Any) -> None:
    source, sink = Numbers(35), Memory()
    runner, state = make(source, sink, Embeds())
    await runner.run()
    state.close()
    again, others, embeds = Numbers(35), Memory(), Embeds()
    runner, state = make(again, others, embeds)
    await runner.run()
    assert (again.read_rows, embeds.windows, others.begun) == ([], [], [])
    assert others.finished == sorted(sink.parts)
    state.close()


async def test_a_part_that_failed_to_commit_is_made_again(make: Any) -> None:
    source, sink = Numbers(35), Memory()
    sink.fail_at = PartId(0, 1)
    runner, state = make(source, sink, Embeds())
    with pytest.raises(OSError, match="No space left"):
        await runner.run()
    assert (sink.finished, sink.open_writers) == (None, 0)
    assert [record.part.chunk for record in state.records()] == [0]
    state.close()
    sink.fail_at = None
    runner, state = make(Numbers(35), sink, Embeds())
    await runner.run()
    assert sink.ids == good_ids(35)
    state.close()


async def test_an_error_of_the_queue_ends_it_as_itself(make: Any) -> None:
    class Broken(Embeds):
        async def embed(self, texts: pa.ChunkedArray) -> WindowVectors:
            if "f0:20" in texts.to_pylist():
                raise Unavailable("nobody is there")
            return await super().embed(texts)

    sink = Memory()
    runner, state = make(Numbers(45), sink, Broken())
    with pytest.raises(Unavailable, match="nobody is there"):
        await runner.run()
    assert sink.open_writers == 0
    assert PartId(0, 2) not in sink.parts
    state.close()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that others bring about."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def test_windows_are_bounded_in_bytes_and_in_number(make: Any) -> None:
    embeds = Embeds()
    embeds.gate.clear()
    source = Numbers(400)
    runner, state = make(source, Memory(), embeds, part_rows=100, window_bytes=1)
    task = asyncio.create_task(runner.run())
    await until(lambda: embeds.most_under_way == 4)
    await asyncio.sleep(0.2)  # in which others would begin
    assert all(len(window) <= BLOCK for window in embeds.windows)
    assert embeds.most_under_way == 4
    assert len(source.read_rows) <= 5 * BLOCK
    embeds.gate.set()
    await task
    assert embeds.most_under_way == 4
    state.close()


async def test_stopping_finishes_the_parts_under_way_and_begins_no_other(make: Any) -> None:
    embeds, sink = Embeds(), Memory()
    embeds.gate.clear()
    runner, state = make(Numbers(400), sink, embeds, part_rows=100)
    task = asyncio.create_task(runner.run())
    await until(lambda: embeds.most_under_way > 0)
    runner.stop()
    embeds.gate.set()
    await task
    assert sink.parts
    assert sink.finished is None
    assert all(len(rows) == 80 for rows in sink.parts.values())
    assert state.missing(1) == (0,)
    state.close()
    runner, state = make(Numbers(400), sink, Embeds(), part_rows=100)
    await runner.run()
    assert sink.ids == good_ids(400)
    state.close()


async def test_a_part_that_another_process_has_is_left_to_it_and_taken_when_it_dies(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink, progress = Memory(), Progress()
    runner, state = make(Numbers(30), sink, Embeds(), progress=progress)
    monkeypatch.setattr("embedstream.producer.backfill.runner._WAIT_S", 0.05)
    theirs = {PartId(0, 1)}
    claim = state.claim
    monkeypatch.setattr(state, "claim", lambda part: part not in theirs and claim(part))
    task = asyncio.create_task(runner.run())
    await until(lambda: len(sink.parts) == 2 and "other processes" in progress.state)
    await asyncio.sleep(0.2)  # in which it asks again
    assert sorted(sink.parts) == [PartId(0, 0), PartId(0, 2)]
    assert "other processes" in progress.state
    assert (progress.rows, progress.resumed_rows) == (20, 0)
    theirs.clear()  # it died
    await task
    assert sink.ids == good_ids(30)
    state.close()


async def test_what_others_commit_is_counted(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sink, progress = Memory(), Progress()
    runner, state = make(Numbers(30), sink, Embeds(), progress=progress)
    claim: Callable[[PartId], bool] = state.claim
    committed: list[PartId] = []

    def other_is_first(part: PartId) -> bool:
        if part == PartId(0, 1):
            if not committed:
                committed.append(part)
                assert claim(part)
                bad = [BadRow("f0", 17, BadReason.NULL, "no text")]
                state.commit(PartRecord(part, 10, 8, 8, 16, len(bad)), bad)
            return False
        return claim(part)

    monkeypatch.setattr(state, "claim", other_is_first)
    await runner.run()
    assert (progress.rows, progress.resumed_rows, progress.bad_rows) == (20, 10, 3)
    state.close()
