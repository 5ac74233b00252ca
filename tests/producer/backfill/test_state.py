from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pytest

from embedstream.producer.backfill import drafts, records
from embedstream.producer.backfill.blocks import BadReason, BadRow
from embedstream.producer.backfill.manifest import manifest_of
from embedstream.producer.backfill.options import BackfillOptions, InputOptions, OutputOptions
from embedstream.producer.backfill.outputs import output_of
from embedstream.producer.backfill.plan import PartId
from embedstream.producer.backfill.records import PartRecord
from embedstream.producer.backfill.state import State
from embedstream.producer.request import Options
from embedstream.shared.errors import Misconfigured, Unavailable
from embedstream.shared.processes import own_identity

Opener = Callable[[], State]


def record(shard: int, chunk: int, bad_rows: int = 0) -> PartRecord:
    return PartRecord(PartId(shard, chunk), 10, 10 - bad_rows, 5, 50, bad_rows)


def bad(row: int, **more: str) -> BadRow:
    return BadRow("/in/a.parquet", row, BadReason.NULL, "The text is null.", **more)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out.backfill"


MANIFEST = manifest_of(
    BackfillOptions(InputOptions("/in"), OutputOptions("/out"), Options()), (), pa.schema([("row", pa.int64())])
)


@pytest.fixture
def open_state(folder: Path) -> Opener:
    return lambda: State(folder, MANIFEST)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_what_was_committed_is_known_afterwards(open_state: Opener) -> None:
    with closing(open_state()) as state:
        state.commit(record(1, 0))
        state.commit(record(0, 1, bad_rows=2), [bad(10), bad(17)])
        state.commit(record(0, 0))
    with closing(open_state()) as state:
        assert state.records() == [record(0, 0), record(0, 1, bad_rows=2), record(1, 0)]
        assert state.is_committed(PartId(0, 1))
        assert not state.is_committed(PartId(0, 2))


def test_shards_are_missing_until_their_end_is_known_and_every_part_is_there(open_state: Opener) -> None:
    with closing(open_state()) as state:
        state.commit(record(0, 0))
        state.commit(record(0, 0))  # made twice: it is one part all the same
        state.shard_ended(1, 1, 3)
        assert state.missing(2) == (0, 1)
        state.shard_ended(0, 2, 20)
        assert state.missing(2) == (0, 1)
        state.commit(record(0, 1))
        assert state.missing(2) == (1,)
        assert (state.parts_of(0), state.parts_of(2)) == (2, None)
        state.commit(record(1, 0))
        assert state.missing(2) == ()
        state.shard_ended(2, 0, 0)
        assert state.missing(3) == ()


def test_two_ends_of_a_shard_mean_that_the_input_changed(open_state: Opener) -> None:
    with closing(open_state()) as state:
        state.shard_ended(0, 2, 20)
        state.shard_ended(0, 2, 20)
        with pytest.raises(Misconfigured, match=r"had 20 rows and now has 21"):
            state.shard_ended(0, 2, 21)


