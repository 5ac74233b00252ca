"""Every input format against the same rows in plain Python."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import ipc

from embedstream.producer.backfill import csv_reader, line_reader, lines, reading
from embedstream.producer.backfill.blocks import BadReason, Block
from embedstream.producer.backfill.jsonl_reader import SAMPLE_ROWS
from embedstream.producer.backfill.listing import list_files
from embedstream.producer.backfill.options import InputOptions
from embedstream.producer.backfill.plan import shards_of
from embedstream.producer.backfill.sources import FileSource, FilesReader, open_source
from embedstream.shared.errors import Misconfigured

Row = dict[str, Any]
ODD = ["", "ein „Wort“", 'says "hi", twice', "two\nlines", " spaces ", "comma, tab\t", "🙂" * 5, "x" * 3000]


def some_rows(n_rows: int) -> list[Row]:
    texts = [f"{ODD[n % len(ODD)]} {n}" for n in range(n_rows)]
    return [{"id": f"r{n}", "text": text, "lang": "en" if n % 3 else "de"} for n, text in enumerate(texts)]


def as_parquet(rows: Sequence[Row], path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), path, row_group_size=7)


def as_arrow(rows: Sequence[Row], path: Path) -> None:
    table = pa.Table.from_pylist(list(rows), schema=SCHEMA)
    with ipc.new_file(path, SCHEMA, options=ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table, max_chunksize=5)


def as_arrow_stream(rows: Sequence[Row], path: Path) -> None:
    table = pa.Table.from_pylist(list(rows), schema=SCHEMA)
    with ipc.new_stream(path, SCHEMA) as writer:
        writer.write_table(table, max_chunksize=5)


def as_jsonl(rows: Sequence[Row], path: Path) -> None:
    path.write_bytes(packed("".join(json.dumps(row) + "\n" for row in rows).encode(), path))


def as_csv(rows: Sequence[Row], path: Path) -> None:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(SCHEMA.names), delimiter="\t" if ".tsv" in path.name else ",")
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(packed(file.getvalue().encode(), path))


def packed(data: bytes, path: Path) -> bytes:
    if path.suffix == ".gz":
        return gzip.compress(data)
    return zstd.compress(data) if path.suffix == ".zst" else data


SCHEMA = pa.schema([("id", pa.string()), ("text", pa.string()), ("lang", pa.string())])
WRITERS: dict[str, Callable[[Sequence[Row], Path], None]] = {
    "rows.parquet": as_parquet,
    "rows.arrow": as_arrow,
    "stream.arrow": as_arrow_stream,
    "rows.jsonl": as_jsonl,
    "rows.ndjson.gz": as_jsonl,
    "rows.jsonl.zst": as_jsonl,
    "rows.csv": as_csv,
    "rows.csv.gz": as_csv,
    "rows.tsv": as_csv,
}


@contextmanager
def reader_of(source: FileSource) -> Iterator[FilesReader]:
    (shard,) = shards_of(source.files)
    with source.open(shard) as reader:
        yield reader


def blocks_of(**options: Any) -> list[Block]:
    with reader_of(open_source(InputOptions(**options))) as reader:
        return list(reader.take(1_000_000))


def rows_of(blocks: Sequence[Block], text: str = "text") -> list[Row]:
    """Rows as they were written, out of blocks whose parts must fit each other."""
    rows = []
    for block in blocks:
        assert len(block.rows) == len(block.texts) == block.carried.num_rows
        assert block.taken >= len(block.rows) + len(block.bad)
        assert (np.diff(block.rows) > 0).all()
        rows += [
            row | {text: value} for row, value in zip(block.carried.to_pylist(), block.texts.to_pylist(), strict=True)
        ]
    return rows


def bad_of(blocks: Sequence[Block]) -> list[tuple[int, BadReason]]:
    return [(row.row, row.reason) for block in blocks for row in block.bad]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces so small that few rows need several of each."""
    monkeypatch.setattr(lines, "_CHUNK_BYTES", 100)
    for module in (reading, csv_reader, line_reader):
        monkeypatch.setattr(module, "BLOCK_ROWS", 6)


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    rows = some_rows(40)
    WRITERS[name](rows, tmp_path / name)
    blocks = blocks_of(path=str(tmp_path / name), id_column="id", carry=("lang",))
    assert rows_of(blocks) == rows
    assert sum(block.taken for block in blocks) == 40
    assert np.concatenate([block.rows for block in blocks]).tolist() == list(range(40))
    assert blocks[0].carried.schema.names == ["id", "lang"]
    assert bad_of(blocks) == []


