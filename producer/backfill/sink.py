"""What a backfill writes to: the interface of all output formats and of the databases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
from numpy.typing import NDArray

from .plan import PartId


@dataclass(frozen=True, slots=True)
class OutputSchema:
    """What every row of the output looks like.

    Args:
        carried: the columns beside the vector, the id column (or `file` and `row`) first.
        vector_column: name of the vector's column.
        dimension: components of a vector.
        dtype: numpy's name of its number format, `float32` or `float16`.
        metadata: what made the vectors, for the metadata of the files: model, revision, recipe, dtype, prompt, version.
        id_column: the column that tells rows apart; None where there is none. Databases need one.
    """

    carried: pa.Schema
    vector_column: str
    dimension: int
    dtype: str
    metadata: Mapping[str, str]
    id_column: str | None = None

    @property
    def row_bytes(self) -> int:
        """Of a vector."""
        return self.dimension * (2 if self.dtype == "float16" else 4)

    @property
    def arrow(self) -> pa.Schema:
        """As Arrow writes it: the vector is a FixedSizeList and the last column.

        What the input's files say of themselves, such as the index of pandas, would not be true of the output.
        """
        values = pa.float16() if self.dtype == "float16" else pa.float32()
        vector = pa.field(self.vector_column, pa.list_(values, self.dimension), nullable=False)
        kept = {key.encode(): value.encode() for key, value in self.metadata.items()}
        return pa.schema([*self.carried, vector], kept)

    def batch(self, carried: pa.RecordBatch, vectors: NDArray[Any]) -> pa.RecordBatch:
        """(rows,) carried columns and (rows, dimension) vectors as one batch, without a copy of the vectors."""
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), type=self.arrow.types[-1])
        return pa.RecordBatch.from_arrays([*carried.columns, column], schema=self.arrow)


class PartWriter(Protocol):
    """Writes one part. Nothing of it is seen before `commit`. Its calls come one after the other, from any thread."""

    def write(self, carried: pa.RecordBatch, vectors: NDArray[Any]) -> None:
        """Append rows: (rows,) columns as `OutputSchema.carried`, and (rows, dimension) vectors."""
        ...

    def commit(self) -> None:
        """Make the part durable and visible, all of it in one act; a part of that name from earlier is replaced."""
        ...

    def abort(self) -> None:
        """Leave nothing of it behind; harmless after `commit`."""
        ...


class Sink(Protocol):
    """An output."""

    def begin(self, part: PartId) -> PartWriter:
        """Begin a part; one that was begun or even committed earlier may be written again."""
        ...

    def finish(self, parts: Sequence[PartId]) -> None:
        """Every part is committed: join them where the output is one file, and make it durable.

        It may be called again, and by several processes at once: the outcome is the same.

        Args:
            parts: those that have rows, in the order of the input.
        """
        ...

    def close(self) -> None:
        """Let go of connections and temporary files."""
        ...
