"""Arrow IPC files: memory-mapped, with random access to their batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from numpy.typing import NDArray

from .sink import OutputSchema


class ArrowFormat:
    """Arrow IPC files, uncompressed: vectors do not shrink, and what is not compressed can be mapped."""

    extensions = (".arrow",)

    @property
    def staged(self) -> ArrowFormat:
        """Itself."""
        return self

    def open(self, paths: Sequence[Path], schema: OutputSchema) -> ArrowPart:
        """Begin to write."""
        return ArrowPart(paths[0], schema)

    def join(self, parts: Sequence[Sequence[Path]], paths: Sequence[Path], schema: OutputSchema) -> None:
        """Copy batch by batch."""
        with pa.ipc.new_file(str(paths[0]), schema.arrow) as writer:
            for (part,) in parts:
                for batch in arrow_batches(part):
                    writer.write_batch(batch)


class ArrowPart:
    """One file while it is written."""

    def __init__(self, path: Path, schema: OutputSchema) -> None:
        self._schema = schema
        self._writer = pa.ipc.new_file(str(path), schema.arrow)

    def write(self, carried: pa.RecordBatch, vectors: NDArray[Any]) -> None:
        """Append rows."""
        self._writer.write_batch(self._schema.batch(carried, vectors))

    def close(self) -> None:
        """Write the footer."""
        self._writer.close()


def arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The batches of a file, each mapped when it is asked for."""
    with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)
