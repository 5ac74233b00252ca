"""The condition of `--where`: SQL over the columns of a row."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embedstream.shared.errors import Misconfigured

_SETTINGS = (
    "SET enable_external_access = false",
    "SET autoload_known_extensions = false",
    "SET autoinstall_known_extensions = false",
    "SET threads = 1",
    "SET lock_configuration = true",
)
_ROWS = "input"


class Condition:
    """A condition that DuckDB evaluates, which may neither read files nor load anything.

    Args:
        sql: an expression such as `lang = 'en' AND length(text) > 20`.
        columns: of the input.

    Raises:
        Misconfigured: it is no condition over these columns.
    """

    def __init__(self, sql: str, columns: pa.Schema) -> None:
        self._sql = sql
        self._lock = threading.Lock()
        self._db = duckdb.connect(":memory:")
        for setting in _SETTINGS:
            self._db.execute(setting)
        self._row = "row"
        while self._row in {name.lower() for name in columns.names}:
            self._row += "_"
        self.columns = self._used(columns)
        none = pa.RecordBatch.from_pylist([], schema=pa.schema([f for f in columns if f.name in self.columns]))
        try:
            self._places(none)
            kind = self._type(none)
        except (duckdb.Error, pa.ArrowException) as error:
            known = ", ".join(columns.names)
            reason, *_ = str(error).splitlines()  # what follows points into a query that is ours
            raise Misconfigured(f"--where cannot be used: {reason} The columns are {known}.") from error
        if kind not in ("BOOLEAN", '"NULL"'):
            raise Misconfigured(f"--where is a value of type {kind}, and no condition: compare it with something.")

    def holds(self, batch: pa.RecordBatch, rows: str) -> NDArray[np.bool_]:
        """(rows,) of which rows it is true; it is not where it is null.

        Args:
            batch: (rows,) with at least `columns`.
            rows: which they are, for messages.

        Raises:
            Misconfigured: it cannot be evaluated for a value.
        """
        held = np.zeros(batch.num_rows, np.bool_)
        try:
            with self._lock:
                held[self._places(batch)] = True
        except duckdb.Error as error:  # its message may quote the value
            kind = type(error).__name__
            raise Misconfigured(
                f"--where cannot be evaluated ({kind}) for {rows}. TRY_CAST gives null where CAST ends everything."
            ) from error
        return held

    def _places(self, batch: pa.RecordBatch) -> NDArray[np.int64]:
        with self._table_of(batch):
            found = self._db.execute(f"SELECT {self._row} FROM {_ROWS} WHERE (\n{self._sql}\n)").fetchnumpy()  # noqa: S608 # the user's own words
        return np.asarray(found[self._row], np.int64)

    def _type(self, batch: pa.RecordBatch) -> str:
        with self._table_of(batch):
            return str(self._db.execute(f"DESCRIBE SELECT (\n{self._sql}\n) FROM {_ROWS}").fetchall()[0][1])  # noqa: S608

    @contextmanager
    def _table_of(self, batch: pa.RecordBatch) -> Iterator[None]:
        names = [name for name in batch.schema.names if name in self.columns]
        arrays = [pa.array(np.arange(batch.num_rows)), *(batch.column(name) for name in names)]
        self._db.register(_ROWS, pa.RecordBatch.from_arrays(arrays, [self._row, *names]))
        try:
            yield
        finally:
            self._db.unregister(_ROWS)

    def _used(self, columns: pa.Schema) -> frozenset[str]:
        """The columns that it names; all of them where that cannot be told."""
        query = f"SELECT (\n{self._sql}\n) FROM {_ROWS}"  # noqa: S608
        ((tree,),) = self._db.execute("SELECT json_serialize_sql($1)", [query]).fetchall()
        parsed: dict[str, Any] = json.loads(tree)
        if parsed.get("error"):
            raise Misconfigured(f"--where cannot be used: {parsed.get('error_message', 'it is no condition')}.")
        nodes = list(_nodes(parsed))
        kinds = {node.get("class") for node in nodes}
        if len(parsed["statements"]) != 1 or "SUBQUERY" in kinds:
            raise Misconfigured("--where is one condition over one row: it may not ask for others with SELECT.")
        if "STAR" in kinds:
            return frozenset(columns.names)
        used = {str(name).lower() for node in nodes for name in node.get("column_names") or ()}
        return frozenset(name for name in columns.names if name.lower() in used)


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield tree
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree:
            yield from _nodes(branch)
