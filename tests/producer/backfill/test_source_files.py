"""Which files an input stands for, and where they may lie."""

from __future__ import annotations

import gzip
import json
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from embedstream.producer.backfill.options import InputOptions
from embedstream.producer.backfill.plan import shards_of
from embedstream.producer.backfill.sources import FileSource, open_source
from embedstream.shared.errors import Misconfigured, Unavailable


def source_of(path: Path | str, **options: Any) -> FileSource:
    return open_source(InputOptions(str(path), **options))


def texts_of(source: FileSource) -> list[str]:
    texts: list[str] = []
    for shard in shards_of(source.files):
        with source.open(shard) as reader:
            for block in reader.take(10_000):
                texts += block.texts.to_pylist()
    return texts


def rows_of(source: FileSource) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for shard in shards_of(source.files):
        with source.open(shard) as reader:
            for block in reader.take(10_000):
                rows += block.carried.to_pylist()
    return rows


def write_text(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{text}\n" for text in texts))


def write_parquet(path: Path, **columns: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def test_a_folder_is_read_by_path_without_what_is_hidden(tmp_path: Path) -> None:
    for name in (
        "b/2.txt",
        "b.txt",
        "a/1.txt",
        "b/10.txt",
        ".git/x.txt",
        "_old/x.txt",
        "_SUCCESS",
        "a/.x.txt",
        "README.md",
    ):
        write_text(tmp_path / name, name)
    source = source_of(tmp_path)
    assert texts_of(source) == ["a/1.txt", "b/10.txt", "b/2.txt", "b.txt"]
    assert source.schema == pa.schema(
        [pa.field("file", pa.string(), nullable=False), pa.field("row", pa.int64(), nullable=False)]
    )
    assert rows_of(source)[1] == {"file": str(tmp_path / "b/10.txt"), "row": 0}


def test_signs_that_mean_something_in_an_address_are_plain_in_the_names_of_files(tmp_path: Path) -> None:
    write_text(tmp_path / "what?/a #1 %20.txt", "one")
    (tmp_path / "what?/b?.txt.gz").write_bytes(gzip.compress(b"two\n"))
    assert texts_of(source_of(tmp_path)) == ["one", "two"]


def test_patterns(tmp_path: Path) -> None:
    for name in ("a/1.txt", "a/b/2.txt", "a/b/3.csv", "c/4.txt"):
        write_text(tmp_path / name, "text", name)
    assert texts_of(source_of(tmp_path / "a" / "**" / "*.txt")) == ["text", "a/1.txt", "text", "a/b/2.txt"]
    assert texts_of(source_of(tmp_path / "[ac]" / "?.txt")) == ["text", "a/1.txt", "text", "c/4.txt"]
    write_text(tmp_path / "odd[1].txt", "its name looks like a pattern")
    assert texts_of(source_of(tmp_path / "odd[1].txt")) == ["its name looks like a pattern"]
    with pytest.raises(Misconfigured, match=r"There is no file in .*\*\.jsonl"):
        source_of(tmp_path / "*.jsonl")


def test_relative_paths_and_file_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a.txt", "one")
    monkeypatch.chdir(tmp_path)
    assert source_of("a.txt").files == source_of(f"file://{tmp_path}/a.txt").files
    assert source_of("a.txt").files[0].path == str(tmp_path / "a.txt")


def test_what_cannot_be_told_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match=r"There is no .*nowhere"):
        source_of(tmp_path / "nowhere")
    with pytest.raises(Misconfigured, match="There is no file in"):
        source_of(tmp_path)
    write_text(tmp_path / "a.json", "one")
    with pytest.raises(Misconfigured, match=r"a\.json does not tell its format.*--format"):
        source_of(tmp_path)
    assert texts_of(source_of(tmp_path, format="text")) == ["one"]
    write_text(tmp_path / "a.parquet.gz", "one")
    with pytest.raises(Misconfigured, match=r"a\.parquet\.gz does not tell its format"):
        source_of(tmp_path / "a.parquet.gz")
    (tmp_path / "a.parquet.gz").unlink()
    write_text(tmp_path / "b.txt", "one")
    (tmp_path / "a.json").rename(tmp_path / "a.csv")
    with pytest.raises(Misconfigured, match=r"several formats: .*a\.csv is csv, .*b\.txt is text"):
        source_of(tmp_path)
    with pytest.raises(Misconfigured, match="no input format `xml`; there are parquet, jsonl"):
        source_of(tmp_path, format="xml")
    with pytest.raises(Misconfigured, match=r"a\.csv is damaged, or not what its name says"):
        source_of(tmp_path / "a.csv", format="parquet")


def test_a_file_is_known_again_by_size_time_and_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, *["word " * 100] * 1000)
    (file,) = source_of(path).files
    assert (file.size_bytes, file.version) == (path.stat().st_size, str(path.stat().st_mtime_ns))
    data = bytearray(path.read_bytes())
    digests = {file.digest}
    for place in (0, 65_000, len(data) - 65_000, len(data) - 2):
        changed = data.copy()
        changed[place] = ord("x")
        path.write_bytes(changed)
        digests.add(source_of(path).files[0].digest)
    assert len(digests) == 5


