"""Files of this machine."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import pyarrow as pa

from .storage import END_BYTES


class LocalStorage:
    """Files of this machine."""

    def shown(self, key: str) -> str:
        """The path."""
        return key

    def is_file(self, key: str) -> bool:
        """Whether it is one, or a link to one."""
        return Path(key).is_file()

    def is_folder(self, key: str) -> bool:
        """Whether it is one, or a link to one."""
        return Path(key).is_dir()

    def walk(self, key: str) -> Sequence[str]:
        """All files below; links to folders are not followed."""
        return [os.path.join(folder, name) for folder, _, names in os.walk(key) for name in names]  # noqa: PTH118 # fast

    def glob(self, pattern: str) -> Sequence[str]:
        """`**` stands for any number of folders."""
        found: set[str] = set()
        for path in glob.glob(pattern, recursive=True):  # noqa: PTH207 # a pattern is no path
            found.update(self.walk(path) if self.is_folder(path) else [path])
        return list(found)

    def look(self, key: str) -> tuple[int, str]:
        """The time of the last change, in nanoseconds."""
        about = os.stat(key)  # noqa: PTH116 # ten thousand of them
        return about.st_size, str(about.st_mtime_ns)

    def ends(self, key: str, size_bytes: int) -> bytes:
        """Both ends."""
        with Path(key).open("rb", buffering=0) as file:
            head = file.read(END_BYTES)
            file.seek(max(0, size_bytes - END_BYTES))
            return head + file.read(END_BYTES)

    def open(self, key: str) -> IO[bytes]:
        """A plain file."""
        return Path(key).open("rb")

    def arrow(self, key: str, *, mapped: bool = False) -> pa.NativeFile:
        """A file, or a map of it."""
        return pa.memory_map(key) if mapped else pa.OSFile(key)
