"""How input files become shards, and what parts are called."""

from __future__ import annotations

from embedstream.producer.backfill.plan import InputFile, PartId, shards_of


def file(name: str, size: int, rows: int | None = 1) -> InputFile:
    return InputFile(name, size, "1", "00", rows)


def test_small_neighbours_share_a_shard_and_large_files_are_alone() -> None:
    files = [file("a", 3), file("b", 4), file("c", 100), file("d", 3), file("e", 8)]
    shards = list(shards_of(files, most_bytes=10))
    assert [[each.path for each in shard.files] for shard in shards] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert [shard.number for shard in shards] == [0, 1, 2, 3]


def test_a_shard_knows_its_rows_when_all_files_do() -> None:
    (known,) = shards_of([file("a", 1, 2), file("b", 1, 0)])
    (unknown,) = shards_of([file("a", 1, 2), file("b", 1, None)])
    assert (known.n_rows, unknown.n_rows) == (2, None)


def test_no_files_are_no_shards() -> None:
    assert list(shards_of([])) == []


def test_names_sort_as_parts_do() -> None:
    parts = [PartId(0, 9), PartId(0, 10), PartId(1, 0), PartId(10, 3)]
    assert sorted(parts) == parts
    assert sorted(part.name for part in parts) == [part.name for part in parts]
