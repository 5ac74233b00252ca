"""Rows as JSON, the same for files and for databases.

Numbers, strings, booleans, nulls, lists and structs are JSON's own. Times and dates are strings as Arrow prints them
(`2026-11-26 20:12:00.000000Z`), and so are decimals (`12.30`): nothing is rounded. Durations are integers in their own
unit, bytes are base64, maps are lists of pairs, and a float that is not a number is null.
"""

from __future__ import annotations

from base64 import b64encode
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.types as pat


def json_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """(rows,) objects that `dumps` can print."""
    types = [_printable(field.type) for field in batch.schema]
    columns = [column.cast(kind).to_pylist() for column, kind in zip(batch.columns, types, strict=True)]
    names = batch.schema.names
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def dumps(row: Any) -> bytes:
    """Print an object; arrays of numpy in the shortest form that reads back as the same numbers."""
    return orjson.dumps(row, default=_bytes, option=orjson.OPT_SERIALIZE_NUMPY)


def _bytes(value: Any) -> str:
    if isinstance(value, bytes):
        return b64encode(value).decode()
    return str(value)


def _printable(kind: pa.DataType) -> pa.DataType:
    """The type to which a column is cast before it becomes Python's objects."""
    if pat.is_duration(kind):
        return pa.int64()
    if pat.is_temporal(kind):
        return pa.string()
    if pat.is_struct(kind):
        return pa.struct([field.with_type(_printable(field.type)) for field in kind])
    if pat.is_fixed_size_list(kind):
        return pa.list_(_printable(kind.value_type), kind.list_size)
    if pat.is_list(kind) or pat.is_large_list(kind):
        return pa.large_list(_printable(kind.value_type))
    return kind
