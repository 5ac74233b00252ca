"""What is taken of each row: its text, its id and the carried columns, and which rows at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embedstream.shared.errors import Misconfigured

from .blocks import BadReason, BadRow, Block
from .options import InputOptions
from .reading import Doubt, Rows
from .texts import Texts
from .utf8 import decoded
from .where import Condition

FILE = pa.field("file", pa.string(), nullable=False)
ROW = pa.field("row", pa.int64(), nullable=False)


class Selection:
    """Turns rows as they stand in files into blocks.

    Args:
        options: say what is taken.
        columns: of the input; null is the type of one that nobody can tell.
        several_files: whether rows without ids need the name of their file.

    Attributes:
        columns: what is to be read.
        schema: of `Block.carried`.
        required: columns that every file must have.

    Raises:
        Misconfigured: columns are missing, or cannot be used as they are asked for.
    """

    def __init__(self, options: InputOptions, columns: pa.Schema, *, several_files: bool) -> None:
        self._texts = Texts(options)
        self._id = options.id_column
        self._carry = _carried_names(options, self._texts.columns, columns)
        named = [] if self._id is None else [self._id]
        _check_known([*self._texts.columns, *named, *self._carry], columns)
        self._texts.check(columns)
        plain = _with_texts(columns, self._texts.columns)
        self._where = None if options.where is None else Condition(options.where, plain)
        self.required = frozenset([*self._texts.columns, *named])
        used = {*self.required, *self._carry, *(self._where.columns if self._where else ())}
        self.columns = pa.schema([field for field in plain if field.name in used])
        _check_types(self.columns)
        self._named = self._naming(several_files)
        self.schema = pa.schema([*self._named, *(self.columns.field(name) for name in self._carry)])

    def block(self, path: str, rows: Rows) -> Block:
        """Choose of rows.

        Args:
            path: of their file.
            rows: with `columns`, strings as bytes.

        Raises:
            Misconfigured: the condition cannot be evaluated.
        """
        columns, doubts = self._decoded(rows)
        kept = self._kept(path, rows, columns, doubts)
        texts = self._texts.of(columns)
        for at in np.flatnonzero(~np.asarray(texts.is_valid())).tolist():
            doubts.setdefault(at, Doubt(None, BadReason.NULL, "The text is null."))
        if self._id is not None and columns.column(self._id).null_count:
            for at in np.flatnonzero(~np.asarray(columns.column(self._id).is_valid())).tolist():
                doubts.setdefault(at, Doubt(self._id, BadReason.NULL, "The id is null."))
        doubtful = [at for at in sorted(doubts) if kept[at]]
        bad = tuple(self._bad(path, int(rows.places[at]), columns, at, doubts[at]) for at in doubtful)
        kept[doubtful] = False
        if not kept.all():
            mask = pa.array(kept)
            columns, texts = columns.filter(mask), texts.filter(mask)
        places = rows.places[kept]
        return Block(path, places, texts, self._carried(path, places, columns), rows.taken, bad)

    def _naming(self, several_files: bool) -> list[pa.Field]:
        """The columns that tell which row it is."""
        if self._id is None:
            own = [FILE, ROW] if several_files else [ROW]
            for field in own:
                if field.name in self._carry:
                    raise Misconfigured(
                        f"The column `{field.name}` cannot be carried: without an id column the output has its own of "
                        "that name. Name an id column, or carry others."
                    )
            return own
        field = self.columns.field(self._id)
        if pa.types.is_nested(field.type):
            raise Misconfigured(f"The id column `{self._id}` holds {field.type}; ids are single values.")
        return [field]

    def _decoded(self, rows: Rows) -> tuple[pa.RecordBatch, dict[int, Doubt]]:
        doubts = dict(rows.doubts)
        arrays = []
        for column, field in zip(rows.columns.columns, self.columns, strict=True):
            if column.type == field.type:
                arrays.append(column)
                continue
            array, undecodable = decoded(column, field.type)
            arrays.append(array)
            for at in undecodable:
                message = f"The column `{field.name}` is not UTF-8."
                doubts.setdefault(at, Doubt(field.name, BadReason.UNDECODABLE, message))
        return pa.RecordBatch.from_arrays(arrays, schema=self.columns), doubts

    def _kept(self, path: str, rows: Rows, columns: pa.RecordBatch, doubts: Mapping[int, Doubt]) -> NDArray[np.bool_]:
        if self._where is None or not len(rows.places):
            return np.ones(columns.num_rows, np.bool_)
        kept = self._where.holds(columns, f"one of the rows {rows.places[0]} to {rows.places[-1]} of {path}")
        for at, doubt in doubts.items():  # nobody can say whether they were to be left out
            kept[at] |= doubt.column is None or doubt.column in self._where.columns
        return kept

    def _bad(self, path: str, place: int, columns: pa.RecordBatch, at: int, doubt: Doubt) -> BadRow:
        name = None if self._id is None else columns.column(self._id)[at].as_py()
        return BadRow(path, place, doubt.reason, doubt.message, None if name is None else str(name))

    def _carried(self, path: str, places: NDArray[np.int64], columns: pa.RecordBatch) -> pa.RecordBatch:
        if self._id is not None:
            named = [columns.column(self._id)]
        else:
            own = {FILE.name: pa.repeat(path, len(places)), ROW.name: pa.array(places)}
            named = [own[field.name] for field in self._named]
        arrays = [*named, *(columns.column(name) for name in self._carry)]
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)


def _carried_names(options: InputOptions, texts: tuple[str, ...], columns: pa.Schema) -> list[str]:
    every = [name for name in columns.names if name not in texts]
    names = dict.fromkeys(name for asked in options.carry for name in (every if asked == "*" else [asked]))
    return [name for name in names if name != options.id_column]


def _with_texts(columns: pa.Schema, texts: tuple[str, ...]) -> pa.Schema:
    """Of columns whose bytes are to be texts, and of those whose type nobody can tell, strings."""
    strings = {pa.binary(): pa.string(), pa.large_binary(): pa.large_string(), pa.null(): pa.string()}
    kinds = [strings.get(field.type, field.type) if field.name in texts else field.type for field in columns]
    return pa.schema([pa.field(name, kind) for name, kind in zip(columns.names, kinds, strict=True)])


def _check_known(asked: Iterable[str], columns: pa.Schema) -> None:
    for name in asked:
        if columns.get_field_index(name) < 0:
            raise Misconfigured(f"The input has no column `{name}`, or several; there are {', '.join(columns.names)}.")


def _check_types(columns: pa.Schema) -> None:
    for field in columns:
        if pa.types.is_null(field.type):
            raise Misconfigured(f"The column `{field.name}` holds values of several types: it cannot be used.")
