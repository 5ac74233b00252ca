"""Results kept under request ids: submitted by one process, picked up by any, as often as wanted while they last.

The hash `Keys.result` holds the parts of all jobs. Beside them the submitter writes how many jobs there are, before any
of them is queued: so an id that waits is told apart from one that nobody knows; and how the rows make up the inputs,
where an input is several.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from embedstream.shared import results
from embedstream.shared.connections import after_failure, is_transient, pause
from embedstream.shared.errors import InvalidInput, ResultNotFound, ResultTimeout, Unavailable
from embedstream.shared.keys import FIELD_JOBS, FIELD_ROWS, FIELD_WAS_CANCELLED, Keys
from embedstream.shared.results import ResultPart

from .failures import raise_for_rows
from .pending import JobParts
from .rows import RowPlan
from .unbroken import Unbroken

READ_COUNT = 8
"""Parts of one read: at most 1 MiB each, so at most 8 MiB, which arrives well within a command's timeout."""
FIRST_PAUSE_S, LAST_PAUSE_S, PAUSE_GROWTH = 0.02, 0.5, 1.5


def read_id(request_id: str) -> bytes:
    """The 16 bytes of a request id.

    Raises:
        InvalidInput: it is not 32 hexadecimal digits.
    """
    if not re.fullmatch(r"[0-9a-fA-F]{32}", request_id):
        raise InvalidInput(f"A request id is 32 hexadecimal digits, not {request_id[:80]!r}.", param="request_id")
    return bytes.fromhex(request_id)


class KeptResults:
    """The results of one model's requests, by their ids.

    Args:
        redis: client for short commands.
        keys: of the model.
        unbroken: runs the commands, so that a caller who gives up breaks none.
    """

    def __init__(self, redis: Redis, keys: Keys, unbroken: Unbroken) -> None:
        self._redis = redis
        self._keys = keys
        self._unbroken = unbroken

    async def announce(self, request_id: bytes, n_jobs: int, ttl_s: int, plan: RowPlan) -> bool:
        """Write that a request of so many jobs is on its way, and how to make inputs of its rows.

        Returns:
            Whether the id is new; else it is submitted once more, which does no harm.

        Raises:
            InvalidInput: the id stands for another request, or was cancelled.
            Unavailable: Redis does not take it.
        """
        key = self._keys.result(request_id)
        told = b"" if plan.is_plain else plan.encode()  # that too is told: else another way of cutting could be added
        try:
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.hsetnx(key, FIELD_JOBS, n_jobs)
                pipe.hsetnx(key, FIELD_ROWS, told)
                pipe.expire(key, ttl_s)
                pipe.hmget(key, [FIELD_JOBS, FIELD_WAS_CANCELLED, FIELD_ROWS])
                new, *_, (known, cancelled, rows) = await pipe.execute()
        except (RedisError, OSError) as error:
            raise await self._unavailable(error) from error
        if cancelled is not None:
            raise InvalidInput(f"The request {request_id.hex()} was cancelled; take a new id.", param="request_id")
        if int(known) != n_jobs:
            raise InvalidInput(
                f"The id {request_id.hex()} stands for a request of {int(known)} jobs, and this one has {n_jobs}.",
                param="request_id",
            )
        if rows != told:
            raise InvalidInput(
                f"The id {request_id.hex()} stands for a request whose inputs were cut into other pieces.",
                param="request_id",
            )
        return bool(new)

    async def forget(self, request_id: bytes) -> None:
        """Take back that a request is on its way: it was refused. If that fails, the id expires by itself."""
        try:
            await self._redis.delete(self._keys.result(request_id))
        except (RedisError, OSError) as error:
            await after_failure(self._redis, error)

    async def cancel(self, request_id: bytes, ttl_s: int) -> None:
        """Drop a request's results, and remember for `ttl_s` seconds that it was cancelled.

        Raises:
            ResultNotFound: nobody knows the id.
            Unavailable: Redis does not answer.
        """
        key = self._keys.result(request_id)
        try:
            if not await self._redis.exists(key):
                raise ResultNotFound(_unknown(request_id))
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.delete(key)
                pipe.hset(key, FIELD_WAS_CANCELLED, 1)
                pipe.expire(key, ttl_s)
                await pipe.execute()
        except (RedisError, OSError) as error:
            raise await self._unavailable(error) from error

    async def wait(
        self, request_id: bytes, timeout_s: float, stopping: asyncio.Event
    ) -> tuple[list[ResultPart], RowPlan | None]:
        """All parts of a request's result, as soon as they are there, and how to make inputs of them.

        Args:
            request_id: 16 bytes.
            timeout_s: how long to look for them; 0 looks once.
            stopping: ends the waiting.

        Raises:
            ResultNotFound: nobody knows the id, or it was cancelled.
            ResultTimeout: they are not all there yet.
            Unavailable: Redis does not answer, or `stopping` was set.
            EmbedstreamError: what the first failed row says.
        """
        loop = asyncio.get_running_loop()
        deadline_s, pause_s = loop.time() + timeout_s, FIRST_PAUSE_S
        gathered = _Gathered(self._redis, self._keys, request_id)
        while not stopping.is_set():
            trouble: Unavailable | None = None
            try:
                if await self._unbroken.run(gathered.look()):
                    return gathered.parts, gathered.plan
            except (RedisError, OSError) as error:
                trouble = await self._unavailable(error)
                if not is_transient(error):
                    raise trouble from error
            left_s = deadline_s - loop.time()
            if left_s <= 0:
                raise trouble or ResultTimeout(f"The result is not complete yet: {gathered.missing}.")
            await pause(min(pause_s, left_s), stopping)
            pause_s = min(pause_s * PAUSE_GROWTH, LAST_PAUSE_S)
        raise Unavailable("The producer was closed.")

    async def _unavailable(self, error: Exception) -> Unavailable:
        await after_failure(self._redis, error)
        if is_transient(error):
            return Unavailable("Redis cannot be reached, or takes nothing.", retry_after_s=2.0)
        return Unavailable(f"Redis refuses: {error}", retry_after_s=2.0)


