"""Where input files lie: on this machine, or behind a URL that fsspec knows."""

from __future__ import annotations

import glob
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

import fsspec
import pyarrow as pa
from fsspec.core import url_to_fs
from fsspec.registry import known_implementations

from embedstream.shared.errors import Misconfigured, Unavailable
from embedstream.shared.urls import without_secrets

from .input_formats import DAMAGE

END_BYTES = 64 * 1024
"""Of each end of a file, that its digest is made of."""
_REMOTE_BLOCK_BYTES = 1024 * 1024
_VERSION_KEYS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created", "version_id")
"""Under which names storages tell what changes with a file; the first one found is taken."""

T = TypeVar("T")


class RemoteTroubleError(OSError):
    """A storage behind a URL did not answer as it should; another try may go well."""


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


class RemoteStorage:
    """What fsspec finds behind a URL.

    Args:
        url: of a file, a folder or a pattern.

    Raises:
        Misconfigured: nothing that is installed knows such URLs.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        protocol = fsspec.utils.get_protocol(url)
        try:
            self._files, self.key = url_to_fs(url)
        except ImportError as error:
            hint = str(known_implementations.get(protocol, {}).get("err", ""))
            package = getattr(error.__cause__ or error, "name", None) or ""
            install = f"pip install {package}" if package else hint or "install the package of fsspec for it"
            raise Misconfigured(f"URLs that begin with `{protocol}://` need another package: {install}") from error
        except ValueError as error:
            raise Misconfigured(f"Nothing here knows URLs that begin with `{protocol}://`.") from error
        self._files.invalidate_cache()  # what another backfill of this process saw may have changed

    def shown(self, key: str) -> str:
        """Its URL, without what may let somebody in."""
        return without_secrets(str(self._files.unstrip_protocol(key)))

    def is_file(self, key: str) -> bool:
        """Whether the storage knows it as one."""
        return self._kind(key) == "file"

    def is_folder(self, key: str) -> bool:
        """Whether the storage has files below it."""
        return self._kind(key) == "directory"

    def _kind(self, key: str) -> str | None:
        # `isfile` and `isdir` of fsspec take a server that does not answer for one without such a file.
        try:
            return str(_remote(self._files.info, key)["type"])
        except FileNotFoundError:
            return None

    def walk(self, key: str) -> Sequence[str]:
        """All objects below."""
        return [str(path) for path in _remote(self._files.find, key)]

    def glob(self, pattern: str) -> Sequence[str]:
        """As fsspec understands patterns."""
        found: set[str] = set()
        for path, about in _remote(self._files.glob, pattern, detail=True).items():
            found.update(self.walk(path) if about.get("type") == "directory" else [str(path)])
        return list(found)

    def look(self, key: str) -> tuple[int, str]:
        """The entity tag, or a time.

        Raises:
            Misconfigured: the storage does not tell the size.
        """
        about = _remote(self._files.info, key)
        if about.get("size") is None:
            raise Misconfigured(f"The server does not tell the size of {self.shown(key)}: fetch it first.")
        return int(about["size"]), next((str(about[name]) for name in _VERSION_KEYS if about.get(name)), "")

    def ends(self, key: str, size_bytes: int) -> bytes:
        """Both ends."""
        with io.BufferedReader(self._exactly(key), END_BYTES) as file:
            head = file.read(END_BYTES)
            try:
                file.seek(max(0, size_bytes - END_BYTES))
            except RemoteTroubleError:  # a web server that sends only whole files
                return head
            return head + file.read(END_BYTES)

    def open(self, key: str) -> IO[bytes]:
        """A file that reads ahead."""
        return io.BufferedReader(_RemoteFile(_remote(self._files.open, key, "rb")), _REMOTE_BLOCK_BYTES)

    def arrow(self, key: str, *, mapped: bool = False) -> pa.NativeFile:
        """Arrow's view of such a file."""
        return pa.PythonFile(self._exactly(key), "r")

    def _exactly(self, key: str) -> _RemoteFile:
        """A file that reads what is asked for, and nothing ahead: whoever jumps would read all of that in vain."""
        return _RemoteFile(_remote(self._files.open, key, "rb", cache_type="none"))


class _RemoteFile(io.RawIOBase):
    """A file of fsspec whose troubles are all `OSError`s."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return int(_remote(self._file.seek, offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)
        data = _remote(self._file.read, len(view))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def storage_of(path: str) -> tuple[Storage, str]:
    """The storage of a path or URL, and the key of that path in it.

    Raises:
        Misconfigured: nothing that is installed knows such URLs.
    """
    if path.startswith("file://"):
        path = path.removeprefix("file://")
    if "://" not in path:
        return LocalStorage(), os.path.abspath(path)  # noqa: PTH100 # a pattern is no path
    remote = RemoteStorage(path)
    return remote, remote.key


def digest(ends: bytes) -> str:
    """Of both ends of a file, in hexadecimal digits."""
    return hashlib.sha256(ends).hexdigest()


@contextmanager
def explained(path: str, row: Callable[[], int] | None = None) -> Iterator[None]:
    """Turn what goes wrong with a file into errors that name it.

    Args:
        path: as people are told.
        row: tells how far reading has come.

    Raises:
        Misconfigured: the file is gone, damaged, or may not be read.
        Unavailable: a storage behind a URL has trouble.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise Misconfigured(f"There is no {path}{_at(row)}.") from error
    except PermissionError as error:
        raise Misconfigured(f"{path} may not be read{_at(row)}.") from error
    except RemoteTroubleError as error:
        raise Unavailable(f"{path} could not be read{_at(row)}: {error}") from error
    except (OSError, EOFError, pa.ArrowException, *DAMAGE) as error:
        raise Misconfigured(f"{path} is damaged, or not what its name says{_at(row)}: {_short(error)}") from error


def _at(row: Callable[[], int] | None) -> str:
    return "" if row is None else f", at row {row()}"


def _short(error: BaseException) -> str:
    lines = without_secrets(str(error)).splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def _remote(call: Callable[..., T], *arguments: Any, **options: Any) -> T:
    try:
        return call(*arguments, **options)
    except FileNotFoundError as error:
        # Of a web server that does not answer, fsspec says the same as of one that has no such file.
        cause = error.__cause__
        if type(cause).__module__.startswith("aiohttp") and getattr(cause, "status", 0) not in (404, 410):
            raise RemoteTroubleError(_short(cause or error)) from None
        raise
    except PermissionError:
        raise
    except Exception as error:  # noqa: BLE001 # each storage has its own errors, and they hold whole URLs
        raise RemoteTroubleError(_short(error)) from None