def test_rows_are_known_where_the_format_tells(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", text=["a"] * 7)
    write_text(tmp_path / "a.txt", *["some words"] * 1000)
    Dataset.from_dict({"text": ["a"] * 9}).save_to_disk(tmp_path / "set")
    for name, rows, known in (("a.parquet", 7, 7), ("a.txt", None, 1000), ("set", 9, 9)):
        source = source_of(tmp_path / name)
        assert source.files[0].n_rows == rows
        assert source.estimated_rows() == known


def test_files_whose_rows_are_known_are_skipped_without_being_opened(tmp_path: Path) -> None:
    for number in range(3):
        write_parquet(tmp_path / f"{number}.parquet", text=[f"{number}"] * 4)
    source = source_of(tmp_path)
    (tmp_path / "0.parquet").unlink()
    with source.open(next(shards_of(source.files))) as reader:
        assert reader.skip(6) == 6
        assert [text for block in reader.take(3) for text in block.texts.to_pylist()] == ["1", "1", "2"]


@pytest.mark.parametrize(
    "values", [["1", "02"], ["-1", "2147483648"], ["a%20b", "1"], ["1.5", "2"], ["7", "__HIVE_DEFAULT_PARTITION__"]]
)
def test_partitions_are_typed_as_pyarrow_types_them(values: list[str], tmp_path: Path) -> None:
    for number, value in enumerate(values):
        write_parquet(tmp_path / f"key={value}" / "lang=en" / "a.parquet", text=[f"text {number}"], key=["hidden"])
    for path in tmp_path.rglob("*.parquet"):
        pq.write_table(pq.read_table(path, partitioning=None).select(["text"]), path)
    source = source_of(tmp_path, carry=("key", "lang"))
    theirs = ds.dataset(tmp_path, partitioning="hive")
    assert source.schema.field("key").type == theirs.schema.field("key").type
    columns = theirs.to_table().select(["key", "lang"]).to_pylist()
    assert [{key: row[key] for key in ("key", "lang")} for row in rows_of(source)] == columns


def test_partitions_are_carried_and_filtered(tmp_path: Path) -> None:
    for year in (2023, 2024, 2025):
        write_parquet(tmp_path / f"year={year}" / "_x=1" / "a.parquet", text=[f"{year} a", f"{year} b"], year=[0, 0])
    source = source_of(tmp_path, carry=("*",), where="year >= 2024 AND text LIKE '%b'", id_column="text")
    assert texts_of(source) == ["2024 b", "2025 b"]
    assert rows_of(source) == [{"text": f"{year} b", "year": year, "_x": 1} for year in (2024, 2025)]
    assert texts_of(source_of(tmp_path, text_columns=("year", "text"), template="{year}: {text}"))[0] == "2023: 2023 a"
    assert len(texts_of(source_of(tmp_path / "year=*", where="year = 2024"))) == 2


def test_files_may_have_columns_in_another_order_or_more_of_them(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", id=[1], text=["a"])
    write_parquet(tmp_path / "b.parquet", extra=["x"], text=["b"], id=[2.5])
    source = source_of(tmp_path, id_column="id", carry=("extra",))
    assert rows_of(source) == [{"id": 1.0, "extra": None}, {"id": 2.5, "extra": "x"}]
    (tmp_path / "c.csv").write_text("b,text\n1,c\n")
    (tmp_path / "d.csv").write_text("text\nd\n")
    (tmp_path / "e.csv").write_text("")
    source = source_of(tmp_path / "*.csv", carry=("b",), where="b IS NULL OR b = '1'")
    assert [row["b"] for row in rows_of(source)] == ["1", None]
    (tmp_path / "f.csv").write_text("b\n1\n")
    with pytest.raises(Misconfigured, match=r"f\.csv has no column `text`.*it has b"):
        source_of(tmp_path / "*.csv")
    write_parquet(tmp_path / "c.parquet", id=[[1]], text=["c"])
    with pytest.raises(Misconfigured, match="different types"):
        source_of(tmp_path / "*.parquet")


def test_a_dataset_on_disk(tmp_path: Path) -> None:
    rows = [{"id": n, "text": f"text {n}"} for n in range(50)]
    Dataset.from_list(rows).filter(lambda row: row["id"] % 2, keep_in_memory=True).save_to_disk(
        tmp_path / "one", num_shards=3
    )
    source = source_of(tmp_path / "one", id_column="id")
    assert len(source.files) == 3
    assert [row["id"] for row in rows_of(source)] == list(range(1, 50, 2))
    assert texts_of(source)[:2] == ["text 1", "text 3"]
    both = DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:5])})
    both.save_to_disk(tmp_path / "both")
    with pytest.raises(Misconfigured, match=r"both holds several.*both/train, .*both/test"):
        source_of(tmp_path / "both")
    assert len(texts_of(source_of(tmp_path / "both" / "test"))) == 5
    with pytest.raises(Misconfigured, match=r"has no state\.json"):
        source_of(tmp_path, format="dataset")


