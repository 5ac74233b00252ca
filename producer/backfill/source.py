"""What a backfill reads from: the interface of all input formats."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import pyarrow as pa

from .blocks import Block
from .plan import InputFile, Shard


class ShardReader(Protocol):
    """Reads one shard from front to end. It is used by one thread at a time."""

    def skip(self, n_rows: int) -> int:
        """Go past rows, as fast as the format allows.

        Returns:
            How many there were; fewer than asked for at the end of the shard.
        """
        ...

    def take(self, n_rows: int) -> Iterator[Block]:
        """Read rows. The blocks together stand for `n_rows` rows, fewer at the end of the shard.

        Rows that cannot be read are `bad` in their block; they never end the reading.
        """
        ...


class Source(Protocol):
    """An input: its files and what is taken of each row."""

    @property
    def files(self) -> tuple[InputFile, ...]:
        """In the order in which they are read."""
        ...

    @property
    def schema(self) -> pa.Schema:
        """Of `Block.carried`: the id column first, under its own name, then the other carried columns.

        Without an id column the first column is `row`, int64, the place in the file; with more than one file `file`
        stands before it.
        """
        ...

    def estimated_rows(self) -> int | None:
        """How many rows there are, about where not all files tell; None where nobody knows. It blocks."""
        ...

    def open(self, shard: Shard) -> AbstractContextManager[ShardReader]:
        """Begin to read a shard."""
        ...
