"""A request under way: which jobs are out, which parts have come, and who waits for them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from embedstream.shared import metrics
from embedstream.shared.connections import pause
from embedstream.shared.errors import EmbedstreamError, ResultTimeout
from embedstream.shared.jobs import Job
from embedstream.shared.logs import get_logger
from embedstream.shared.results import ResultPart, is_one_answer

from .held import Held

log = get_logger()


class JobParts:
    """The parts of one job's answer, held until they are complete.

    A job that two consumers took may have two answers that differ: one found it expired, or serves another revision.
    Their parts are kept apart, and the first answer that is whole is the answer.
    """

    __slots__ = ("_answers", "done", "mixed")

    def __init__(self) -> None:
        self._answers: dict[tuple[int, bytes], dict[int, ResultPart]] = {}
        self.done = False
        self.mixed = False
        """Whether parts that had come were dropped, for they were no one answer."""

    def add(self, part: ResultPart) -> list[ResultPart] | None:
        """Take in a part.

        Returns:
            All parts in order when this one completes them, an empty list when others are missing, and None for a
            part that came before or comes too late.
        """
        if self.done:
            return None
        answer = self._answers.setdefault((part.n_parts, part.fingerprint), {})
        if part.part in answer:
            answer[part.part] = part  # most likely the same; else the newer one has the better chance of being followed
            return None
        answer[part.part] = part
        if len(answer) < part.n_parts:
            return []
        whole = [answer[number] for number in range(part.n_parts)]
        if not is_one_answer(whole):
            # Of two answers that were cut at different rows. Nobody can tell whose the parts are: all come anew.
            log.warning("pending.mixed_answers", request=part.request_id.hex(), job=part.job, parts=part.n_parts)
            del self._answers[part.n_parts, part.fingerprint]
            self.mixed = True
            return []
        self.done = True
        self._answers = {}
        return whole


@dataclass(slots=True)
class SentJob:
    """One job of a pending request.

    Args:
        job: as it was sent last.
        entry_id: its place on the lane; None while nobody knows whether it got there.
        queued: whether it still waits for its call, or for the outcome of one.
        parts: what has come of its answer.
    """

    job: Job
    entry_id: bytes | None = None
    queued: bool = False
    parts: JobParts = field(default_factory=JobParts)

    @property
    def done(self) -> bool:
        """Whether its answer is complete."""
        return self.parts.done


class PendingRequest:
    """Collects the parts of one request and hands them on, job by job, in the order they are complete.

    All methods run on the event loop. A part that comes twice is counted and ignored.
    """

    def __init__(self, request_id: bytes, jobs: list[Job], started_s: float, deadline_s: float) -> None:
        self.request_id = request_id
        self.jobs = [SentJob(job) for job in jobs]
        self.started_s = started_s
        self.deadline_s = deadline_s
        self.next_check_s = 0.0
        self._accepted = False
        self._left = len(jobs)
        self._parts: deque[ResultPart] = deque()
        self.held = Held()
        """What has come and waits for its reader."""
        self._error: EmbedstreamError | None = None
        self._news = asyncio.Event()

    @property
    def done(self) -> bool:
        """Whether nothing more is to come."""
        return self._left == 0 or self._error is not None

    @property
    def error(self) -> EmbedstreamError | None:
        """Why it failed, if it did."""
        return self._error

    @property
    def accepted(self) -> bool:
        """Whether Redis has taken the first of its jobs, and with it all of them."""
        return self._accepted

    @accepted.setter
    def accepted(self, accepted: bool) -> None:
        self._accepted = accepted
        self._news.set()  # whoever submits waits for the confirmation, not for parts

    def outstanding(self) -> list[SentJob]:
        """Jobs whose answer is not complete."""
        return [sent for sent in self.jobs if not sent.done]

    def add(self, part: ResultPart) -> None:
        """Take in a part, unless it came before or belongs to no job of this request."""
        if part.job >= len(self.jobs) or part.n_jobs != len(self.jobs):
            return
        complete = None if self.done else self.jobs[part.job].parts.add(part)
        if complete is None:
            metrics.DUPLICATES.inc()
        elif complete:
            self._left -= 1
            self._parts.extend(complete)
            self.held.change(sum(part.vectors.nbytes for part in complete))
            self._news.set()

    def time_left_s(self) -> float:
        """Seconds until the deadline, on the event loop's clock."""
        return self.deadline_s - asyncio.get_running_loop().time()

    def fail(self, error: EmbedstreamError) -> None:
        """End the request; its parts that have come are still handed out first."""
        if not self.done:
            self._error = error
            self._news.set()

    async def wait_for_news(self, timeout_s: float) -> None:
        """Wait until something was accepted, has come or has failed, but not longer than `timeout_s`."""
        self._news.clear()
        if not self.done:
            await pause(timeout_s, self._news)

    async def parts(self) -> AsyncGenerator[ResultPart, None]:
        """The parts as they come, until the last.

        Raises:
            ResultTimeout: the deadline passed first.
            EmbedstreamError: the request failed.
        """
        loop = asyncio.get_running_loop()
        while True:
            while self._parts:
                part = self._parts.popleft()
                self.held.change(-part.vectors.nbytes)
                yield part
            if self._error is not None:
                raise self._error
            if self._left == 0:
                return
            self._news.clear()
            try:
                async with asyncio.timeout_at(self.deadline_s):
                    await self._news.wait()
            except TimeoutError:
                waited = loop.time() - self.started_s
                missing = f"{self._left} of {len(self.jobs)} jobs have no result"
                raise ResultTimeout(f"No complete result within {waited:.1f} s: {missing}.") from None
