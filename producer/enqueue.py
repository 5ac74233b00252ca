"""The coalescing writer: all requests of a moment in one script call.

Against one awaited XADD a job this costs about a sixth of the client's CPU and a third of Redis's, admission
included. There is no timer: while one call is under way, the next one fills.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError, RedisError

from embedstream.shared.connections import Arg, Script, after_failure, is_transient
from embedstream.shared.errors import Overloaded, Unavailable
from embedstream.shared.keys import Keys
from embedstream.shared.lanes import LANES
from embedstream.shared.logs import get_logger

from .pending import PendingRequest, SentJob

MAX_CALL_JOBS = 256
MAX_CALL_BYTES = 1024 * 1024

log = get_logger()
_SCRIPT = Script("embedstream.producer", "enqueue.lua")


@dataclass(slots=True)
class _Group:
    """Jobs of one request that travel in one call."""

    request: PendingRequest
    jobs: list[SentJob]
    ask: bool  # for admission: only the first call of a request does
    args: list[Arg] = field(default_factory=list)


class Writer:
    """Sends jobs to the lanes. What becomes of each call is told to the requests in it.

    Args:
        redis: client for short commands.
        keys: of the model.
        reply_stream: where consumers send the answers.
        max_lane_jobs: refuse requests when a lane is this long.
        lost_contact: set when the outcome of a call is unknown, for the reconciler.
    """

    def __init__(
        self, redis: Redis, keys: Keys, reply_stream: str, max_lane_jobs: int, lost_contact: asyncio.Event
    ) -> None:
        self._redis = redis
        self._lanes = [keys.lane(lane) for lane in LANES]
        self._reply_stream = reply_stream
        self._max_lane_jobs = max_lane_jobs
        self._waiting: deque[_Group] = deque()
        self._work = asyncio.Event()
        self._lost_contact = lost_contact

    def send(self, request: PendingRequest, jobs: list[SentJob], *, ask: bool = True) -> None:
        """Queue jobs for the next calls; with `ask` the first of them asks for admission of the whole request."""
        group = _Group(request, [], ask)
        size = 0
        for sent in jobs:
            header, body = sent.job.encode()
            if group.jobs and (len(group.jobs) == MAX_CALL_JOBS or size + len(header) + len(body) > MAX_CALL_BYTES):
                self._waiting.append(group)
                group, size = _Group(request, [], ask=False), 0
            group.jobs.append(sent)
            sent.queued = True
            group.args += (header, body)
            size += len(header) + len(body)
        self._waiting.append(group)
        self._work.set()

    def wake(self) -> None:
        """Let `run` look whether it is to stop."""
        self._work.set()

    async def run(self, stopping: asyncio.Event) -> None:
        """Send what is queued, until `stopping` is set."""
        while not stopping.is_set():
            await self._work.wait()
            groups = self._next_call()
            if not self._waiting:
                self._work.clear()
            if groups:
                await self._call(groups)

    def _next_call(self) -> list[_Group]:
        groups: list[_Group] = []
        n_jobs = size = 0
        while self._waiting:
            group = self._waiting[0]
            n_jobs += len(group.jobs)
            size += sum(len(arg) for arg in group.args if isinstance(arg, bytes))
            if groups and (n_jobs > MAX_CALL_JOBS or size > MAX_CALL_BYTES):
                break
            self._waiting.popleft()
            if not group.request.done:  # refused, or given up, while it waited here
                groups.append(group)
        return groups

    async def _call(self, groups: list[_Group]) -> None:
        args: list[Arg] = [self._reply_stream, self._max_lane_jobs]
        for group in groups:
            lane = LANES.index(group.jobs[0].job.lane)
            args += (lane + 1, int(group.ask), len(group.jobs), *group.args)
        try:
            outcomes = await _SCRIPT.run(self._redis, self._lanes, args)
        except OutOfMemoryError:
            # Refused before the script began: nothing was stored. What was accepted earlier is left to reconciling.
            for group in groups:
                if not group.request.accepted:
                    group.request.fail(Unavailable("The queue's Redis is out of memory.", retry_after_s=2.0))
        except (RedisError, OSError) as error:
            if is_transient(error):
                # The jobs may or may not be stored. Reconciling finds out; asking again here could store them twice.
                log.warning("enqueue.unknown", error=repr(error), requests=len(groups))
                await after_failure(self._redis, error)
                self._lost_contact.set()
                return
            log.error("enqueue.refused", error=repr(error), requests=len(groups))
            for group in groups:
                group.request.fail(Unavailable(f"Redis refused the jobs: {error}"))
        else:
            for group, outcome in zip(groups, outcomes, strict=True):
                self._settle(group, outcome)
        finally:
            for group in groups:
                for sent in group.jobs:
                    sent.queued = False

    @staticmethod
    def _settle(group: _Group, outcome: list[bytes] | int) -> None:
        if isinstance(outcome, int):
            group.request.fail(
                Overloaded(f"The {group.jobs[0].job.lane} lane holds {outcome} jobs, its limit.", retry_after_s=1.0)
            )
            return
        group.request.accepted = True
        for sent, entry_id in zip(group.jobs, outcome, strict=True):
            sent.entry_id = entry_id
