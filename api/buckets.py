"""The buckets behind the quotas, in Redis: all that a moment's requests ask of them travels in one call.

A call for each request would cost the event loop as much as the rest of a small request, and take the connections on
which the queue is written. There is no timer: while one call is under way, the next one fills.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass

from redis.asyncio import Redis
from redis.exceptions import RedisError

from embedstream.shared.connections import Arg, Script, after_failure
from embedstream.shared.logs import get_logger

_CALL_REQUESTS = 256  # in one call: a script holds all others up
_SCRIPT = Script("embedstream.api", "quota.lua")

log = get_logger()


@dataclass(frozen=True, slots=True)
class Bucket:
    """What is told of a bucket.

    Args:
        taken: whether the tokens were taken.
        tokens: that are in it now; below 0 after a request larger than the bucket.
        wait_s: until a refused request would be taken.
    """

    taken: bool
    tokens: float
    wait_s: float


@dataclass(frozen=True, slots=True)
class _Asked:
    key: str
    args: tuple[Arg, ...]
    told: asyncio.Future[Bucket]


class Buckets:
    """All buckets of one process's requests.

    Args:
        redis: gives the client for short commands.
    """

    def __init__(self, redis: Callable[[], Redis]) -> None:
        self._redis = redis
        self._waiting: list[_Asked] = []
        self._sending: asyncio.Task[None] | None = None

    async def take(self, key: str, tokens: int, *, tokens_per_s: float, burst_tokens: float) -> Bucket:
        """Take tokens from a bucket, or give them back when they are below 0.

        A cancelled call may have taken them all the same.

        Args:
            key: of the bucket in Redis; all of one moment lie in one slot.
            tokens: to take.
            tokens_per_s: that it grows by.
            burst_tokens: that it holds at most.

        Raises:
            RedisError, OSError: Redis does not tell.
        """
        told: asyncio.Future[Bucket] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Asked(key, (repr(tokens_per_s), repr(burst_tokens), tokens), told))
        if self._sending is None:
            # With no context: what it logs is not about the request that happened to be the first.
            self._sending = asyncio.create_task(self._send_all(), name="quota", context=Context())
        return await told

    async def _send_all(self) -> None:
        try:
            while self._waiting:
                asked, self._waiting = self._waiting[:_CALL_REQUESTS], self._waiting[_CALL_REQUESTS:]
                await self._send(asked)
        finally:
            self._sending = None

    async def _send(self, asked: list[_Asked]) -> None:
        try:
            args = [arg for each in asked for arg in each.args]
            answers = await _SCRIPT.run(self._redis(), [each.key for each in asked], args)
            for each, (taken, tokens, wait_s) in zip(asked, answers, strict=True):
                if not each.told.done():  # or the request was given up meanwhile
                    each.told.set_result(Bucket(bool(taken), float(tokens), float(wait_s)))
        except (RedisError, OSError) as error:
            _tell(asked, error)
            await after_failure(self._redis(), error)
        except Exception as error:  # a defect; whoever asked must not wait for ever
            log.exception("quota.failed")
            _tell(asked, error)


def _tell(asked: list[_Asked], error: Exception) -> None:
    for each in asked:
        if not each.told.done():
            each.told.set_exception(error)
