"""Columns of Arrow as columns of PostgreSQL."""

from __future__ import annotations

import re
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pat

from .json_rows import dumps, json_rows

_SIMPLE = {
    pa.bool_(): "boolean",
    pa.int8(): "smallint",
    pa.int16(): "smallint",
    pa.int32(): "integer",
    pa.int64(): "bigint",
    pa.uint8(): "smallint",
    pa.uint16(): "integer",
    pa.uint32(): "bigint",
    pa.uint64(): "numeric",
    pa.float16(): "real",
    pa.float32(): "real",
    pa.float64(): "double precision",
    pa.date32(): "date",
    pa.date64(): "date",
    pa.null(): "text",
}
_ALIKE = (
    {"smallint", "integer", "bigint", "numeric"},
    {"real", "double precision"},
    {"text", "character varying"},
    {"json", "jsonb"},
)
"""Types that take each other's values, as far as these are in range."""
_NUL_IN_JSON = re.compile(rb"(?<!\\)((?:\\\\)*)\\u0000")


def sql_type(kind: pa.DataType) -> str:
    """The type of a new table's column. Lists and structs become `jsonb`, durations integers of their own unit."""
    if (simple := _SIMPLE.get(kind)) is not None:
        return simple
    if _is_text(kind):
        return "text"
    if pat.is_binary(kind) or pat.is_large_binary(kind) or pat.is_fixed_size_binary(kind) or pat.is_binary_view(kind):
        return "bytea"
    if pat.is_timestamp(kind):
        return "timestamp with time zone" if kind.tz else "timestamp without time zone"
    if pat.is_time(kind):
        return "time without time zone"
    if pat.is_duration(kind):
        return "bigint"
    if pat.is_decimal(kind):
        return f"numeric({kind.precision},{kind.scale})"
    return "jsonb"


def fits(wanted: str, found: str) -> bool:
    """Whether a column of an existing table takes values of a type; how long they may be is the database's to say."""
    wanted, found = (re.sub(r"\(.*?\)", "", name) for name in (wanted, found))
    return wanted == found or any({wanted, found} <= alike for alike in _ALIKE)


def sql_values(column: pa.Array) -> list[Any]:
    """(rows,) values as psycopg takes them.

    PostgreSQL knows no NUL in text: U+FFFD stands for it. Its times have microseconds: nanoseconds are cut off.
    """
    kind = column.type
    if _is_text(kind):
        return list(pc.replace_substring(column.cast(pa.large_string()), "\0", "\ufffd").to_pylist())
    if pat.is_timestamp(kind):
        return list(column.cast(pa.timestamp("us", kind.tz), safe=False).to_pylist())
    if pat.is_time(kind):
        return list(column.cast(pa.time64("us"), safe=False).to_pylist())
    if pat.is_duration(kind):
        return list(column.cast(pa.int64()).to_pylist())
    if sql_type(kind) == "jsonb":
        rows = json_rows(pa.record_batch([column], names=["value"]))
        return [row["value"] for row in rows]
    return list(column.to_pylist())


def print_json(value: Any) -> bytes:
    """How psycopg is to print what goes into `jsonb`."""
    return _NUL_IN_JSON.sub(rb"\1\\ufffd", dumps(value))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pat.is_string(kind) or pat.is_large_string(kind) or pat.is_string_view(kind))
