"""What a backfill is cut into: input files, shards of them, and parts of shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SHARD_BYTES = 256 * 1024 * 1024
"""Small files that follow one another are read as one shard up to this size, so that a thousand of them do not make a
thousand output files; a larger file is a shard alone."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file of the input, as it was when it was looked at.

    Args:
        path: absolute path, or the URL of an object.
        size_bytes: of the file.
        version: what changes when the file does: the time of the last change, or what an object store says instead.
        digest: of both ends of its content, in hexadecimal digits.
        n_rows: where the format tells without reading all of it, else None.
    """

    path: str
    size_bytes: int
    version: str
    digest: str
    n_rows: int | None = None


@dataclass(frozen=True, slots=True)
class Shard:
    """Files that are read as one, from front to end.

    Args:
        number: of the shard, from 0.
        files: in their order.
    """

    number: int
    files: tuple[InputFile, ...]

    @property
    def n_rows(self) -> int | None:
        """Rows of all its files; None where one does not tell."""
        counts = [file.n_rows for file in self.files]
        return None if None in counts else sum(count for count in counts if count is not None)


@dataclass(frozen=True, slots=True, order=True)
class PartId:
    """One part: rows `chunk * part_rows` to `(chunk + 1) * part_rows` of a shard, those that are left out included."""

    shard: int
    chunk: int

    @property
    def name(self) -> str:
        """Its name; names sort as the rows of the input stand."""
        return f"{self.shard:05}-{self.chunk:06}"


def shards_of(files: Sequence[InputFile], most_bytes: int = SHARD_BYTES) -> Iterator[Shard]:
    """Group files that follow one another.

    Args:
        files: in the order of the input.
        most_bytes: of a shard of several files.
    """
    group: list[InputFile] = []
    number = n_bytes = 0
    for file in files:
        if group and n_bytes + file.size_bytes > most_bytes:
            yield Shard(number, tuple(group))
            group, n_bytes, number = [], 0, number + 1
        group.append(file)
        n_bytes += file.size_bytes
    if group:
        yield Shard(number, tuple(group))
