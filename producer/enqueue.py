"""The coalescing writer: all requests of a moment in one script call.

Against one awaited XADD a job this costs about a sixth of the client's CPU and a third of Redis's, admission
included. There is no timer: while one call is under way, the next one fills.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from embedstream.shared.connections import Arg, Script, after_failure, is_out_of_memory, is_transient
from embedstream.shared.errors import Unavailable
from embedstream.shared.keys import Keys
from embedstream.shared.lanes import LANES
from embedstream.shared.logs import get_logger, told

from .admission import Admission, Refusal, Terms, Verdict, tokens_of
from .pending import PendingRequest, SentJob

MAX_CALL_JOBS = 256
MAX_CALL_BYTES = 1024 * 1024
RETRY_S = 1.0
"""An accepted request whose jobs do not fit into Redis's memory is tried again after this time."""

log = get_logger()
_SCRIPT = Script("embedstream.producer", "enqueue.lua")


@dataclass(slots=True)
class _Group:
    """Jobs of one request that travel in one call.

    Args:
        request: whose jobs they are.
        ask: for admission: only the first call of a request does.
        first: the call that reserves tokens and bytes for these jobs too, should it succeed.
        jobs: in their order.
        args: header and body of each.
        tokens, size_bytes: to reserve: of these jobs; with `ask`, of the whole request.
        call_bytes: of its own headers and bodies.
        terms: what it is admitted by.
        stored: whether Redis has confirmed it.
    """

    request: PendingRequest
    ask: bool
    first: _Group | None = None
    jobs: list[SentJob] = field(default_factory=list)
    args: list[Arg] = field(default_factory=list)
    tokens: int = 0
    size_bytes: int = 0
    call_bytes: int = 0
    terms: Terms | None = None
    stored: bool = False

    def fits(self, size_bytes: int) -> bool:
        """Whether a job of this size may join."""
        return not self.jobs or (len(self.jobs) < MAX_CALL_JOBS and self.call_bytes + size_bytes <= MAX_CALL_BYTES)

    def add(self, sent: SentJob, header: bytes, body: bytes) -> None:
        """Take in a job."""
        self.jobs.append(sent)
        self.args += (header, body)
        self.tokens += tokens_of(sent.job)
        self.size_bytes += len(header) + len(body)
        self.call_bytes += len(header) + len(body)
        sent.queued = True