@pytest.mark.parametrize("name", WRITERS)
def test_a_condition_leaves_rows_out_and_counts_them(name: str, tmp_path: Path) -> None:
    rows = some_rows(40)
    WRITERS[name](rows, tmp_path / name)
    blocks = blocks_of(path=str(tmp_path / name), where="lang = 'de'")
    kept = [n for n in range(40) if n % 3 == 0]
    assert rows_of(blocks) == [{"row": n, "text": rows[n]["text"]} for n in kept]
    assert sum(block.taken for block in blocks) == 40


@pytest.mark.parametrize("name", WRITERS)
def test_an_empty_file_is_fine(name: str, tmp_path: Path) -> None:
    WRITERS[name]([], tmp_path / name)
    source = open_source(InputOptions(str(tmp_path / name), id_column="id"))
    with reader_of(source) as reader:
        assert reader.skip(5) == 0
        assert list(reader.take(5)) == []


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_takes_and_skips_add_up_to_the_whole(name: str, data: st.DataObject, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("rows")
    sizes = data.draw(st.lists(st.integers(0, 25), min_size=1, max_size=4), "rows of the files")
    written = some_rows(sum(sizes))
    rows, paths = list(written), []
    for number, size in enumerate(sizes):
        paths.append(folder / f"{number}-{name}")
        WRITERS[name](rows[:size], paths[-1])
        rows = rows[size:]
    expected = [
        (str(path), place, written[sum(sizes[:number]) + place])
        for number, path in enumerate(paths)
        for place in range(sizes[number])
    ]
    read: list[tuple[str, int, Row]] = []
    at = 0
    with reader_of(open_source(InputOptions(str(folder), id_column="id", carry=("lang",)))) as reader:
        while True:
            step = data.draw(st.integers(1, 20), "step")
            if data.draw(st.booleans(), "skip"):
                taken = reader.skip(step)
                read += expected[at : at + taken]
            else:
                blocks = list(reader.take(step))
                taken = sum(block.taken for block in blocks)
                places = [(block.file, row) for block in blocks for row in block.rows.tolist()]
                read += [(file, row, value) for (file, row), value in zip(places, rows_of(blocks), strict=True)]
            assert taken <= step
            at += taken
            if taken < step:
                break
    assert at == len(expected)
    assert read == expected


def test_lines_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\nthr\xffee\n" + "fünf 🙂".encode())
    blocks = blocks_of(path=str(tmp_path / "a.txt"))
    assert rows_of(blocks) == [{"row": 0, "text": "one"}, {"row": 1, "text": ""}, {"row": 3, "text": "fünf 🙂"}]
    assert bad_of(blocks) == [(2, BadReason.UNDECODABLE)]


def test_one_bad_line_of_json_is_one_bad_row(tmp_path: Path) -> None:
    content = [
        b'{"id": 1, "text": "one", "n": 1}',
        b'{"id": 2, "text": "t\xffwo"}',
        b'{"id": 3, "text": ',
        b"[4]",
        b"",
        b'{"id": 6, "n": 6}',
        b'{"id": 7, "text": null}',
        b'{"id": 8, "text": {"a": 1}}',
        b'{"text": "nine"}',
        b'{"id": 10, "text": "ten", "n": 2.5}',
        b'{"id": "11", "text": "eleven"}',
        b'{"id": 12, "text": "twelve"}',
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(content[:1] * 1000 + content))
    blocks = blocks_of(path=str(path), id_column="id", carry=("n",))
    kept = [row for row in rows_of(blocks) if row["id"] != 1]
    assert kept == [{"id": 12, "n": None, "text": "twelve"}]
    reasons = BadReason
    assert bad_of(blocks) == [
        (1001, reasons.UNDECODABLE),
        (1002, reasons.UNDECODABLE),
        (1003, reasons.INVALID),
        (1005, reasons.NULL),
        (1006, reasons.NULL),
        (1007, reasons.INVALID),
        (1008, reasons.NULL),
        (1009, reasons.INVALID),
        (1010, reasons.INVALID),
    ]
    assert [row.id for block in blocks for row in block.bad] == [None, None, None, "6", "7", "8", None, "10", None]
    assert sum(block.taken for block in blocks) == 1012
    assert "`n`" in [row for block in blocks for row in block.bad][7].message


def test_values_of_json_are_carried_as_they_are_or_not_at_all(tmp_path: Path) -> None:
    good = {"text": "t", "n": 1, "f": 1.5, "h": 2**64 - 1, "l": [1], "s": {"a": None, "b": True}, "e": []}
    others: list[Row] = [
        {"n": True},
        {"n": 2**63},
        {"f": "1"},
        {"f": 2**60},
        {"h": -1},
        {"l": [2.5]},
        {"l": 3},
        {"s": {"b": 1}},
        {"e": [1]},
    ]
    path = tmp_path / "a.jsonl"
    rows = [good] * 1000 + [good | other for other in others] + [good | {"f": 3, "s": {"b": False}, "e": ["x"]}]
    path.write_text("\n".join(map(json.dumps, rows)))
    blocks = blocks_of(path=str(path), carry=("*",))
    kept = rows_of(blocks)
    assert [{key: row[key] for key in good} for row in kept[:1000]] == [good] * 1000
    assert kept[1000:] == [good | {"row": 1009, "f": 3.0, "s": {"a": None, "b": False}, "e": ["x"]}]
    assert bad_of(blocks) == [(row, BadReason.INVALID) for row in range(1000, 1009)]


def test_rows_that_are_left_out_are_not_bad_as_well(tmp_path: Path) -> None:
    rows = ['{"kind": "doc", "text": "a"}', '{"kind": "log", "text": 5}', '{"kind": 7, "text": "b"}', "{"]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(rows[:1] * 1000 + rows))
    blocks = blocks_of(path=str(path), where="kind = 'doc'")
    assert bad_of(blocks) == [(1002, BadReason.INVALID), (1003, BadReason.UNDECODABLE)]
    assert len(rows_of(blocks)) == 1001


