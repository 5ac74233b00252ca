"""Drafts: files under temporary names, made durable and put in their place whole.

A draft is named after the process that writes it, so that what a killed one left can be told from what is under way.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embedstream.shared.processes import Identity, own_identity

_NAME = re.compile(r"\.([0-9a-f]{8})-(\d+)-(\d+)\.draft$")


def draft_of(folder: Path, name: str) -> Path:
    """Where this process writes a draft of `name`; no other process uses it."""
    me = own_identity()
    return folder / f".{name}.{_host()}-{me.pid}-{me.started}.draft"


def sweep(folder: Path) -> None:
    """Remove the drafts of processes of this machine that have ended; those of other machines cannot be judged."""
    for path in folder.iterdir():
        found = _NAME.search(path.name)
        if found and found[1] == _host() and not Identity(int(found[2]), int(found[3])).is_alive:
            path.unlink(missing_ok=True)


def put_durably(draft: Path, target: Path) -> None:
    """Give a finished draft its name, on the same file system: after a crash the target is there whole, or not at all.

    What had that name is replaced.
    """
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    draft.replace(target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time, and one thread of it, go on; the lock ends with its process."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _host() -> str:
    """This machine, for names: two that share a file system know nothing of each other's processes."""
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"