def test_the_work_of_others_is_seen_without_reading_what_is_known(
    open_state: Opener, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(open_state()) as state:
        state.commit(record(0, 0))
        assert len(state.records()) == 1
        others = records.Records(folder / "parts")  # as another process does
        others.add(record(0, 1, bad_rows=1), [bad(11)])
        others.add_end(0, records.ShardEnd(2, 20))
        read: list[str] = []
        real = Path.read_bytes

        def noting(path: Path) -> bytes:
            read.append(path.name)
            return real(path)

        monkeypatch.setattr(Path, "read_bytes", noting)
        assert state.is_committed(PartId(0, 1))
        assert state.records() == [record(0, 0), record(0, 1, bad_rows=1)]
        assert state.missing(1) == ()
        assert sorted(read) == ["00000-000001.json", "00000.json"]


def test_a_damaged_record_means_that_the_part_is_made_again(open_state: Opener, folder: Path) -> None:
    with closing(open_state()) as state:
        state.commit(record(0, 0))
        state.commit(record(0, 1))
        state.shard_ended(0, 2, 20)
        state.commit(record(1, 0, bad_rows=1), [bad(3)])
        state.shard_ended(1, 1, 10)
    (folder / "parts" / "00000-000001.json").write_bytes(b"")
    (folder / "parts" / "00001-000000.bad.jsonl").unlink()
    with closing(open_state()) as state:
        state.write_side_file()
        assert state.missing(2) == (0, 1)
        assert not state.is_committed(PartId(0, 1))
        state.commit(record(0, 1))
        state.commit(record(1, 0, bad_rows=1), [bad(3)])
        assert state.missing(2) == ()


def test_bad_rows_stand_in_the_side_file_once_and_in_order(open_state: Opener, folder: Path) -> None:
    side_file = folder / "bad-rows.jsonl"
    with closing(open_state()) as state:
        state.commit(record(0, 1, bad_rows=1), [bad(12, id="twelve")])
        assert len(side_file.read_text().splitlines()) == 1  # also while it runs
        state.commit(record(0, 0, bad_rows=2), [bad(3), bad(4)])
        state.commit(record(0, 0, bad_rows=2), [bad(3), bad(4)])  # killed after the part, and made again
        state.finish()  # brings it up to date: nobody who finds it finished does
    said = [json.loads(line) for line in side_file.read_text().splitlines()]
    assert [row["row"] for row in said] == [3, 4, 12]
    assert said[2] == {
        "file": "/in/a.parquet",
        "row": 12,
        "id": "twelve",
        "reason": "null",
        "message": "The text is null.",
    }


def test_what_a_killed_process_left_of_the_side_file_goes(tmp_path: Path) -> None:
    output = output_of(OutputOptions(str(tmp_path / "out.parquet")))
    dead = f"{drafts.host_name()}-999999-1.tmp"
    left, other = tmp_path / f".out.parquet.bad-rows.jsonl.{dead}", tmp_path / f".a.jsonl.{dead}"
    left.write_bytes(b"")
    other.write_bytes(b"")
    with closing(State(output.state_folder, MANIFEST, output)):
        assert not left.exists()
    assert other.exists()  # the folder is not ours alone


def test_without_bad_rows_there_is_no_side_file(open_state: Opener, folder: Path) -> None:
    side_file = folder / "bad-rows.jsonl"
    with closing(open_state()) as state:
        side_file.write_text("of a backfill that is gone\n")
        state.commit(record(0, 0))
        state.write_side_file()
    assert not side_file.exists()


def test_the_side_file_lies_beside_a_local_output(folder: Path, tmp_path: Path) -> None:
    with closing(State(folder, MANIFEST, output_of(OutputOptions(str(tmp_path / "x.parquet"))))) as state:
        state.commit(record(0, 0, bad_rows=1), [bad(3)])
    assert (tmp_path / "x.parquet.bad-rows.jsonl").exists()
    with closing(State(tmp_path / "s", MANIFEST, output_of(OutputOptions("memory://bucket/x")))) as state:
        assert state.bad_rows_path == tmp_path / "s" / "bad-rows.jsonl"


def test_drafts_of_the_dead_go_and_those_of_the_living_stay(open_state: Opener, folder: Path) -> None:
    open_state().close()
    own, host = own_identity(), drafts.host_name()
    living = folder / "parts" / f".00000-000007.json.{host}-{own.pid}-{own.started}.tmp"
    dead = living.with_name(f".00000-000008.json.{host}-{own.pid}-{own.started + 1}.tmp")
    foreign = folder / f".manifest.json.{host}x-{own.pid}-1.tmp"
    old = folder / f".manifest.json.{host}x-{own.pid}-2.tmp"
    for draft in (living, dead, foreign, old):
        draft.touch()
    os.utime(old, (0, 0))
    open_state().close()
    assert [draft.exists() for draft in (living, dead, foreign, old)] == [True, False, True, False]


def test_a_full_disk_is_one_line_and_leaves_nothing(
    open_state: Opener, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with closing(open_state()) as state:
        before = names(folder)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(Unavailable, match="No space is left for the state folder"):
                state.commit(record(0, 0))
        assert names(folder) == before
        assert state.records() == []
        assert not state.is_committed(PartId(0, 0))


def test_a_place_that_is_not_ours_is_one_line(open_state: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(Misconfigured, match=r"cannot be written \(Read-only file system\)"):
        open_state()


def test_an_opening_that_fails_leaves_the_folder_to_the_next(
    open_state: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(Unavailable, match="Input/output error"):
            open_state()
    open_state().close()
