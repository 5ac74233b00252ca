"""Forwarding: requests whose results go to an inbox, for other processes to receive; see `deliveries.py`."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable, Sequence

from redis.asyncio import Redis
from redis.exceptions import RedisError

from embedstream.shared.connections import Arg, Script, after_failure
from embedstream.shared.errors import EmbedstreamError, InvalidInput, Overloaded, Unavailable
from embedstream.shared.jobs import MAX_INPUTS, Job
from embedstream.shared.keys import GROUP, Keys

from .admission import ASSUMED_DIMENSION, result_bytes
from .inbox_keys import RowId, field_of, inbox_keys, most_rows, note
from .pending import PendingRequest
from .request import Prepared, cut_into_jobs
from .submission import Submissions
from .unbroken import Unbroken

FORWARD_TIMEOUT_S = 3600.0
"""Nobody waits for what is forwarded, so it may outlast the restart of a fleet."""
UNKNOWN_ROWS = 16
"""Inputs of one job while no consumer has told how large a vector is."""
_RETRY_S = 2.0

_ANNOUNCE = Script("embedstream.producer", "forward.lua")
_FORGET = Script("embedstream.producer", "acknowledge.lua")


class Forwarding:
    """The requests of one producer whose results others receive.

    Args:
        redis: client for short commands.
        submissions: send requests.
        keys: tells the keys of the model that is served now.
        most_bytes: of results that receivers have not acknowledged yet.
    """

    def __init__(
        self, redis: Redis, submissions: Submissions, keys: Callable[[], Awaitable[Keys]], most_bytes: int
    ) -> None:
        self._redis = redis
        self._submissions = submissions
        self._keys = keys
        self._most_bytes = most_bytes
        self._unbroken = Unbroken()

    async def forward(
        self,
        prepared: Prepared,
        request_id: bytes,
        to: str,
        tag: str,
        ids: Sequence[RowId] | None,
        *,
        timeout_s: float,
        ttl_s: int,
        deadline_s: float,
    ) -> None:
        """Hand a request over; it returns when every job is stored. A caller that gives up before breaks nothing off.

        Args:
            prepared: the request.
            request_id: 16 bytes.
            to: name of the inbox.
            tag: told to the receiver.
            ids: (inputs,) told too; None for none.
            timeout_s: time after which nobody wants the result.
            ttl_s: how long the inbox is kept beyond that.
            deadline_s: how long to wait for Redis, on the event loop's clock.

        Raises:
            EmbedstreamError: as `Producer.forward` says.
        """
        try:
            async with asyncio.timeout_at(deadline_s):
                await self._unbroken.run(self._forward(prepared, request_id, to, tag, ids, timeout_s, ttl_s))
        except TimeoutError:  # it goes on without this caller
            raise Unavailable(
                "Redis has not confirmed the jobs in time; forward them again under the same id.",
                retry_after_s=_RETRY_S,
            ) from None

    async def join(self) -> None:
        """Wait for what goes on without its caller."""
        await self._unbroken.join()

    async def _forward(
        self,
        prepared: Prepared,
        request_id: bytes,
        to: str,
        tag: str,
        ids: Sequence[RowId] | None,
        timeout_s: float,
        ttl_s: int,
    ) -> None:
        _check(prepared, ids)
        keys = await self._keys()
        now = asyncio.get_running_loop().time()
        row_bytes = result_bytes(prepared.options.vectors, 1, 1, prepared.dimension or ASSUMED_DIMENSION)
        rows = UNKNOWN_ROWS if prepared.dimension is None else min(MAX_INPUTS, most_rows(row_bytes))
        jobs = cut_into_jobs(prepared, request_id, max(1, int(timeout_s * 1000)), most_rows=rows)
        all_new = await self._announce(keys, to, jobs, row_bytes, tag, ids, math.ceil(timeout_s) + ttl_s)
        request = PendingRequest(request_id, jobs, now, now + timeout_s)
        try:
            await self._submissions.store(request, keys, keys.inbox(to))
        except EmbedstreamError:
            if all_new and isinstance(request.error, Overloaded):
                await self._take_back(keys, to, jobs)
            raise

    async def _announce(
        self,
        keys: Keys,
        to: str,
        jobs: list[Job],
        row_bytes: int,
        tag: str,
        ids: Sequence[RowId] | None,
        ttl_s: int,
    ) -> bool:
        """Write what the receiver is told, when the inbox has room. Returns whether all jobs are new to it."""
        args: list[Arg] = [GROUP, ttl_s * 1000, self._most_bytes]
        for job in jobs:
            end = job.first_input + job.n_inputs
            told = note(tag, None if ids is None else ids[job.first_input : end])
            args += [field_of(job.request_id, job.index), job.n_inputs * row_bytes, told]
        try:
            refused, waiting, new = await _ANNOUNCE.run(self._redis, inbox_keys(keys, to), args)
        except (RedisError, OSError) as error:
            await after_failure(self._redis, error)
            raise Unavailable(f"Redis does not take the jobs: {error}", retry_after_s=_RETRY_S) from error
        if refused:
            raise Overloaded(
                f"The receivers of `{to}` have {waiting:,} bytes of results to come and to acknowledge; more than "
                f"{self._most_bytes:,} are not asked for (--max-undelivered-bytes).",
                retry_after_s=_RETRY_S * random.uniform(0.9, 1.1),  # noqa: S311 - spreads senders, guards nothing
            )
        return bool(new == len(jobs))

    async def _take_back(self, keys: Keys, to: str, jobs: list[Job]) -> None:
        """Forget what was announced: it was refused. If that fails, it goes with the inbox."""
        try:
            args: list[Arg] = [GROUP, "", *(field_of(job.request_id, job.index) for job in jobs)]
            await _FORGET.run(self._redis, inbox_keys(keys, to), args)
        except (RedisError, OSError) as error:
            await after_failure(self._redis, error)


def _check(prepared: Prepared, ids: Sequence[RowId] | None) -> None:
    if ids is not None and len(ids) != prepared.n_inputs:
        raise InvalidInput(f"There are {len(ids)} ids for {prepared.n_inputs} inputs.", param="ids")
    if (prepared.plan.counts > 1).any():
        raise InvalidInput(
            "What is forwarded cannot be embedded in pieces: use long_inputs='truncate', or submit().",
            param="long_inputs",
        )