class _Gathered:
    """What has been read of one request's result."""

    def __init__(self, redis: Redis, keys: Keys, request_id: bytes) -> None:
        self._redis = redis
        self._request_id = request_id
        self._key = keys.result(request_id)
        self._n_jobs = 0  # until somebody tells
        self._n_done = 0
        self._n_fields = 0
        self._jobs: dict[int, JobParts] = {}
        self._seen: set[bytes] = set()
        self.parts: list[ResultPart] = []
        self.plan: RowPlan | None = None
        """How its rows make up its inputs; None when each is one."""

    @property
    def missing(self) -> str:
        """What is not there yet, for people."""
        return f"{self._n_jobs - self._n_done} of {self._n_jobs} jobs have no result" if self._n_jobs else "no part"

    async def look(self) -> bool:
        """Read what is new, and tell whether that is all.

        Raises:
            ResultNotFound: nobody knows the id, or it was cancelled.
            EmbedstreamError: what the first failed row says.
        """
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.hlen(self._key)
            pipe.hmget(self._key, [FIELD_JOBS, FIELD_WAS_CANCELLED, FIELD_ROWS])
            n_fields, (n_jobs, cancelled, rows) = await pipe.execute()
        if cancelled is not None:
            raise ResultNotFound(f"The request {self._request_id.hex()} was cancelled.")
        if not n_fields:
            raise ResultNotFound(_unknown(self._request_id))
        if n_jobs is not None:
            self._n_jobs = int(n_jobs)
        if rows and self.plan is None:
            self.plan = RowPlan.decode(rows)
        if n_fields != self._n_fields:
            await self._read_new()
            self._n_fields = -1 if any(job.mixed for job in self._jobs.values()) else n_fields
        return 0 < self._n_jobs == self._n_done

    async def _read_new(self) -> None:
        fields: Any = await self._redis.hkeys(self._key)
        for number, job in self._jobs.items():
            if job.mixed:  # parts of two answers, of which the second one was still being written
                job.mixed = False
                self._seen -= {field for field in self._seen if field.startswith(b"%d:" % number)}
        new = [field for field in fields if b":" in field and field not in self._seen]
        for start in range(0, len(new), READ_COUNT):
            some = new[start : start + READ_COUNT]
            values: Any = await self._redis.hmget(self._key, some)
            for field, value in zip(some, values, strict=True):
                if value is not None:
                    self._seen.add(field)
                    self._take(results.decode(value))

    def _take(self, part: ResultPart) -> None:
        self._n_jobs = self._n_jobs or part.n_jobs  # a producer of another kind need not announce its jobs
        complete = self._jobs.setdefault(part.job, JobParts()).add(part)
        for whole in complete or ():
            raise_for_rows(whole)
            self.parts.append(whole)
        self._n_done += bool(complete)


def _unknown(request_id: bytes) -> str:
    return f"No request {request_id.hex()} is known: it was never submitted, or its result has expired."