def test_one_bad_record_of_csv_is_one_bad_row(tmp_path: Path) -> None:
    records = [b'1,"a\r\nb"', b"2,\xff", b"3", b"", b'4,"x"y', b"5,c,d", b"6,fine", b'7,"open', b"8,swallowed"]
    (tmp_path / "a.csv").write_bytes(b"id,text\r\n" + b"\r\n".join(records))
    blocks = blocks_of(path=str(tmp_path / "a.csv"), id_column="id")
    assert rows_of(blocks) == [{"id": "1", "text": "a\r\nb"}, {"id": "6", "text": "fine"}]
    invalid, undecodable = BadReason.INVALID, BadReason.UNDECODABLE
    assert bad_of(blocks) == [(1, undecodable), (2, invalid), (4, invalid), (5, invalid), (7, invalid)]
    assert blocks[0].bad[0].id == "2"


def test_strings_of_parquet_that_are_no_utf8_are_bad_rows(tmp_path: Path) -> None:
    def strings(values: list[bytes | None]) -> pa.Array:
        data = pa.array(values, pa.binary())
        return pa.Array.from_buffers(pa.string(), len(data), data.buffers())

    table = pa.table(
        {
            "id": strings([b"a", b"b", b"c\xff", b"d", None]),
            "text": strings([b"one", b"\xf0\x9f", b"three", b"four", b"five"]),
            "note": strings([b"n", b"n", b"n", b"\xed\xa0\x80", b"n"]),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    blocks = blocks_of(path=str(tmp_path / "a.parquet"), id_column="id", carry=("note",))
    assert rows_of(blocks) == [{"id": "a", "note": "n", "text": "one"}]
    wrong = BadReason.UNDECODABLE
    assert bad_of(blocks) == [(1, wrong), (2, wrong), (3, wrong), (4, BadReason.NULL)]
    assert [row.id for row in blocks[0].bad] == ["b", None, "d", None]


@pytest.mark.parametrize(
    ("kind", "dictionary"),
    [
        (pa.string_view(), False),
        *((kind, of) for kind in (pa.large_string(), pa.binary(), pa.large_binary()) for of in (False, True)),
    ],
)
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_texts_of_every_string_type(kind: pa.DataType, dictionary: bool, name: str, tmp_path: Path) -> None:
    texts = pa.array([b"one", None, b"drei"], pa.binary()).cast(pa.string()).cast(kind)
    if dictionary:
        texts = texts.dictionary_encode()
    table = pa.table({"text": texts, "again": texts})
    if name == "a.parquet":
        pq.write_table(table, tmp_path / name)
    else:
        with ipc.new_file(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    blocks = blocks_of(path=str(tmp_path / name), carry=("again",))
    assert [text for block in blocks for text in block.texts.to_pylist()] == ["one", "drei"]
    assert not pa.types.is_dictionary(blocks[0].carried.schema.field("again").type)
    assert bad_of(blocks) == [(1, BadReason.NULL)]


def test_blocks_are_small_whatever_the_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    texts = [f"{n} " + "word " * 200 for n in range(60_000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=60_000, use_dictionary=False)
    before = pa.total_allocated_bytes()
    most = 0
    with reader_of(open_source(InputOptions(str(tmp_path / "a.parquet")))) as reader:
        assert reader.skip(50_000) == 50_000
        for block in reader.take(60_000):
            assert len(block.rows) <= reading.BLOCK_ROWS
            assert block.n_bytes < 1.2 * reading.BLOCK_BYTES
            most = max(most, pa.total_allocated_bytes() - before)
    assert most < 40 * 1024 * 1024  # of 60 MB in the one row group


def test_blocks_are_small_whatever_the_batch_of_arrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    table = pa.table({"text": [f"{n} " + "word " * 1000 for n in range(4000)]})
    with ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    blocks = blocks_of(path=str(tmp_path / "a.arrow"))
    assert sum(len(block.rows) for block in blocks) == 4000
    assert max(block.n_bytes for block in blocks) < 1.1 * reading.BLOCK_BYTES


def test_runs_of_one_value_are_decoded(tmp_path: Path) -> None:
    table = pa.table({"text": pc.run_end_encode(pa.array(["a", "a", None, "b"]))})
    with ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    blocks = blocks_of(path=str(tmp_path / "a.arrow"))
    assert [row["text"] for row in rows_of(blocks)] == ["a", "a", "b"]
    assert bad_of(blocks) == [(2, BadReason.NULL)]


def test_a_line_may_be_huge_and_one_that_is_too_long_is_a_bad_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "_CHUNK_BYTES", 1024 * 1024)
    huge = "word " * 10_000_000
    (tmp_path / "a.txt").write_text(f"one\n{huge}\nthree\n")
    assert [row["text"] for row in rows_of(blocks_of(path=str(tmp_path / "a.txt")))] == ["one", huge, "three"]
    monkeypatch.setattr(lines, "MOST_LINE_BYTES", 1000)
    blocks = blocks_of(path=str(tmp_path / "a.txt"))
    assert [row["text"] for row in rows_of(blocks)] == ["one", "three"]
    assert bad_of(blocks) == [(1, BadReason.INVALID)]
    (tmp_path / "a.csv").write_text(f"text\none\n{huge}\nthree\n")
    blocks = blocks_of(path=str(tmp_path / "a.csv"))
    assert [row["text"] for row in rows_of(blocks)] == ["one", "three"]
    assert bad_of(blocks) == [(1, BadReason.INVALID)]


def test_a_line_that_is_too_long_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_CHUNK_BYTES", 64 * 1024)
    monkeypatch.setattr(lines, "MOST_LINE_BYTES", 100_000)
    (tmp_path / "a.txt").write_text("one\n" + "x" * 20_000_000 + "\nthree\n")
    (place,) = list_files(str(tmp_path / "a.txt"), None).places
    reader = lines.Lines(place)
    tracemalloc.start()
    try:
        assert [line for _ in range(3) for line in reader.read(1)] == [b"one", None, b"three"]
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
        reader.close()


def test_whole_numbers_beyond_64_bits_are_never_rounded(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    digits = "123456789012345678901"
    known = '{"id": 1, "x": 1e30, "text": "a"}\n'
    path.write_text(known * SAMPLE_ROWS + f'{{"id": {digits}, "text": "b"}}\n{{"id": -{digits}, "text": "c"}}\n')
    blocks = blocks_of(path=str(path), id_column="id", carry=("x",))
    assert {row["x"] for block in blocks for row in block.carried.to_pylist()} == {1e30}
    assert bad_of(blocks) == [(SAMPLE_ROWS, BadReason.INVALID), (SAMPLE_ROWS + 1, BadReason.INVALID)]
    path.write_text(f'{{"id": {digits}, "text": "b"}}\n')
    with pytest.raises(Misconfigured, match="`id`"):
        blocks_of(path=str(path), id_column="id")


@pytest.mark.parametrize("name", ["rows.ndjson.gz", "rows.jsonl.zst", "rows.csv.gz"])
def test_a_truncated_archive_stops_everything_where_it_ends(name: str, tmp_path: Path) -> None:
    rows = [row | {"noise": np.random.default_rng(n).bytes(400).hex()} for n, row in enumerate(some_rows(1500))]
    path = tmp_path / name
    if "csv" in name:
        as_csv([{key: row[key] for key in SCHEMA.names} for row in rows], path)
    else:
        as_jsonl(rows, path)
    path.write_bytes(path.read_bytes()[:-50])
    read: list[Block] = []
    source = open_source(InputOptions(str(path), id_column="id"))
    with pytest.raises(Misconfigured, match=rf"{name} is damaged.*at row \d+") as caught, reader_of(source) as reader:
        read.extend(reader.take(10_000))  # it keeps what came before
    assert read
    assert f"at row {sum(block.taken for block in read)}" in str(caught.value)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "stream.arrow"])
def test_a_damaged_file_is_an_error_that_names_it(name: str, tmp_path: Path) -> None:
    WRITERS[name](some_rows(4000), tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    source = open_source(InputOptions(str(tmp_path / name)))
    # The time of change stays, as when a disk fails.
    about = (tmp_path / name).stat()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2].ljust(len(whole), b"\xaa"))
    os.utime(tmp_path / name, ns=(about.st_atime_ns, about.st_mtime_ns))
    with pytest.raises(Misconfigured, match=f"{name} is damaged.*at row"), reader_of(source) as reader:
        list(reader.take(10_000))


def test_a_file_that_is_gone_or_another_one_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    as_jsonl(some_rows(3), path)
    source = open_source(InputOptions(str(path)))
    as_jsonl(some_rows(4), path)
    with reader_of(source) as reader, pytest.raises(Misconfigured, match=r"a\.jsonl was changed"):
        list(reader.take(10))
    path.unlink()
    with reader_of(source) as reader, pytest.raises(Misconfigured, match=r"There is no .*a\.jsonl, at row 0"):
        reader.skip(1)
