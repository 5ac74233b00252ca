"""Notices: tell consumers of requests that nobody waits for any more, so that their jobs cost no device time.

Best effort: a job whose notice is lost is computed for nothing, or dropped at its deadline.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from embedstream.shared.connections import after_failure, backoff_s, is_transient, pause
from embedstream.shared.keys import FIELD_CANCELLED, Keys
from embedstream.shared.logs import get_logger, told

NOTICES_KEPT = 2000
"""Entries of the stream, about; consumers read it as it grows."""
NOTICES_TTL_MS = 3_600_000
"""The stream goes when nothing was called off for so long: as long as consumers remember."""
MAX_IDS = 256
"""Requests named in one entry."""
MOST_WAITING = 100_000
"""Requests remembered while Redis is away; the oldest go first, for their deadlines are nearest."""

log = get_logger()


class Notices:
    """Sends notices off the requests' path: many abandoned requests in one command.

    Args:
        redis: client for short commands.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._waiting: deque[tuple[Keys, bytes]] = deque(maxlen=MOST_WAITING)
        self._work = asyncio.Event()

    def abandon(self, keys: Keys, request_id: bytes) -> None:
        """Say that nobody waits for a request any more; it never waits itself."""
        self._waiting.append((keys, request_id))
        self._work.set()

    def wake(self) -> None:
        """Let `run` look whether it is to stop."""
        self._work.set()

    async def run(self, stopping: asyncio.Event) -> None:
        """Send what is to be told, until `stopping` is set."""
        pauses = backoff_s()
        while not stopping.is_set():
            await self._work.wait()
            self._work.clear()
            try:
                await self._send()
                pauses = backoff_s()
            except (RedisError, OSError) as error:
                log.warning("notices.failed", error=told(error), waiting=len(self._waiting))
                await after_failure(self._redis, error)
                if not is_transient(error):
                    self._waiting.clear()
                    continue
                await pause(next(pauses), stopping)
                self._work.set()

    async def flush(self) -> None:
        """Send what is left, once: the last act of a producer."""
        try:
            await self._send()
        except (RedisError, OSError) as error:
            log.warning("notices.lost", error=told(error), waiting=len(self._waiting))

    async def _send(self) -> None:
        while self._waiting:
            keys, ids = self._next()
            fields: dict[Any, Any] = {FIELD_CANCELLED: b"".join(ids)}
            try:
                await self._redis.xadd(keys.notices, fields, maxlen=NOTICES_KEPT)
                await self._redis.pexpire(keys.notices, NOTICES_TTL_MS)
            except (RedisError, OSError):
                self._waiting.extendleft((keys, request_id) for request_id in reversed(ids))
                raise

    def _next(self) -> tuple[Keys, list[bytes]]:
        """The first requests that are of one model."""
        keys = self._waiting[0][0]
        ids: list[bytes] = []
        while self._waiting and self._waiting[0][0] == keys and len(ids) < MAX_IDS:
            ids.append(self._waiting.popleft()[1])
        return keys, ids
