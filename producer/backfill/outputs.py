"""What OUT means: a folder of parts, one file, or a database; on this machine or behind a URL.

Looking at a name reads nothing and imports no driver.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from urllib.parse import unquote, urlsplit

from embedstream.shared.errors import Misconfigured
from embedstream.shared.urls import without_secrets

from .options import OutputOptions

FORMATS = {
    "parquet": (".parquet",),
    "arrow": (".arrow", ".feather"),
    "jsonl": (".jsonl",),
    "jsonl.gz": (".jsonl.gz",),
    "jsonl.zst": (".jsonl.zst",),
    "npy": (".npy",),
}
"""Extensions of each format of files; a part of a folder has the first."""

_POSTGRES = ("postgresql", "postgres")
_QDRANT = ("qdrant+http", "qdrant+https", "qdrant+file")
_LOCAL = ("file", "local")


class Kind(StrEnum):
    """What an output is."""

    FOLDER = "folder"
    FILE = "file"
    PGVECTOR = "pgvector"
    QDRANT = "qdrant"


@dataclass(frozen=True, slots=True)
class Output:
    """An output, as its name says.

    Args:
        kind: what it is.
        location: a path of this machine, or a URL; without a slash at its end.
        format: of the files; empty for a database.
        name: of the folder, file, table or collection: enough to tell outputs apart, and safe to be shown.
        is_local: whether it is a path of this machine.
    """

    kind: Kind
    location: str
    format: str
    name: str
    is_local: bool

    @property
    def shown(self) -> str:
        """For messages: without what may let somebody in."""
        return self.location if self.is_local else without_secrets(self.location)

    @property
    def state_folder(self) -> Path:
        """Where the backfill keeps its state unless told otherwise: beside a local output, else in the working folder.

        Its name holds neither host nor password.
        """
        return Path(f"{self.location}.backfill") if self.is_local else Path(f"{self.name}.backfill")


def output_of(options: OutputOptions) -> Output:
    """Read what OUT means.

    Raises:
        Misconfigured: it names no output that there is, or not the format asked for.
    """
    scheme, separator, _ = options.path.partition("://")
    scheme = scheme.lower() if separator else ""
    if scheme in _POSTGRES or scheme in _QDRANT:
        return _database(options, Kind.PGVECTOR if scheme in _POSTGRES else Kind.QDRANT)
    if scheme.startswith("qdrant"):
        raise Misconfigured(
            f"`{scheme}://` is no output: Qdrant is reached as {', '.join(f'{s}://' for s in _QDRANT)}."
        )
    return _files(options, unquote(urlsplit(options.path).path) if scheme in _LOCAL else options.path)


def _database(options: OutputOptions, kind: Kind) -> Output:
    if options.format is not None:
        raise Misconfigured(f"The output format `{options.format}` is one of files, and OUT is a database.")
    parts = urlsplit(options.path)
    if kind is Kind.QDRANT:
        name = unquote(parts.path.rstrip("/").rpartition("/")[2])
        if not name:
            raise Misconfigured("The URL of Qdrant names no collection: qdrant+http://host:6333/collection.")
    else:
        table = re.search(r"(?:^|&)table=([^&]+)", parts.query)
        if table is None:
            raise Misconfigured("The URL of PostgreSQL names no table: postgresql://user@host/db?table=docs.")
        name = unquote(table[1])
    return Output(kind, options.path, "", re.sub(r"[^\w.-]", "_", name), is_local=False)


def _files(options: OutputOptions, path: str) -> Output:
    is_local = "://" not in path
    location = path.rstrip("/")
    name = location.rpartition("/")[2]
    if not name or name in {".", ".."}:
        raise Misconfigured(f"OUT names no folder and no file: `{path}`.")
    if options.format is not None and options.format not in FORMATS:
        raise Misconfigured(f"`{options.format}` is no output format; there are {', '.join(FORMATS)}.")
    by_name = None if path.endswith("/") else _format_of(name)
    if by_name is not None:
        if options.format not in {None, by_name}:
            raise Misconfigured(f"OUT is `{name}`, and the output format asked for is `{options.format}`.")
        return Output(Kind.FILE, location, by_name, name, is_local)
    suffix = Path(name).suffix
    if suffix and options.format is None and not path.endswith("/"):
        known = ", ".join(extension for extensions in FORMATS.values() for extension in extensions)
        raise Misconfigured(f"`{suffix}` is no output format: a file ends in {known}, a folder of parts in `/`.")
    return Output(Kind.FOLDER, location, options.format or "parquet", name, is_local)


def _format_of(name: str) -> str | None:
    return next(
        (known for known, extensions in FORMATS.items() if name.endswith(extensions) and name not in extensions), None
    )
