"""Outputs of files whose process is killed at each step that changes a disk."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedstream.producer.backfill.options import OutputOptions
from embedstream.producer.backfill.plan import PartId
from embedstream.producer.backfill.sink import OutputSchema, Sink
from embedstream.producer.backfill.sinks import open_sink
from embedstream.shared.errors import Misconfigured, Unavailable

SCHEMA = OutputSchema(pa.schema([("id", pa.int64())]), "embedding", 3, "float32", {}, "id")
PARTS = [PartId(0, 0), PartId(1, 0)]
ROWS = 5
KILLED = 9


class Disk:
    """Ends this process, as kill -9 would, before the n-th change of a disk."""

    def __init__(self, last: int) -> None:
        self.left = last
        for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink"), (shutil, "copyfile")):
            setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            if self.left == 0:
                os._exit(KILLED)
            self.left -= 1
            return change(*arguments, **options)

        return counted


def opened(out: Path) -> Sink:
    return open_sink(OutputOptions(str(out)), SCHEMA, out.with_name("staging"))


def write(sink: Sink, part: PartId) -> None:
    first = PARTS.index(part) * ROWS
    writer = sink.begin(part)
    ids = np.arange(first, first + ROWS)
    writer.write(pa.record_batch({"id": ids}), np.repeat(ids, 3).reshape(-1, 3).astype(np.float32))
    writer.commit()


def work(out: Path) -> None:
    """What a backfill does: parts that are not recorded yet, then the end, which is recorded nowhere."""
    records = out.with_name("records")
    records.mkdir(exist_ok=True)
    with closing(opened(out)) as sink:
        for part in PARTS:
            if not (records / part.name).exists():
                write(sink, part)
                (records / part.name).touch()
        sink.finish(PARTS)


def in_a_child(out: Path, last: int) -> int:
    """Do it in a process of its own, up to a change of the disk; its exit code."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            Disk(last)
            work(out)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def ids_of(out: Path) -> list[int]:
    """What the output holds, checked against its vectors."""
    if out.suffix == ".npy":
        vectors = np.load(out)
        ids: list[int] = pq.read_table(out.with_suffix(".ids.parquet"))["id"].to_pylist()
    else:
        table = pq.read_table(out)
        ids = table["id"].to_pylist()
        vectors = table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, 3)
    np.testing.assert_array_equal(vectors, np.repeat(ids, 3).reshape(-1, 3))
    return ids


@pytest.mark.parametrize(("name", "step"), [("out", 1), ("out.parquet", 1), ("out.npy", 3)])
def test_killed_at_any_step_and_run_again_every_row_is_there_once(name: str, step: int, tmp_path: Path) -> None:
    for last in range(0, 200, step):
        folder = tmp_path / str(last)
        folder.mkdir()
        out = folder / name
        code = in_a_child(out, last)
        if code == KILLED and out.is_file():
            ids_of(out)  # whole, or not there at all
        assert code in {0, KILLED}
        work(out)
        assert ids_of(out) == list(range(2 * ROWS))
        assert not list(folder.rglob("*.tmp"))
        assert not list((folder / "staging").glob("parts/*"))
        if code == 0:
            break
    assert 8 < last < 200


@pytest.mark.parametrize("name", ["out", "out.parquet", "out.jsonl", "out.npy"])
def test_finishing_again_and_at_once_changes_nothing(name: str, tmp_path: Path) -> None:
    out = tmp_path / name
    sinks = [opened(out) for _ in range(2)]
    for part in PARTS:
        write(sinks[0], part)
        write(sinks[1], part)  # committed twice
    threads = [threading.Thread(target=sink.finish, args=(PARTS,)) for sink in sinks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    before = {path: path.read_bytes() for path in tmp_path.rglob("out*") if path.is_file()}
    sinks[0].finish(PARTS)
    with closing(opened(out)) as sink:
        sink.finish(PARTS)
    assert {path: path.read_bytes() for path in tmp_path.rglob("out*") if path.is_file()} == before


def test_a_part_given_up_leaves_nothing(tmp_path: Path) -> None:
    with closing(opened(tmp_path / "out")) as sink:
        writer = sink.begin(PARTS[0])
        writer.write(pa.record_batch({"id": [1]}), np.zeros((1, 3), np.float32))
        writer.abort()
    assert [path.name for path in tmp_path.rglob("*part*")] == []


def test_a_part_that_lost_its_rows_since_it_was_put_goes_in_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with closing(opened(out)) as sink:
        for part in PARTS:
            write(sink, part)
        (out / "notes.txt").write_text("of somebody else")
        sink.finish(PARTS[1:])
    assert sorted(path.name for path in out.iterdir()) == ["notes.txt", "part-00001-000000.parquet"]


@pytest.mark.parametrize("name", ["out", "out.parquet"])
def test_a_committed_part_that_somebody_removed_is_named(name: str, tmp_path: Path) -> None:
    with closing(opened(tmp_path / name)) as sink:
        write(sink, PARTS[0])
        with pytest.raises(Misconfigured, match=r"has lost 1 files that were committed, part-00001-000000"):
            sink.finish(PARTS)


def test_a_finished_file_that_somebody_removed_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    work(out)
    out.unlink()
    with pytest.raises(Misconfigured, match=r"was complete, and out\.parquet is gone"):
        work(out)


def test_another_file_system_gets_the_whole_file_too(tmp_path: Path) -> None:
    shared = Path("/dev/shm")  # noqa: S108 # the file system that every Linux has besides that of temporary files
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is only one file system")
    out = shared / f"embedstream-{os.getpid()}" / "out"
    try:
        with closing(open_sink(OutputOptions(str(out)), SCHEMA, tmp_path / "staging")) as sink:
            for part in PARTS:
                write(sink, part)
            sink.finish(PARTS)
        assert ids_of(out) == list(range(2 * ROWS))
        assert [path.name for path in out.parent.iterdir()] == ["out"]
    finally:
        shutil.rmtree(out.parent)
    assert not list((tmp_path / "staging").glob(".*"))


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    with closing(opened(tmp_path / "out")) as sink:
        writer = sink.begin(PARTS[0])
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(Unavailable, match="No space is left"):
            writer.commit()
        writer.abort()
    assert [path.name for path in tmp_path.rglob("*part*")] == []


def test_a_store_that_nothing_here_knows_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match=r"nosuch://\*\*\*@host/out cannot be opened"):
        open_sink(OutputOptions("nosuch://user:secret@host/out"), SCHEMA, tmp_path)
    assert fsspec.available_protocols()
