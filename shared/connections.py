"""Connections to Redis, and how its failures are read.

redis-py 8 retries every command ten times by itself: one lost reply would add a job eleven times, and a read would
skip entries. So its retries are off, every call has a timeout of its own, and our loops decide what to do again.
RESP2 is asked for because the shape of RESP3 replies depends on two further switches.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.resources import files
from typing import Any

import redis as redis_sync
from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.retry import Retry as SyncRetry

COMMAND_TIMEOUT_S = 2.0
BLOCK_MS = 1000
"""Longest wait of a blocking read: short, because a read may hang on a slot that moved away."""
READER_TIMEOUT_S = BLOCK_MS / 1000 + 2.0

TRANSIENT: tuple[type[Exception], ...] = (
    exceptions.ConnectionError,  # LOADING too
    exceptions.TimeoutError,
    exceptions.ReadOnlyError,
    exceptions.OutOfMemoryError,
    exceptions.TryAgainError,
    exceptions.ClusterDownError,  # MASTERDOWN too
    exceptions.AskError,  # MOVED too
    exceptions.ExecAbortError,
    OSError,
)
_TRANSIENT_WORDS = {
    *("UNBLOCKED", "NOREPLICAS", "MISCONF", "OOM", "LOADING", "MASTERDOWN", "CLUSTERDOWN", "READONLY", "TRYAGAIN"),
    "BUSY",  # somebody's script has run for seconds
}
_IN_SCRIPT = re.compile(r"@user_script: ?\d+: -([A-Z]+) ")
"""Where Redis 6.2 puts the error of a command that failed within a script."""
_IN_PIPELINE = re.compile(r"""^Command # .* of pipeline caused error: \(['"]""", re.DOTALL)
"""What redis-py puts before the error of a command that failed within a pipeline."""

Arg = bytes | str | int | float


def connect(url: str, *, max_connections: int = 16) -> Redis:
    """A client for short commands; callers queue for its connections."""
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=max_connections,
        timeout=COMMAND_TIMEOUT_S,
        socket_timeout=COMMAND_TIMEOUT_S,
        socket_connect_timeout=COMMAND_TIMEOUT_S,
        protocol=2,
        retry=Retry(NoBackoff(), 0),
        **_keepalive(url),
    )
    return Redis.from_pool(pool)


def connect_reader(url: str) -> Redis:
    """A client of one connection, for one loop's blocking reads; those never share a pool with others."""
    return Redis.from_url(
        url,
        max_connections=1,
        socket_timeout=READER_TIMEOUT_S,
        socket_connect_timeout=COMMAND_TIMEOUT_S,
        protocol=2,
        retry=Retry(NoBackoff(), 0),
        **_keepalive(url),
    )


def connect_sync(url: str) -> redis_sync.Redis:
    """A blocking client, for threads."""
    return redis_sync.Redis.from_url(
        url,
        socket_timeout=COMMAND_TIMEOUT_S,
        socket_connect_timeout=COMMAND_TIMEOUT_S,
        protocol=2,
        retry=SyncRetry(NoBackoff(), 0),
        **_keepalive(url),
    )


def _keepalive(url: str) -> dict[str, Any]:
    """TCP keepalive; redis-py refuses the option for a unix socket, which has none."""
    return {} if url.startswith("unix:") else {"socket_keepalive": True}


def is_refusal(error: BaseException | None) -> bool:
    """Whether Redis does not let us in, or not do what we must: no password, a wrong one, or too few rights."""
    refusals = (exceptions.AuthenticationError, exceptions.AuthorizationError, exceptions.NoPermissionError)
    # The asyncio client wraps what goes wrong while it connects.
    return isinstance(error, refusals) or (error is not None and isinstance(error.__cause__, refusals))


def is_transient(error: BaseException) -> bool:
    """Whether the same command may succeed a little later without anybody mending anything."""
    if is_refusal(error):
        return False
    if isinstance(error, TRANSIENT):
        return True
    return _word(error) in _TRANSIENT_WORDS


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Redis refused to store something because its memory is full; then nothing of it was done."""
    return isinstance(error, exceptions.OutOfMemoryError) or _word(error) == "OOM"


def _word(error: BaseException) -> str:
    """The word an error reply begins with, or that of the command that failed in a script; "" for other errors."""
    if not isinstance(error, exceptions.ResponseError):
        return ""
    said = _IN_PIPELINE.sub("", str(error))
    inner = _IN_SCRIPT.search(said)
    return inner[1] if inner else said.partition(" ")[0]


def is_missing_group(error: BaseException) -> bool:
    """Whether a read failed because the stream or its group is gone (after FLUSHALL, DEL, or a lost disk)."""
    return isinstance(error, exceptions.ResponseError) and str(error).startswith(("NOGROUP", "UNBLOCKED"))


async def after_failure(client: Redis, error: BaseException) -> None:
    """Drop a client's idle connections when the server they lead to has become the wrong one, or is silent.

    READONLY after a failover is an ordinary error reply, so redis-py would keep the connection to the old primary.
    After a silent cut each of them would cost a timeout of its own.
    """
    wrong = (exceptions.ReadOnlyError, exceptions.MovedError, exceptions.MasterDownError, exceptions.TimeoutError)
    if isinstance(error, wrong) or _word(error) in {"READONLY", "MASTERDOWN"}:
        with suppress(exceptions.RedisError, OSError):  # they are let go, however that ends
            await client.connection_pool.disconnect(inuse_connections=False)


def backoff_s(first: float = 0.05, last: float = 1.0) -> Iterator[float]:
    """Pauses between tries: doubling from `first` to `last` seconds, each with up to a quarter of jitter, for ever."""
    pause = first
    while True:
        yield pause * random.uniform(0.75, 1.25)  # noqa: S311 - spreads reconnects, guards nothing
        pause = min(pause * 2, last)


async def create_group(client: Redis, stream: str, group: str) -> None:
    """Create a lane and its group, reading from the very first entry; having them already is fine."""
    try:
        await client.xgroup_create(stream, group, id="0", mkstream=True)
    except exceptions.ResponseError as error:
        if not str(error).startswith("BUSYGROUP"):
            raise


class Script:
    """A Lua script that lies beside its module, called by digest and, where the server lost it, by text."""

    def __init__(self, package: str, name: str) -> None:
        self.text = files(package).joinpath(name).read_text()
        self.digest = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    async def run(self, client: Redis, keys: Sequence[str], args: Sequence[Arg]) -> Any:
        """Run it on an asyncio client."""
        try:
            return await client.evalsha(self.digest, len(keys), *keys, *args)
        except exceptions.NoScriptError:
            return await client.eval(self.text, len(keys), *keys, *args)

    def run_sync(self, client: redis_sync.Redis, keys: Sequence[str], args: Sequence[Arg]) -> Any:
        """Run it on a blocking client."""
        try:
            return client.evalsha(self.digest, len(keys), *keys, *args)
        except exceptions.NoScriptError:
            return client.eval(self.text, len(keys), *keys, *args)


async def pause(seconds: float, wake: asyncio.Event) -> None:
    """Sleep until `seconds` have passed or `wake` is set."""
    try:
        await asyncio.wait_for(wake.wait(), seconds)
    except TimeoutError:
        return
