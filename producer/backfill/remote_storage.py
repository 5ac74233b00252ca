"""Files behind a URL, through fsspec."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from typing import IO, Any, TypeVar

import fsspec
import pyarrow as pa
from fsspec.core import url_to_fs
from fsspec.registry import known_implementations

from embedstream.shared.errors import Misconfigured
from embedstream.shared.urls import without_secrets

from .storage import END_BYTES
from .trouble import RemoteTroubleError, in_short

_BLOCK_BYTES = 1024 * 1024
_VERSION_KEYS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created", "version_id")
"""Under which names storages tell what changes with a file; the first one found is taken."""

T = TypeVar("T")


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
        return io.BufferedReader(_RemoteFile(_remote(self._files.open, key, "rb")), _BLOCK_BYTES)

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


def _remote(call: Callable[..., T], *arguments: Any, **options: Any) -> T:
    try:
        return call(*arguments, **options)
    except FileNotFoundError as error:
        # Of a web server that does not answer, fsspec says the same as of one that has no such file.
        cause = error.__cause__
        if type(cause).__module__.startswith("aiohttp") and getattr(cause, "status", 0) not in (404, 410):
            raise RemoteTroubleError(in_short(cause or error)) from None
        raise
    except PermissionError:
        raise
    except Exception as error:  # noqa: BLE001 # each storage has its own errors, and they hold whole URLs
        raise RemoteTroubleError(in_short(error)) from None
