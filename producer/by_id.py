"""Requests by id: handed over by one process, their results picked up by any, or given up."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable

from redis.asyncio import Redis

from embedstream.shared.errors import EmbedstreamError, InvalidInput, Overloaded, Unavailable
from embedstream.shared.keys import Keys

from .arguments import MAX_TIMEOUT_S
from .assemble import assemble_parts
from .notices import Notices
from .ordered import ON_LOOP_BYTES
from .pending import PendingRequest
from .pickup import KeptResults, read_id
from .request import Embeddings, Prepared, cut_into_jobs
from .submission import Submissions
from .unbroken import Unbroken


class RequestsById:
    """The requests of one producer whose results are kept under their ids.

    Args:
        redis: client for short commands.
        submissions: send requests.
        keys: tells the keys of the model that is served now.
        notices: calls off what was given up.
        stopping: ends all waiting.
    """

    def __init__(
        self,
        redis: Redis,
        submissions: Submissions,
        keys: Callable[[], Awaitable[Keys]],
        notices: Notices,
        stopping: asyncio.Event,
    ) -> None:
        self._redis = redis
        self._submissions = submissions
        self._keys = keys
        self._notices = notices
        self._stopping = stopping
        self._unbroken = Unbroken()

    async def store(
        self, prepared: Prepared, request_id: bytes, *, timeout_s: float, result_ttl_s: int, deadline_s: float
    ) -> None:
        """Hand a request over; it returns when every job is stored. A caller that gives up before breaks nothing off.

        Args:
            prepared: the request.
            request_id: 16 bytes.
            timeout_s: time after which nobody wants the result.
            result_ttl_s: how long the result is kept beyond that.
            deadline_s: how long to wait for Redis, on the event loop's clock.

        Raises:
            InvalidInput: the id stands for something else.
            Overloaded: refused.
            Unavailable: not confirmed, and perhaps stored in part.
        """
        try:
            async with asyncio.timeout_at(deadline_s):
                await self._unbroken.run(self._store(prepared, request_id, timeout_s, result_ttl_s))
        except TimeoutError:  # it goes on without this caller
            raise Unavailable(
                "Redis has not confirmed the jobs in the request's time; submit them again under the same id.",
                retry_after_s=2.0,
            ) from None

    async def pick_up(self, request_id: str, wait_s: float) -> Embeddings:
        """The whole result of a request, as soon as it is there.

        Args:
            request_id: 32 hexadecimal digits.
            wait_s: how long to wait for it; 0 looks once.

        Raises:
            EmbedstreamError: as `Producer.result` says.
        """
        if not 0 <= wait_s <= MAX_TIMEOUT_S:
            raise InvalidInput(f"timeout_s is {wait_s}; it must be from 0 to {MAX_TIMEOUT_S}.", param="timeout_s")
        name, keys = read_id(request_id), await self._keys()
        parts, plan = await self._kept(keys).wait(name, wait_s, self._stopping)
        if sum(part.vectors.nbytes for part in parts) > ON_LOOP_BYTES:
            return await asyncio.to_thread(assemble_parts, parts, plan)
        return assemble_parts(parts, plan)

    async def cancel(self, request_id: str, ttl_s: int) -> None:
        """Give a request up, and remember for `ttl_s` seconds that it was.

        Raises:
            ResultNotFound: nobody knows the id.
            Unavailable: Redis does not answer.
        """
        name, keys = read_id(request_id), await self._keys()
        await self._unbroken.run(self._kept(keys).cancel(name, ttl_s))
        self._notices.abandon(keys, name)

    async def join(self) -> None:
        """Wait for what goes on without its caller."""
        await self._unbroken.join()

    def _kept(self, keys: Keys) -> KeptResults:
        return KeptResults(self._redis, keys, self._unbroken)

    async def _store(self, prepared: Prepared, request_id: bytes, timeout_s: float, result_ttl_s: int) -> None:
        keys = await self._keys()
        now = asyncio.get_running_loop().time()
        # Every part that comes renews the expiry, so it must not be shorter than the time the others may take.
        ttl_s = math.ceil(timeout_s) + result_ttl_s
        jobs = cut_into_jobs(prepared, request_id, max(1, int(timeout_s * 1000)), ttl_s)
        kept = self._kept(keys)
        new = await kept.announce(request_id, len(jobs), ttl_s, prepared.plan)
        request = PendingRequest(request_id, jobs, now, now + timeout_s)
        try:
            await self._submissions.store(request, keys)
        except EmbedstreamError:
            if new and isinstance(request.error, Overloaded):
                await kept.forget(request_id)
            raise
