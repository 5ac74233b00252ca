"""The formats of input files, as their names tell them."""

from __future__ import annotations

import gzip
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import PurePosixPath
from typing import IO

from embedstream.shared.errors import Misconfigured

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

DAMAGE = (zlib.error, zstd.ZstdError)
"""What the unpackers say of an archive that is damaged inside."""


class InputFormat(StrEnum):
    """What is inside an input file."""

    PARQUET = "parquet"
    JSONL = "jsonl"
    CSV = "csv"
    TSV = "tsv"
    TEXT = "text"
    ARROW = "arrow"
    DATASET = "dataset"
    """A folder that `save_to_disk` of Hugging Face's `datasets` wrote."""


_BY_EXTENSION = {
    ".parquet": InputFormat.PARQUET,
    ".pq": InputFormat.PARQUET,
    ".jsonl": InputFormat.JSONL,
    ".ndjson": InputFormat.JSONL,
    ".csv": InputFormat.CSV,
    ".tsv": InputFormat.TSV,
    ".txt": InputFormat.TEXT,
    ".arrow": InputFormat.ARROW,
    ".feather": InputFormat.ARROW,
    ".ipc": InputFormat.ARROW,
}
_COMPRESSED = (".gz", ".zst")
_OF_LINES = (InputFormat.JSONL, InputFormat.CSV, InputFormat.TSV, InputFormat.TEXT)


def named(name: str) -> InputFormat:
    """The format that a user names.

    Raises:
        Misconfigured: there is none of that name.
    """
    try:
        return InputFormat(name)
    except ValueError:
        raise Misconfigured(f"There is no input format `{name}`; there are {', '.join(InputFormat)}.") from None


def format_of(path: str) -> InputFormat | None:
    """The format that the name of a file tells; None where it tells none."""
    name = _name(path)
    if name.suffix in _COMPRESSED:
        found = _BY_EXTENSION.get(name.with_suffix("").suffix)
        return found if found in _OF_LINES else None
    return _BY_EXTENSION.get(name.suffix)


def known_extensions() -> str:
    """For messages."""
    return ", ".join(_BY_EXTENSION) + "; those of lines also with " + " or ".join(_COMPRESSED)


def is_compressed(path: str) -> bool:
    """Whether a file of lines is packed, as its name tells."""
    return _name(path).suffix in _COMPRESSED


@contextmanager
def decompressed(file: IO[bytes], path: str) -> Iterator[IO[bytes]]:
    """The content of a file of lines; `.gz` and `.zst` are unpacked as it is read, in bounded memory. Closes the file.

    A truncated archive raises `EOFError` where it ends, a damaged one `OSError` or one of `DAMAGE`.
    """
    suffix = _name(path).suffix
    with file:
        if suffix == ".gz":
            with gzip.GzipFile(fileobj=file, mode="rb") as unpacked:
                yield unpacked  # type: ignore[misc] # it reads as one
        elif suffix == ".zst":
            with zstd.ZstdFile(file) as archive:
                yield archive  # type: ignore[misc] # it reads as one, too
        else:
            yield file


def _name(path: str) -> PurePosixPath:
    plain = path.partition("?")[0] if "://" in path else path  # an address may have a query
    return PurePosixPath(plain.lower())
