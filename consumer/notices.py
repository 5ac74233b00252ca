"""Notices: what callers and consumers tell all consumers. Best effort; nothing that must be right depends on them.

Two kinds: requests that were abandoned, whose jobs need not be computed, and entries that were given back, which others
can take at once instead of at their next look.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from embedstream.shared.connections import BLOCK_MS, after_failure, backoff_s, pause
from embedstream.shared.keys import FIELD_CANCELLED, FIELD_RELEASED, Keys
from embedstream.shared.logs import get_logger, told

ID_BYTES = 16
READ_COUNT = 256
REMEMBERED_S = 3600.0
MOST_REMEMBERED = 200_000
"""About 30 MB. Of a request that is forgotten, the jobs are computed for nobody."""

log = get_logger()


class Cancelled(Mapping[bytes, int]):
    """Abandoned requests: id -> when that was said, in milliseconds of Redis's clock.

    What was enqueued later is wanted: a dead letter is replayed under the id of a request whose caller has long gone.
    The event loop adds, any thread may look one up.
    """

    def __init__(self) -> None:
        self._ids: dict[bytes, int] = {}
        self._order: deque[tuple[float, bytes]] = deque()
        self.changes = 0
        """How often something was added."""

    def __getitem__(self, request_id: bytes) -> int:
        return self._ids[request_id]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, request_id: bytes, said_ms: int) -> None:
        """Remember an id for an hour, as long as there are not too many."""
        now_s = time.monotonic()
        if request_id not in self._ids:
            self._order.append((now_s, request_id))
        self._ids[request_id] = said_ms
        self.changes += 1
        while self._order and (len(self._order) > MOST_REMEMBERED or self._order[0][0] < now_s - REMEMBERED_S):
            self._ids.pop(self._order.popleft()[1], None)


class Notices:
    """Reads the notices of one model.

    Args:
        reader: client of one connection, used by nobody else.
        keys: of the model.
        consumer: our own name; what we give back ourselves is no news.
    """

    def __init__(self, reader: Redis, keys: Keys, consumer: str) -> None:
        self._reader = reader
        self._stream = keys.notices
        self._consumer = consumer.encode()
        self._last = b"0"
        self.cancelled = Cancelled()
        self.released = asyncio.Event()
        """Set when another consumer has given entries back."""

    async def run(self, stopping: asyncio.Event) -> None:
        """Read until `stopping` is set."""
        pauses = backoff_s()
        while not stopping.is_set():
            try:
                await self._read()
                pauses = backoff_s()
            except (RedisError, OSError) as error:
                log.warning("notices.read_failed", error=told(error))
                await after_failure(self._reader, error)
                await pause(next(pauses), stopping)
            except Exception:  # a defect; what is best effort must not end the consumer
                log.exception("notices.failed")
                await pause(next(pauses), stopping)

    async def _read(self) -> None:
        reply: Any = await self._reader.xread({self._stream: self._last}, READ_COUNT, BLOCK_MS)
        for _, entries in reply or ():
            for entry_id, fields in entries:
                self._last = entry_id
                self._take(entry_id, fields)

    def _take(self, entry_id: bytes, fields: dict[bytes, bytes]) -> None:
        ids, said_ms = fields.get(FIELD_CANCELLED, b""), int(entry_id.partition(b"-")[0])
        for at in range(0, len(ids) - ID_BYTES + 1, ID_BYTES):
            self.cancelled.add(ids[at : at + ID_BYTES], said_ms)
        if FIELD_RELEASED in fields and fields[FIELD_RELEASED] != self._consumer:
            self.released.set()
