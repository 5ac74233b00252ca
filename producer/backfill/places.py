"""Where finished files are put: a folder of this machine, or one of an object store."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import fsspec

from embedstream.shared.errors import Misconfigured
from embedstream.shared.urls import without_secrets

from .drafts import draft_of, publish, storage, sweep
from .retries import patiently
from .trouble import RemoteTroubleError

T = TypeVar("T")


class Place(Protocol):
    """A folder, wherever it is."""

    def put(self, draft: Path, name: str) -> None:
        """Bring a finished draft of this machine there, durably; it appears whole, and replaces what has that name."""
        ...

    def names(self) -> Sequence[str]:
        """What is there, sorted; nothing while the folder is not there."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file; harmless when it is gone."""
        ...


class LocalPlace:
    """A folder of this machine.

    Args:
        folder: made if missing.
        near: where a file may stand that comes from another file system and is not whole yet. Readers of a folder of
            Parquet parts, such as polars, refuse it for any file of another kind, hidden ones too: there it is the
            folder around it.

    Raises:
        Misconfigured: the folder cannot be made.
    """

    def __init__(self, folder: Path, near: Path) -> None:
        with storage(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._folder = folder
            self._near = near if _device(near) == _device(folder) else folder
            sweep(self._near)

    def put(self, draft: Path, name: str) -> None:
        """Rename it there, or copy it first where that is another file system."""
        if _device(draft) == _device(self._folder):
            publish(draft, self._folder / name)
            return
        there = draft_of(self._near / name)
        try:
            shutil.copyfile(draft, there)
            publish(there, self._folder / name)
        finally:
            there.unlink(missing_ok=True)
        draft.unlink()

    def names(self) -> Sequence[str]:
        """What is there."""
        return sorted(path.name for path in self._folder.iterdir())

    def remove(self, name: str) -> None:
        """Remove a file."""
        (self._folder / name).unlink(missing_ok=True)


class ObjectPlace:
    """A folder of a store that fsspec knows.

    An object store shows an object when all of it has come. Of stores that do not, such as sftp, a reader may see half
    a file while it is put; it is put again when that was interrupted.

    Args:
        url: of the folder.

    Raises:
        Misconfigured: fsspec does not know the store, or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        self._shown = without_secrets(url)
        try:
            self._store, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise Misconfigured(f"{self._shown} cannot be opened: {without_secrets(str(error))}") from None

    def put(self, draft: Path, name: str) -> None:
        """Put it whole.

        Raises:
            Unavailable: the store has trouble that does not pass.
        """
        self._patiently(partial(self._put, draft, f"{self._root}/{name}"))
        draft.unlink()

    def names(self) -> Sequence[str]:
        """What is there."""
        names = (entry.rstrip("/") for entry in self._patiently(self._entries))
        return sorted(name.rpartition("/")[2] for name in names if name != self._root.rstrip("/"))

    def remove(self, name: str) -> None:
        """Remove an object."""
        try:
            self._patiently(partial(self._store.rm_file, f"{self._root}/{name}"))
        except FileNotFoundError:
            return

    def _put(self, draft: Path, target: str) -> None:
        self._store.put_file(str(draft), target)
        self._store.invalidate_cache()
        size, stored = draft.stat().st_size, self._store.size(target)
        if stored != size:
            raise RemoteTroubleError(f"{draft.name} has {size} bytes, of which {stored} came where it was put")

    def _entries(self) -> list[str]:
        self._store.invalidate_cache()
        try:
            return [str(entry) for entry in self._store.ls(self._root, detail=False)]
        except FileNotFoundError:
            return []

    def _patiently(self, action: Callable[[], T]) -> T:
        def act() -> T:
            try:
                return action()
            except PermissionError:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None
            except FileNotFoundError:
                raise
            except Exception as error:  # noqa: BLE001 - each store has errors of its own, and they hold whole URLs
                raise RemoteTroubleError(without_secrets(str(error))) from None

        return patiently(act, (RemoteTroubleError,), self._shown, str)


def _device(path: Path) -> int:
    return path.stat().st_dev
