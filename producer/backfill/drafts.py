"""Drafts: files under temporary names, made durable and put in their place whole.

A draft is named after the process that writes it, so that what a killed one left can be told from what is under way.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embedstream.shared.errors import Misconfigured, Unavailable
from embedstream.shared.processes import Identity, own_identity

_NAME = re.compile(r"\..+\.([^.]+)-(\d+)-(\d+)\.tmp")
_FOREIGN_FOR_S = 7 * 24 * 3600.0
"""How long the drafts of other machines are kept: whether their process lives cannot be told from here."""
_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}


def host_name() -> str:
    """This machine, for names: two that share a file system know nothing of each other's processes."""
    return re.sub(r"[^A-Za-z0-9_]", "_", socket.gethostname())


def draft_of(path: Path) -> Path:
    """Where this process writes a draft of a file, in the same folder; no other process uses it."""
    me = own_identity()
    return path.with_name(f".{path.name}.{host_name()}-{me.pid}-{me.started}.tmp")


def sweep(folder: Path, name: str = "") -> None:
    """Remove the drafts of processes of this machine that have ended, and old ones of other machines.

    Args:
        folder: where they lie.
        name: of the file whose drafts they are; "" for all: the folder belongs to a backfill alone.
    """
    for path in folder.iterdir():
        if path.name.startswith(f".{name}") and (found := _NAME.fullmatch(path.name)) and _is_left(path, found):
            path.unlink(missing_ok=True)


def publish(draft: Path, path: Path) -> None:
    """Give a finished draft its name, on the same file system: after a crash it is there whole, or not at all.

    What had that name is replaced.
    """
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    draft.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole and durable, or not at all."""
    draft = draft_of(path)
    try:
        draft.write_bytes(data)
        publish(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def storage(where: Path | str) -> Iterator[None]:
    """Turn what a disk refuses into errors of one line that name the place.

    Raises:
        Misconfigured: the place may not be written.
        Unavailable: it is full, or has trouble.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            raise Unavailable(f"No space is left for {where} ({reason}): make room, then run it again.") from error
        if error.errno in _REFUSED:
            raise Misconfigured(f"For {where}: it cannot be written ({reason}).") from error
        raise Unavailable(f"For {where}: {reason}.") from error


def _is_left(path: Path, found: re.Match[str]) -> bool:
    if found[1] == host_name():
        return not Identity(int(found[2]), int(found[3])).is_alive
    try:
        return time.time() - path.stat().st_mtime > _FOREIGN_FOR_S
    except FileNotFoundError:
        return False
