"""Where input files lie: what is asked of a disk as of an object store."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import IO, Protocol

import pyarrow as pa

END_BYTES = 64 * 1024
"""Of each end of a file, that its digest is made of."""


class Storage(Protocol):
    """Files by their keys: absolute paths, or what fsspec calls them."""

    def shown(self, key: str) -> str:
        """The absolute path, or the URL without what may let somebody in."""
        ...

    def is_file(self, key: str) -> bool:
        """Whether there is a file of this key."""
        ...

    def is_folder(self, key: str) -> bool:
        """Whether there is a folder of this key."""
        ...

    def walk(self, key: str) -> Sequence[str]:
        """All files below a folder, in any order."""
        ...

    def glob(self, pattern: str) -> Sequence[str]:
        """All files that a pattern fits, and those in folders that it fits, in any order."""
        ...

    def look(self, key: str) -> tuple[int, str]:
        """Size in bytes, and what changes when the file does."""
        ...

    def ends(self, key: str, size_bytes: int) -> bytes:
        """The first and the last `END_BYTES` of a file; they overlap in a short one."""
        ...

    def open(self, key: str) -> IO[bytes]:
        """Read a file from front to end."""
        ...

    def arrow(self, key: str, *, mapped: bool = False) -> pa.NativeFile:
        """Read a file here and there; `mapped` asks for pages of memory instead of copies, where that can be."""
        ...


def digest(ends: bytes) -> str:
    """Of both ends of a file, in hexadecimal digits."""
    return hashlib.sha256(ends).hexdigest()
