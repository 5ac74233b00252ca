"""What is taken of each row."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedstream.producer.backfill.blocks import BadReason, Block
from embedstream.producer.backfill.options import InputOptions
from embedstream.producer.backfill.plan import shards_of
from embedstream.producer.backfill.sources import FileSource, open_source
from embedstream.shared.errors import Misconfigured

COLUMNS: dict[str, list[Any]] = {
    "id": [10, 11, 12, 13],
    "text": ["a", "b", "c", "d"],
    "title": ["A", None, None, "{D}"],
    "body": ["x", "y", None, ""],
    "year": [2024, None, None, 2025],
    "price": [Decimal("1.50"), None, None, Decimal("2.00")],
    "tags": [["t"], [], None, ["u", "v"]],
    "row": [1, 2, 3, 4],
    "Lang": ["en", "de", "en", None],
}


@pytest.fixture
def path(tmp_path: Path) -> str:
    pq.write_table(pa.table(COLUMNS), tmp_path / "a.parquet")
    return str(tmp_path / "a.parquet")


def read(source: FileSource) -> Block:
    (shard,) = shards_of(source.files)
    with source.open(shard) as reader:
        (block,) = reader.take(1000)
    return block


def source_of(path: str, **options: Any) -> FileSource:
    return open_source(InputOptions(path, **options))


def test_a_template_joins_columns_and_takes_nulls_for_nothing(path: str) -> None:
    options = {"text_columns": ("title", "body"), "template": "{{{title}}}: {body}! {body}", "id_column": "id"}
    block = read(source_of(path, **options))
    assert block.texts.to_pylist() == ["{A}: x! x", "{}: y! y", "{{D}}: ! "]
    assert [(row.row, row.reason, row.id) for row in block.bad] == [(2, BadReason.NULL, "12")]


def test_a_template_prints_numbers_and_names_its_columns_itself(path: str) -> None:
    block = read(source_of(path, template="{year} {price} {title}"))
    assert block.texts.to_pylist() == ["2024 1.50 A", "2025 2.00 {D}"]
    assert [row.row for row in block.bad] == [1, 2]
    assert read(source_of(path, template="about {title}")).texts.to_pylist() == ["about A", "about {D}"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "{nothing}"}, "no column `nothing`.*there are id, text, title"),
        ({"template": "{0}"}, "names of columns in braces"),
        ({"template": "{}"}, "names of columns in braces"),
        ({"template": "{title.__class__}"}, "names of columns in braces"),
        ({"template": "{title[0]}"}, "names of columns in braces"),
        ({"template": "{title!r}"}, "names of columns in braces"),
        ({"template": "{title:>10}"}, "names of columns in braces"),
        ({"template": "{title"}, "--template cannot be used"),
        ({"template": "no column"}, "comes from no column"),
        ({"template": "{tags}"}, "`tags` holds list"),
        ({"template": "{title}", "text_columns": ("title", "body")}, "does not use the text column `body`"),
        ({"text_columns": ("title", "body")}, "need a template.*{title} {body}"),
        ({"text_columns": ()}, "comes from no column"),
        ({"text_columns": ("year",)}, "`year` holds int64; texts are made of strings"),
        ({"text_columns": ("nothing",)}, "no column `nothing`"),
        ({"id_column": "nothing"}, "no column `nothing`"),
        ({"id_column": "tags"}, "id column `tags` holds list"),
        ({"carry": ("title", "nothing")}, "no column `nothing`"),
        ({"carry": ("*",)}, "`row` cannot be carried"),
        ({"where": "nothing = 1"}, r"^--where cannot be used: .*nothing.*\S The columns are id, text"),
        ({"where": "year ="}, "--where cannot be used"),
        ({"where": "year = 1; DROP TABLE x"}, "--where"),
        ({"where": "year > (SELECT avg(year) FROM input)"}, "one condition over one row"),
        ({"where": "avg(year) > 1"}, "--where cannot be used.*aggregate"),
        ({"where": "tags"}, r"type VARCHAR\[\], and no condition"),
        ({"where": "text IN (SELECT column0 FROM read_csv('/etc/passwd'))"}, "one condition over one row"),
        ({"where": "length(getenv('HOME')) > 0"}, "--where cannot be used"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_read(path: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(Misconfigured, match=message):
        source_of(path, **options)


def test_columns_are_carried_once_and_in_the_order_asked_for(path: str) -> None:
    source = source_of(path, id_column="id", carry=("year", "text", "year", "id", "tags"))
    assert source.schema.names == ["id", "year", "text", "tags"]
    assert read(source).carried.to_pylist()[3] == {"id": 13, "year": 2025, "text": "d", "tags": ["u", "v"]}
    source = source_of(path, id_column="text", carry=("*",))
    assert source.schema.names == ["text", *(name for name in COLUMNS if name != "text")]
    assert source_of(path, id_column="row").schema.names == ["row"]


def test_only_columns_that_are_needed_are_read(path: str) -> None:
    source = source_of(path, where="lower(TITLE) = 'a' AND \"year\" > 2000 AND list_contains([1], row)")
    with source.open(next(shards_of(source.files))) as reader:
        reader.skip(1)
        assert reader._opened()._columns.names == ["text", "title", "year", "row"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("year = 2024", [0]),
        ("year <> 2024", [3]),
        ("year IS NULL -- no year", [1, 2]),
        ("NULL", []),
        ("lang = 'en'", [0, 2]),
        ("true", [0, 1, 2, 3]),
        ("id % 2 = 1", [1, 3]),
        ("len(tags) > 1 OR tags[1] = 't'", [0, 3]),
        ("title LIKE '%D%' OR text = 'b'", [1, 3]),
        ("COLUMNS(['id', 'row']) > 2", [2, 3]),
        ("len(list_filter(tags, lambda year: year = 'v')) = 1", [3]),
    ],
)
def test_conditions(path: str, where: str, kept: list[int]) -> None:
    block = read(source_of(path, where=where))
    assert block.rows.tolist() == kept
    assert block.texts.to_pylist() == [COLUMNS["text"][row] for row in kept]
    assert block.taken == 4
    assert block.bad == ()


def test_a_condition_that_fails_for_a_value_does_not_tell_the_value(path: str) -> None:
    source = source_of(path, where="CAST(text AS INT) > 1")
    with pytest.raises(Misconfigured, match=r"ConversionException.* rows 0 to 3 of .*a\.parquet\. TRY_CAST") as caught:
        read(source)
    assert "'a'" not in str(caught.value)


def test_times_and_everything_else_that_parquet_holds_can_be_filtered(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": ["a", "b"],
            "seen": pa.array([0, 10**15], pa.timestamp("us", "UTC")),
            "day": pa.array([0, 20_000], pa.date32()),
            "what": pa.array([{"a": 1}, {"a": 2}]),
            "kind": pa.array(["x", "y"]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    for where in ("seen > TIMESTAMP '1999-01-01'", "day > '1999-01-01'", "what.a = 2", "kind = 'y'"):
        assert read(source_of(str(tmp_path / "a.parquet"), where=where)).rows.tolist() == [1], where
