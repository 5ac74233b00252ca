"""Says every few seconds that this process works on a backfill, and how far it is; nothing depends on being heard."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from redis.asyncio import Redis
from redis.exceptions import RedisError

from embedstream.shared.connections import pause
from embedstream.shared.errors import EmbedstreamError
from embedstream.shared.keys import backfills
from embedstream.shared.logs import get_logger
from embedstream.shared.processes import own_identity

from .beats import EVERY_S, LASTS_S, Beat, beats_in
from .drafts import draft_of, host_name
from .progress import Progress
from .state import State

log = get_logger()


class Presence:
    """Beats while it is open: `async with Presence(…)`.

    Args:
        redis: client of the queue.
        prefix: beginning of all keys.
        state: of the backfill.
        progress: of this process.
        out: where it writes, as it may be shown.
        every_s: time between two beats.
    """

    def __init__(
        self, redis: Redis, prefix: str, state: State, progress: Progress, out: str, *, every_s: float = EVERY_S
    ) -> None:
        self._redis = redis
        self._key = backfills(prefix)
        self._state = state
        self._progress = progress
        self._out = out
        self._every_s = every_s
        self._process = own_identity()
        self._mark = f"{host_name()}-{self._process.pid}-{self._process.started}"
        self._path = state.beats / f"{self._mark}.json"
        self._stopping = asyncio.Event()
        self._is_heard = False
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(beats_in, self._path.parent)  # which removes what killed processes have left
        self._task = asyncio.create_task(self._run(), name="backfill-presence")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()  # not by cancelling: what a thread writes then would come after what is removed here
        if self._task is not None:
            await self._task
        if self._is_heard:
            with suppress(RedisError, OSError):  # it is out of date in a moment anyway
                await self._redis.hdel(self._key, self._mark)
        with suppress(OSError):
            await asyncio.to_thread(self._path.unlink, missing_ok=True)

    async def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                beat = await asyncio.to_thread(self._beat)
                await asyncio.to_thread(_replace, self._path, beat.encode())
                await self._say(beat)
                self._is_heard = True
            except (RedisError, OSError, EmbedstreamError) as error:  # who works meets the same, and says it
                self._is_heard = False
                log.debug("backfill.presence", error=type(error).__name__)
            await pause(self._every_s, self._stopping)

    def _beat(self) -> Beat:
        records = self._state.records()
        return Beat(
            self._state.manifest.id,
            self._out,
            host_name(),
            self._process.pid,
            self._process.started,
            sum(record.taken for record in records),
            self._progress.total_rows,
            sum(record.bad_rows for record in records),
            self._progress.rates[0],
            self._progress.state,
        )

    async def _say(self, beat: Beat) -> None:
        seconds, micros = await self._redis.time()
        until_ms = int(seconds) * 1000 + int(micros) // 1000 + int(LASTS_S * 1000)
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.hset(self._key, self._mark, beat.encode(until_ms))
            pipe.expire(self._key, int(LASTS_S))
            await pipe.execute()


def _replace(path: Path, data: bytes) -> None:
    """Whole, but not durable: who outlives the machine does not want to know."""
    draft = draft_of(path)
    draft.write_bytes(data)
    draft.replace(path)
