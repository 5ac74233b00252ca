"""Who may call: the ring of known keys, and the middleware that asks each request for one of them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from hashlib import blake2b, sha256
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from embedstream.shared import metrics
from embedstream.shared.errors import Misconfigured
from embedstream.shared.logs import get_logger

from . import keys_file
from .context import Caller, context_of
from .errors import UnauthorizedError

OPEN_PATHS = frozenset({"/health", "/livez", "/ready", "/ping", "/version"})
"""Probes and the version: they need no key, and their calls are logged only at level debug."""
METRICS_PATH = "/metrics"
"""As quiet as the probes; it needs a key unless `--metrics-open` is set."""

_POLL_S = 1.0
"""How often the file is looked at. Notices of changes do not come from network folders and mounted secrets."""

log = get_logger()


class KeyRing:
    """All keys that open the API: those of `--api-key`, and those of a file, which is read again when it changes.

    Only digests are kept. The table is indexed by them under a secret of this process, so how long a look-up takes
    tells nothing of the keys in it, however many there are.

    Args:
        keys: of `--api-key`; they are called `api-key-1` and so on.
        path: of a keys file, or None.

    Raises:
        Misconfigured: the file is not there, or not understood.
    """

    def __init__(self, keys: Sequence[str], path: Path | None = None) -> None:
        self._secret = os.urandom(32)
        self._path = path
        self._own = {
            sha256(key.encode()).digest(): Caller(f"{keys_file.FLAG_NAMES}{place}") for place, key in enumerate(keys, 1)
        }
        self._seen: tuple[int, ...] | None = None
        self._callers = self._table(self._own)
        if path is not None:
            self._seen = _signature(path)
            self._callers = self._read(path)

    @property
    def guards(self) -> bool:
        """Whether requests need a key at all. With a file they always do, also while it names none."""
        return self._path is not None or bool(self._own)

    def caller_of(self, key: bytes) -> Caller | None:
        """Whose key it is; None for nobody's."""
        return self._callers.get(self._place(sha256(key).digest())) if key else None

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Follow the file for as long as the context lasts."""
        if self._path is None:
            yield
            return
        task = asyncio.create_task(self._follow(self._path), name="keys-file")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})

    async def _follow(self, path: Path) -> None:
        while True:
            await asyncio.sleep(_POLL_S)
            try:
                await asyncio.to_thread(self._look, path)
            except Exception:  # a defect; the next change of the file must count all the same
                log.exception("keys.failed")
                metrics.KEYS_RELOADS.labels("failed").inc()

    def _look(self, path: Path) -> None:
        """Read the file if it has changed. A broken one changes nothing, and is told once."""
        signature = _signature(path)
        if signature == self._seen:
            return
        self._seen = signature  # of before the reading: a change meanwhile is read the next time
        try:
            self._callers = self._read(path)
        except Misconfigured as error:
            log.error("keys.file_broken", error=str(error), kept=len(self._callers))
            metrics.KEYS_RELOADS.labels("failed").inc()
        else:
            log.info("keys.reloaded", path=str(path), keys=len(self._callers))
            metrics.KEYS_RELOADS.labels("ok").inc()

    def _read(self, path: Path) -> dict[bytes, Caller]:
        callers = keys_file.read(path)
        if twice := callers.keys() & self._own.keys():
            raise Misconfigured(f"{path}: `{callers[twice.pop()].name}` is also a key of --api-key.")
        return self._table(self._own | callers)

    def _table(self, callers: Mapping[bytes, Caller]) -> dict[bytes, Caller]:
        return {self._place(digest): caller for digest, caller in callers.items()}

    def _place(self, digest: bytes) -> bytes:
        return blake2b(digest, key=self._secret, digest_size=32).digest()


def _signature(path: Path) -> tuple[int, ...] | None:
    """What changes with the file, also when another takes its place; None while there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino, stat.st_dev


class Keys:
    """Lets a request in that has one of the bearer keys, and notes whose it is; without any key set, all.

    Args:
        app: what it guards.
        ring: the known keys.
        metrics_open: whether the metrics need none.
    """

    def __init__(self, app: ASGIApp, ring: KeyRing, *, metrics_open: bool = False) -> None:
        self.app = app
        self._ring = ring
        self._open_paths = OPEN_PATHS | {METRICS_PATH} if metrics_open else OPEN_PATHS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or run the application."""
        if scope["type"] == "http" and self._ring.guards and not self._is_open(scope):
            caller = self._ring.caller_of(_bearer_key(scope))
            if caller is None:
                raise UnauthorizedError(
                    "The API key is missing or wrong: send the header `Authorization: Bearer <key>`."
                )
            context = context_of(scope)
            context.caller = caller
            context.note(key=caller.name)
        await self.app(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        if scope["path"] in self._open_paths:
            return True
        # Browsers send no key with a preflight.
        return scope["method"] == "OPTIONS" and "access-control-request-method" in Headers(scope=scope)


def _bearer_key(scope: Scope) -> bytes:
    """The key as the client sent it, whatever its bytes encode; empty, which is no key, without one."""
    scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    return key.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