@pytest.fixture
def memory() -> Iterator[Any]:
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/", recursive=True)


def test_files_behind_a_url(memory: Any, tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", text=["a", "b"], id=[1, 2])
    Dataset.from_dict({"text": ["s", "t"]}).save_to_disk(tmp_path / "set")
    memory.put(str(tmp_path / "a.parquet"), "/in/year=2024/a.parquet")
    memory.put(str(tmp_path / "set"), "/set", recursive=True)
    memory.pipe("/in/lines.jsonl.gz", __import__("gzip").compress(b'{"text": "x"}\n{"text": "y"}\n'))
    source = source_of("memory://in/year=2024", id_column="id")
    assert source.files[0].path == "memory:///in/year=2024/a.parquet"
    assert source.files[0].n_rows == 2
    assert rows_of(source) == [{"id": 1}, {"id": 2}]
    assert rows_of(source_of("memory://in/*/*.parquet", carry=("year",), id_column="id"))[0] == {"id": 1, "year": 2024}
    assert texts_of(source_of("memory://in/lines.jsonl.gz")) == ["x", "y"]
    assert texts_of(source_of("memory://set")) == ["s", "t"]
    digests = set()
    for tail in (b"end", b"END"):
        memory.pipe("/in/long.txt", b"word " * 100_000 + tail)
        digests.add(source_of("memory://in/long.txt").files[0].digest)
    assert len(digests) == 2
    before = source_of("memory://in/lines.jsonl.gz")
    memory.pipe("/in/lines.jsonl.gz", b"")
    with pytest.raises(Misconfigured, match=r"lines\.jsonl\.gz was changed"):
        texts_of(before)
    assert before.files != source_of("memory://in/lines.jsonl.gz").files
    with pytest.raises(Misconfigured, match="There is no memory://nowhere"):
        source_of("memory://nowhere")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def test_files_of_a_web_server_and_secrets_in_their_addresses(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "one", "two")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        source = source_of(f"{url}/a.txt?signature=secret")
        assert texts_of(source) == ["one", "two"]
        assert source.files[0].path == f"{url}/a.txt?***"
        with pytest.raises(Misconfigured, match=r"There is no .*b\.txt") as caught:
            source_of(f"{url}/b.txt?signature=secret")
        assert "secret" not in str(caught.value)
        server.shutdown()
    with pytest.raises(Unavailable, match=r"a\.txt\?\*\*\* could not be read") as trouble:
        source_of(f"{url}/a.txt?signature=secret")
    assert "secret" not in str(trouble.value)


def test_a_url_that_needs_a_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(Misconfigured, match=r"`s3://` need another package: pip install s3fs") as caught:
        source_of("s3://key:secret@bucket/a.parquet")
    assert "secret" not in str(caught.value)
    with pytest.raises(Misconfigured, match="Nothing here knows URLs that begin with `what://`"):
        source_of("what://bucket/a.parquet")


def test_a_dataset_that_is_a_selection_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "a"}], "_indices_files": [{"filename": "i"}]})
    )
    with pytest.raises(Misconfigured, match="selection of rows"):
        source_of(tmp_path)
