"""A program for the tests of kills: commits parts of one state folder in children, kills them, and looks after each.

Usage: python committing.py FOLDER ROUNDS SEED. It ends with an AssertionError where the state is not what it should be.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from contextlib import closing
from pathlib import Path

import pyarrow as pa

from embedstream.producer.backfill import side_file
from embedstream.producer.backfill.blocks import BadReason, BadRow
from embedstream.producer.backfill.drafts import write_whole
from embedstream.producer.backfill.manifest import manifest_of
from embedstream.producer.backfill.options import BackfillOptions, InputOptions, OutputOptions
from embedstream.producer.backfill.plan import PartId
from embedstream.producer.backfill.records import PartRecord
from embedstream.producer.backfill.state import State
from embedstream.producer.backfill.survey import survey
from embedstream.producer.request import Options

SHARDS, CHUNKS, ROWS = 5, 60, 3
AT_ONCE = 2
side_file.LEAST_BETWEEN_S = 0.0
side_file.MOST_OF_THE_TIME = 1.0


def open_state(folder: Path) -> State:
    options = BackfillOptions(InputOptions("/in"), OutputOptions(str(folder / "out")), Options())
    return State(folder / "state", manifest_of(options, (), pa.schema([("row", pa.int64())]), part_rows=ROWS))


def bad_of(part: PartId) -> list[BadRow]:
    if part.chunk % 3:
        return []
    return [BadRow(f"{part.shard:05}", part.chunk * ROWS + row, BadReason.NULL, "The text is null.") for row in (0, 2)]


def work(folder: Path) -> None:
    """What a backfill does to its state."""
    with closing(open_state(folder)) as state:
        while state.missing(SHARDS):
            for shard in state.missing(SHARDS):
                for chunk in range(CHUNKS):
                    commit(folder, state, PartId(shard, chunk))
                state.shard_ended(shard, CHUNKS, CHUNKS * ROWS)
        state.finish()
        state.write_side_file()


def commit(folder: Path, state: State, part: PartId) -> None:
    if state.is_committed(part) or not state.claim(part):
        return
    if state.is_committed(part):
        state.release(part)
        return
    bad = bad_of(part)
    write_whole(folder / "out" / part.name, part.name.encode())
    state.commit(PartRecord(part, ROWS, ROWS - len(bad), 1, 1, len(bad)), bad)


def check(folder: Path, *, to_the_end: bool) -> int:
    """Nothing is half there. Returns how many parts are committed."""
    with closing(open_state(folder)) as state:
        records = state.records()
        for record in records:
            bad = bad_of(record.part)
            assert record == PartRecord(record.part, ROWS, ROWS - len(bad), 1, 1, len(bad)), record
            assert (folder / "out" / record.part.name).read_bytes() == record.part.name.encode()
        committed = {record.part for record in records}
        assert len(committed) == len(records)
        for shard in range(SHARDS):
            assert state.parts_of(shard) in {None, CHUNKS}
            for chunk in range(CHUNKS):
                assert state.claim(PartId(shard, chunk)), "the claim of a dead process"
        if to_the_end:
            assert len(committed) == SHARDS * CHUNKS
            assert state.is_complete
            assert state.missing(SHARDS) == ()
        told = [json.loads(line) for line in read_lines(state.bad_rows_path)]
        rows = [(row["file"], row["row"]) for row in told]
        expected = [(row.file, row.row) for record in records for row in bad_of(record.part)]
        assert rows == expected if to_the_end else set(rows) <= set(expected) and rows == sorted(set(rows)), rows
    drafts = [path.name for path in (folder / "state").rglob("*.tmp")]
    assert not drafts, drafts
    told_of = survey(folder / "state")
    assert told_of is not None
    assert told_of.taken == ROWS * len(records)
    return len(records)


def read_lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def start(folder: Path) -> int:
    pid = os.fork()
    if pid == 0:
        work(folder)
        os._exit(0)
    return pid


def main() -> None:
    folder, rounds, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(sys.argv[3])
    (folder / "out").mkdir()
    counts = [0]
    for _ in range(rounds):
        children = [start(folder) for _ in range(AT_ONCE)]
        for pid in children:
            time.sleep(rng.uniform(0.001, 0.06))
            os.kill(pid, signal.SIGKILL)
        for pid in children:
            os.waitpid(pid, 0)
        counts.append(check(folder, to_the_end=False))
    assert counts == sorted(counts)
    assert len(set(counts)) > rounds // 3, f"the kills came before the work: {counts}"
    for pid in [start(folder) for _ in range(AT_ONCE)]:
        assert os.waitpid(pid, 0)[1] == 0
    check(folder, to_the_end=True)


if __name__ == "__main__":
    main()
