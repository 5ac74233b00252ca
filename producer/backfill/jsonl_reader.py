"""JSON lines: one object a line. Blank lines count, but are no rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from types import NoneType
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import NDArray

from .blocks import BadReason
from .line_reader import LineReader
from .lines import Lines, too_long
from .listing import Place
from .reading import Doubt, Rows, conformed
from .trouble import explained

SAMPLE_ROWS = 1000
"""From which the types of columns are told."""
_LARGE = 2.0**63
_TOO_LARGE = 2**64 + 1
"""Stands for whole numbers that no type of Arrow holds."""
_MISFITS = (pa.ArrowException, TypeError, ValueError, OverflowError)
_PLAIN: Mapping[pa.DataType, set[type]] = {
    pa.bool_(): {bool},
    pa.int64(): {int},
    pa.uint64(): {int},
    pa.float64(): {float, int},
    pa.string(): {str},
}
"""What stands for values of a type in JSON."""


class JsonlFormat:
    """JSON lines."""

    def look(self, place: Place) -> tuple[None, int | None]:
        """The types are told by the first rows of all files: see `sample`."""
        return None, None

    def open(self, place: Place, columns: pa.Schema) -> LineReader:
        """Begin to read; each line is parsed by itself."""
        return LineReader(place, columns, _rows)

    def sample(self, places: Sequence[Place]) -> pa.Schema:
        """The columns of the first rows; one without any value is of strings, one of several types has none."""
        values: dict[str, list[Any]] = {}
        for row in _first_objects(places):
            for name, value in row.items():
                values.setdefault(name, []).append(value)
        return pa.schema([pa.field(name, _type(some)) for name, some in values.items()])


def _rows(lines: Sequence[bytes | None], places: NDArray[np.int64], columns: pa.Schema) -> Rows:
    objects: list[dict[str, Any]] = []
    kept, doubts = [], {}
    for place, line in zip(places.tolist(), lines, strict=True):
        value = _parsed(line)
        if value is None:
            continue
        if isinstance(value, Doubt):
            doubts[len(objects)] = value
            value = {}
        objects.append(value)
        kept.append(place)
    arrays = [_column(field, objects, doubts) for field in columns]
    batch = pa.RecordBatch.from_arrays(arrays, schema=columns)
    return Rows(len(lines), np.array(kept, np.int64), conformed(batch, columns), doubts)


def _parsed(line: bytes | None) -> dict[str, Any] | Doubt | None:
    """An object, what is wrong, or None for a blank line."""
    if line is None:
        return Doubt(None, BadReason.INVALID, too_long())
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return Doubt(None, BadReason.UNDECODABLE, f"The line is no JSON: {error}") if line.strip() else None
    if isinstance(value, dict):
        for name, some in value.items():
            if type(some) is float and abs(some) >= _LARGE and _is_whole(line, name):
                value[name] = _TOO_LARGE
        return value
    return Doubt(None, BadReason.INVALID, f"The line is no JSON object but {_name(value)}.")


def _is_whole(line: bytes, name: str) -> bool:
    """Whether a large number is written as a whole one: orjson rounds those beyond 64 bits, which makes ids equal."""
    return type(json.loads(line, parse_int=lambda _: _TOO_LARGE)[name]) is int


def _column(field: pa.Field, objects: Sequence[dict[str, Any]], doubts: dict[int, Doubt]) -> pa.Array:
    values = [row.get(field.name) for row in objects]
    types = set(map(type, values)) - {NoneType}
    if types <= _PLAIN.get(field.type, set()):  # those of nested ones are looked at one by one
        try:
            return pa.array(values, field.type)
        except _MISFITS:  # a number that is too large
            pass
    for at, value in enumerate(values):
        if not _fits(value, field.type):
            message = f"The column `{field.name}` holds {_name(value)}, where others hold {field.type}."
            doubts.setdefault(at, Doubt(field.name, BadReason.INVALID, message))
            values[at] = None
    return pa.array(values, field.type)


def _fits(value: object, kind: pa.DataType) -> bool:
    """Whether a value of JSON is of a type, as it is: Arrow would cut 2.5 down to a whole number."""
    if value is None:
        return True
    if pa.types.is_list(kind):
        return isinstance(value, list) and all(_fits(item, kind.value_type) for item in value)
    if pa.types.is_struct(kind):
        return isinstance(value, dict) and all(_fits(value.get(field.name), field.type) for field in kind)
    if type(value) not in _PLAIN.get(kind, set()):
        return False
    try:
        pa.scalar(value, kind)
    except _MISFITS:
        return False
    return True


def _first_objects(places: Sequence[Place]) -> Iterator[dict[str, Any]]:
    left = SAMPLE_ROWS
    for place in places:
        with explained(place.path), closing(Lines(place)) as lines:
            while left and (some := lines.read(left)):
                left -= len(some)
                yield from (row for row in map(_parsed, some) if isinstance(row, dict))


def _type(values: Sequence[Any]) -> pa.DataType:
    if all(value is None for value in values):
        return pa.string()
    if all(value is None or (type(value) is int and 0 <= value < 2**64) for value in values):
        return pa.int64() if all(value is None or value < 2**63 for value in values) else pa.uint64()
    try:
        return _settled(pa.array(values).type)
    except _MISFITS:
        return pa.null()


def _settled(kind: pa.DataType) -> pa.DataType:
    """A type in which what has no value yet is a string."""
    if pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_settled(kind.value_type))
    if pa.types.is_struct(kind) and kind.num_fields:
        return pa.struct([pa.field(field.name, _settled(field.type)) for field in kind])
    return pa.null() if pa.types.is_struct(kind) else kind


_NAMES = {bool: "a truth value", int: "a whole number", float: "a number", str: "a string", list: "a list"}


def _name(value: object) -> str:
    return "null" if value is None else _NAMES.get(type(value), "an object")
