"""The text of a row: a column, or several in a template."""

from __future__ import annotations

from string import Formatter

import pyarrow as pa
import pyarrow.compute as pc

from embedstream.shared.errors import Misconfigured

from .options import InputOptions

_DEFAULT = ("text",)


class Texts:
    """Makes texts of columns. A text is null where its columns all are; beside others a null is an empty string.

    Args:
        options: say which columns, and the template.

    Raises:
        Misconfigured: the template is none, or does not go with the columns.
    """

    def __init__(self, options: InputOptions) -> None:
        self._pieces: list[tuple[str, str | None]] = [("", name) for name in options.text_columns]
        self._in_template = options.template is not None
        if options.template is not None:
            self._pieces = _parsed(options.template)
        self.columns = tuple(dict.fromkeys(name for _, name in self._pieces if name is not None))
        if not self.columns:
            raise Misconfigured("The text comes from no column: name one, as in --text-column text.")
        if not self._in_template and len(self.columns) > 1:
            names = " ".join(f"{{{name}}}" for name in self.columns)
            raise Misconfigured(f"Several text columns need a template that joins them, such as --template '{names}'.")
        others = set(options.text_columns) - set(self.columns)
        if others and options.text_columns != _DEFAULT:
            raise Misconfigured(f"--template does not use the text column {_listed(others)}.")

    def check(self, columns: pa.Schema) -> None:
        """See whether texts can be made of columns of these types.

        Raises:
            Misconfigured: they cannot.
        """
        for name in self.columns:
            kind = columns.field(name).type
            if not (is_text(kind) or (self._in_template and _is_plain(kind))):
                raise Misconfigured(f"The column `{name}` holds {kind}; texts are made of strings.")

    def of(self, batch: pa.RecordBatch) -> pa.StringArray | pa.LargeStringArray:
        """(rows,) strings."""
        if not self._in_template:
            return batch.column(self.columns[0])
        columns = {name: _as_text(batch.column(name)) for name in self.columns}
        parts: list[pa.Array | pa.Scalar] = []
        for literal, name in self._pieces:
            parts += [pa.scalar(literal)] if literal else []
            parts += [columns[name]] if name is not None else []
        wide = any(pa.types.is_large_string(column.type) for column in columns.values())
        kind = pa.large_string() if wide else pa.string()
        parts = [part.cast(kind) for part in parts]
        joined = pc.binary_join_element_wise(*parts, pa.scalar("", kind), null_handling="skip")
        some = pc.is_valid(columns[self.columns[0]])
        for name in self.columns[1:]:
            some = pc.or_(some, pc.is_valid(columns[name]))
        return pc.if_else(some, joined, pa.scalar(None, kind))


def is_text(kind: pa.DataType) -> bool:
    """Whether values of a type are texts, or bytes or nulls that may stand for them."""
    return any(
        test(kind)
        for test in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_binary,
            pa.types.is_large_binary,
            pa.types.is_null,
        )
    )


def _is_plain(kind: pa.DataType) -> bool:
    types = pa.types
    return any(
        test(kind)
        for test in (types.is_integer, types.is_floating, types.is_boolean, types.is_decimal, types.is_temporal)
    )


def _as_text(column: pa.Array) -> pa.Array:
    return column if is_text(column.type) else column.cast(pa.string())


def _parsed(template: str) -> list[tuple[str, str | None]]:
    """Literals, each with the name of the column behind it."""
    try:
        pieces = list(Formatter().parse(template))
    except ValueError as error:
        raise Misconfigured(f"--template cannot be used: {error}.") from error
    for _, name, spec, conversion in pieces:
        if name is not None and (not name or name.isdigit() or spec or conversion or set(name) & set(".[]")):
            raise Misconfigured(
                "--template takes names of columns in braces, as in '{title}: {body}'; nothing else goes in the braces."
            )
    return [(literal, name) for literal, name, _, _ in pieces]


def _listed(names: set[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))
