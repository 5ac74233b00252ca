"""The formats of output files: how a part is written, and how parts become one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
from numpy.typing import NDArray

from .sink import OutputSchema


class PartFile(Protocol):
    """The files of one part while they are written."""

    def write(self, carried: pa.RecordBatch, vectors: NDArray[Any]) -> None:
        """Append rows: (rows,) columns as `OutputSchema.carried`, and (rows, dimension) vectors."""
        ...

    def close(self) -> None:
        """Write what is missing, and close; nothing is durable yet. Harmless when it was called before."""
        ...


class Format(Protocol):
    """A format of files."""

    @property
    def extensions(self) -> tuple[str, ...]:
        """Of the files that a part consists of; they are put in their place in this order, so the last one tells."""
        ...

    @property
    def staged(self) -> Format:
        """The format in which parts lie that are to become one file: itself, or one that is joined faster."""
        ...

    def open(self, paths: Sequence[Path], schema: OutputSchema) -> PartFile:
        """Begin to write.

        Args:
            paths: one for each of `extensions`.
            schema: of the rows.
        """
        ...

    def join(self, parts: Sequence[Sequence[Path]], paths: Sequence[Path], schema: OutputSchema) -> None:
        """Join staged parts in their order, in memory bounded by a part; nothing is durable yet.

        Args:
            parts: the files of each part, in the format `staged`.
            paths: one for each of `extensions`.
            schema: of the rows.
        """
        ...
