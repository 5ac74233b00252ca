"""Who works on which part: locks on single bytes of one file, which a process loses the moment it dies.

They are POSIX record locks (`fcntl(2)`). On one machine every file system has them. Several machines share a backfill
where its state folder is on a file system that carries them over, such as NFS version 4; where the locks of a mount are
local, as with the options `nolock` and `local_lock`, two machines would do the same part: that is harmless to the
output, for a part is replaced as a whole, but a waste. What is remembered of an output in a database or an object store
lies on this machine unless told otherwise: one machine at a time works on it then.

Such locks hold between processes only, and all of a process go with the first descriptor of the file that it closes.
So a process opens a folder's claims once, and nobody else may open the file.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from embedstream.shared.errors import Misconfigured

from .plan import PartId

MOST_SHARDS = 100_000
MOST_CHUNKS = 1_000_000
"""Of a shard. Names of parts sort as the rows stand up to here, and each part has a byte of its own."""

BEGINNING = 0
SIDE_FILE = 1
"""Bytes for what only one process may do at a time; those of parts come after them."""
_FIRST_PART = 16
_TAKEN = {errno.EACCES, errno.EAGAIN}

_opened: set[tuple[int, int, int]] = set()
_opening = Lock()


class Claims:
    """The claims of one backfill.

    Args:
        path: the file to lock bytes of; it stays empty.

    Raises:
        Misconfigured: this process has them open already.
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: set[PartId] = set()
        with _opening:  # the file must not be opened, and so closed, where it is already open
            if path.exists() and _key(path.stat()) in _opened:
                raise Misconfigured(f"This process already works on the backfill of {path.parent}.")
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            self._key = _key(os.fstat(self._file))
            _opened.add(self._key)

    def take(self, part: PartId) -> bool:
        """Claim a part until it is given back or this process dies. False: somebody has it, if need be this process.

        Raises:
            Misconfigured: the part is beyond what can be claimed, or the file system knows no locks.
        """
        if part in self._held or not self._lock(self._place(part), fcntl.LOCK_EX | fcntl.LOCK_NB):
            return False
        self._held.add(part)
        return True

    def give_back(self, part: PartId) -> None:
        """Give up the claim on a part; harmless where there is none."""
        if part in self._held:
            self._held.discard(part)
            self._lock(self._place(part), fcntl.LOCK_UN)

    @contextmanager
    def alone(self, place: int) -> Iterator[None]:
        """Do what only one process may do at a time; others wait.

        Args:
            place: `BEGINNING` or `SIDE_FILE`; one thread at a time asks for each.

        Raises:
            Misconfigured: the file system knows no locks.
        """
        self._lock(place, fcntl.LOCK_EX)
        try:
            yield
        finally:
            self._lock(place, fcntl.LOCK_UN)

    def close(self) -> None:
        """Give all claims back."""
        with _opening:
            if self._key in _opened:
                _opened.discard(self._key)
                os.close(self._file)

    def _lock(self, place: int, how: int) -> bool:
        try:
            fcntl.lockf(self._file, how, 1, place)
        except OSError as error:
            if error.errno in _TAKEN:
                return False
            raise Misconfigured(
                f"The file system of {self._path.parent} has no locks for several processes ({error.strerror}): "
                "name a folder on another one for the state."
            ) from error
        return True

    @staticmethod
    def _place(part: PartId) -> int:
        if part.shard >= MOST_SHARDS:
            raise Misconfigured(f"The input has more than {MOST_SHARDS} shards: embed it in several backfills.")
        if part.chunk >= MOST_CHUNKS:
            raise Misconfigured(
                f"A file of the input makes more than {MOST_CHUNKS} parts: begin anew with more rows in each."
            )
        return _FIRST_PART + part.shard * MOST_CHUNKS + part.chunk


def _key(status: os.stat_result) -> tuple[int, int, int]:
    return os.getpid(), status.st_dev, status.st_ino