class Writer:
    """Sends jobs to the lanes. What becomes of each call is told to the requests in it.

    It holds back until `open` is called: consumers write only to reply streams that exist.

    Args:
        redis: client for short commands.
        keys: of the model.
        reply_stream: where consumers send the answers.
        admission: the terms requests are admitted by.
        lost_contact: set when the outcome of a call is unknown, for the reconciler.
    """

    def __init__(
        self, redis: Redis, keys: Keys, reply_stream: str, admission: Admission, lost_contact: asyncio.Event
    ) -> None:
        self._redis = redis
        self._keys = [*(keys.lane(lane) for lane in LANES), keys.totals]
        self._reply_stream = reply_stream
        self._admission = admission
        self._waiting: deque[_Group] = deque()
        self._work = asyncio.Event()
        self._is_open = False
        self._lost_contact = lost_contact
        self.answered_s = float("-inf")
        """When the last call began that Redis has answered, on the event loop's clock."""

    def send(self, request: PendingRequest, jobs: Sequence[SentJob], *, ask: bool = True) -> None:
        """Queue jobs for the next calls; with `ask` the first of them asks for admission of the whole request."""
        groups = [_Group(request, ask)]
        for sent in jobs:
            header, body = sent.job.encode()
            if not groups[-1].fits(len(header) + len(body)):
                groups.append(_Group(request, ask=False, first=groups[0] if ask else None))
            groups[-1].add(sent, header, body)
        if ask:
            groups[0].tokens = sum(group.tokens for group in groups)
            groups[0].size_bytes = sum(group.size_bytes for group in groups)
        self._waiting += groups
        self._work.set()

    def open(self) -> None:
        """Begin to send: the reply stream is there."""
        if not self._is_open:
            self._is_open = True
            self._work.set()

    def wake(self) -> None:
        """Let `run` look whether it is to stop."""
        self._work.set()

    async def run(self, stopping: asyncio.Event) -> None:
        """Send what is queued, until `stopping` is set."""
        while not stopping.is_set():
            await self._work.wait()
            groups = self._next_call() if self._is_open else []
            if not self._waiting or not self._is_open:
                self._work.clear()
            if groups:
                await self._call(groups)

    def _next_call(self) -> list[_Group]:
        groups: list[_Group] = []
        n_jobs = size_bytes = 0
        while self._waiting:
            group = self._waiting[0]
            if not group.request.done:  # neither refused, nor given up while it waited here
                n_jobs += len(group.jobs)
                size_bytes += group.call_bytes
                if groups and (n_jobs > MAX_CALL_JOBS or size_bytes > MAX_CALL_BYTES):
                    break
                groups.append(group)
            self._waiting.popleft()
        return groups

    async def _call(self, groups: list[_Group]) -> None:
        try:
            args: list[Arg] = [self._reply_stream, *self._admission.script_args()]
            for group in groups:
                args += self._head(group)
                args += group.args
            asked_s = asyncio.get_running_loop().time()
            outcomes = await _SCRIPT.run(self._redis, self._keys, args)
            self.answered_s = asked_s
            for group, outcome in zip(groups, outcomes, strict=True):
                self._settle(group, outcome)
        except (RedisError, OSError) as error:
            await self._failed(groups, error)
        except Exception as error:  # a defect; it must not end the sending of all others
            log.exception("enqueue.failed")
            for group in groups:
                group.request.fail(Unavailable(f"The request could not be sent: {type(error).__name__}."))
        finally:
            for group in groups:
                for sent in group.jobs:
                    sent.queued = False

    def _head(self, group: _Group) -> list[Arg]:
        """What the script is told of a group before its jobs."""
        request, lane = group.request, group.jobs[0].job.lane
        group.terms = terms = self._admission.terms(lane, request.time_left_s())
        reserved = group.first is not None and group.first.stored  # if not, nobody knows whether it came to that
        return [
            LANES.index(lane) + 1,
            int(group.ask),
            terms.most_tokens,
            terms.most_bytes,
            0 if reserved else group.tokens,
            0 if reserved else group.size_bytes,
            len(group.jobs),
        ]

    async def _failed(self, groups: list[_Group], error: Exception) -> None:
        if is_out_of_memory(error):
            # Refused before the script wrote anything. What was accepted earlier is left to reconciling.
            now = asyncio.get_running_loop().time()
            for group in groups:
                if group.request.accepted:
                    group.request.next_check_s = now + RETRY_S
                else:
                    group.request.fail(Unavailable("The queue's Redis is out of memory.", retry_after_s=2.0))
        elif is_transient(error):
            # The jobs may or may not be stored. Reconciling finds out; asking again here could store them twice.
            log.warning("enqueue.unknown", error=told(error), requests=len(groups))
            self._lost_contact.set()
            await after_failure(self._redis, error)
        else:
            log.error("enqueue.refused", error=told(error), requests=len(groups))
            for group in groups:
                group.request.fail(Unavailable(f"Redis refused the jobs: {error}"))

    @staticmethod
    def _settle(group: _Group, outcome: list[Any]) -> None:
        refused, tokens_ahead, lane_bytes, entry_ids = outcome
        if refused and group.terms is not None:
            verdict = Verdict(Refusal(refused), tokens_ahead, lane_bytes)
            group.request.fail(group.terms.overloaded(verdict, group.size_bytes))
            return
        group.stored = group.request.accepted = True
        for sent, entry_id in zip(group.jobs, entry_ids, strict=True):
            sent.entry_id = entry_id
