"""Admission: whether a request may join its lane, and when a refused one should come back.

A request is judged by the work ahead of it, never by itself, against two limits: the wait that work means, and the
bytes on its lane. `enqueue.lua` decides, for only there nobody else can add at the same moment; what it is to decide
by is put together here. All of this is arithmetic on what the fleet's polling has seen.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum

from embedstream.shared import metrics
from embedstream.shared.errors import Overloaded
from embedstream.shared.jobs import Job
from embedstream.shared.lanes import LANES, Lane
from embedstream.shared.options import VectorOptions

from .backlog import GUESSED_JOB_BYTES, GUESSED_JOB_TOKENS, LaneBacklog, Totals
from .request import BYTES_A_TOKEN

DEADLINE_SHARE = 0.8
"""Part of the time to a request's deadline that it may wait; the rest is for computing it."""
MEMORY_SHARES: Mapping[Lane, float] = {Lane.INTERACTIVE: 0.2, Lane.BULK: 0.3}
"""Of the server's maxmemory: what the jobs of a lane may take. The other half is for results and overhead."""
UNBOUNDED_LANE_BYTES = 256 * 1024 * 1024
"""Of a lane on a server without maxmemory."""
ASSUMED_DIMENSION = 1024
"""Components of a vector, while no consumer has told: as many as common large models have."""
JITTER = 0.1
"""Refused clients come back spread by so much to either side, not all at once."""
MIN_RETRY_S = 1.0

ANY = -1
"""No limit to the tokens ahead: nobody knows yet how fast the fleet is."""


class Refusal(IntEnum):
    """Why a request was refused; the value is that of `enqueue.lua`."""

    NO = 0
    WAIT = 1
    BYTES = 2


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the script said of one request.

    Args:
        refusal: why it was refused, or that it was not.
        tokens_ahead: work that goes before it.
        lane_bytes: on its lane before it.
    """

    refusal: Refusal
    tokens_ahead: int
    lane_bytes: int


@dataclass(frozen=True, slots=True)
class Terms:
    """What one request is admitted by.

    Args:
        lane: of the request.
        tokens_per_s: what its lane gets of the fleet; 0 while nothing is known.
        max_wait_s: the operator's limit.
        time_left_s: to the request's deadline.
        most_bytes: of jobs on the lane, this request's included.
    """

    lane: Lane
    tokens_per_s: float
    max_wait_s: float
    time_left_s: float
    most_bytes: int

    @property
    def target_s(self) -> float:
        """The longest wait that is accepted."""
        return min(self.max_wait_s, DEADLINE_SHARE * max(0.0, self.time_left_s))

    @property
    def most_tokens(self) -> int:
        """The most work that may stand ahead of the request, or `ANY`."""
        return int(self.target_s * self.tokens_per_s) if self.tokens_per_s > 0 else ANY

    def overloaded(self, verdict: Verdict, request_bytes: int) -> Overloaded:
        """The error for a request that was refused."""
        wait_s = verdict.tokens_ahead / self.tokens_per_s if self.tokens_per_s > 0 else 0.0
        if verdict.refusal is Refusal.BYTES:
            excess = verdict.lane_bytes + request_bytes - self.most_bytes
            part = min(1.0, excess / max(1, verdict.lane_bytes))
            return Overloaded(
                f"The {self.lane} lane holds {verdict.lane_bytes:,} bytes of jobs; with the {request_bytes:,} of this "
                f"request it would exceed its limit of {self.most_bytes:,} bytes (--max-lane-bytes).",
                retry_after_s=max(MIN_RETRY_S, _spread(part * wait_s)),
            )
        if self.target_s < self.max_wait_s:
            limit = f"{DEADLINE_SHARE:.0%} of the {self.time_left_s:.1f} s to the request's deadline"
        else:
            limit = "--max-wait-s"
        # Not the wait less the target: under a flood the lane stands at the target, and all would come back at once.
        return Overloaded(
            f"The {self.lane} lane holds about {wait_s:.1f} s of work, more than {self.target_s:.1f} s ({limit}).",
            retry_after_s=_spread(wait_s),
        )


def _spread(seconds: float) -> float:
    return seconds * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 - spreads clients, guards nothing


def tokens_of(job: Job) -> int:
    """What a job will cost to compute; guessed from its bytes while it is text."""
    return job.n_tokens if job.ids is not None else -(-int(job.lengths.sum()) // BYTES_A_TOKEN)


class Admission:
    """What is known of a model's lanes, and the terms that follow from it.

    Args:
        max_wait_s: longest predicted wait that is accepted.
        max_lane_bytes: most bytes of jobs on one lane; 0 derives it from the server's memory.
        bulk_share: part of the fleet's tokens that bulk work gets however much interactive work waits.
    """

    def __init__(self, max_wait_s: float, max_lane_bytes: int, bulk_share: float = 0.1) -> None:
        self._bulk_share = bulk_share
        self._max_wait_s = max_wait_s
        self._max_lane_bytes = max_lane_bytes
        self._lanes = {lane: LaneBacklog() for lane in LANES}
        self.tokens_per_s = 0.0
        """What the live consumers compute together; 0 while nothing is known."""
        self.maxmemory_bytes = 0
        """The server's limit; 0 for none."""

    def observe(self, waiting: Sequence[int], sums: Sequence[bytes | None]) -> bool:
        """Take in a sample of the lanes.

        Args:
            waiting: (lanes,) length of each lane.
            sums: (3 x lanes,) the fields of the totals, as `TOTALS_FIELDS` names them.

        Returns:
            Whether the totals went back: the server has lost them, and perhaps everything.
        """
        lost = False
        for place, (lane, backlog) in enumerate(self._lanes.items()):
            jobs, tokens, size_bytes = (_count(value) for value in sums[3 * place : 3 * place + 3])
            lost |= backlog.observe(waiting[place], Totals(jobs, tokens, size_bytes))
            metrics.LANE_JOBS.labels(lane).set(waiting[place])
            metrics.LANE_BYTES.labels(lane).set(backlog.on_lane().size_bytes)
        for lane in LANES:
            metrics.PREDICTED_WAIT_SECONDS.labels(lane).set(self.wait_s(lane))
        return lost

    def script_args(self) -> list[int | float]:
        """What `enqueue.lua` reckons the work ahead by."""
        bases = [self._lanes[lane].base for lane in LANES]
        left = [value for base in bases for value in (base.jobs, base.tokens, base.size_bytes)]
        return [1 / self._bulk_share, GUESSED_JOB_TOKENS, GUESSED_JOB_BYTES, *left]

    def terms(self, lane: Lane, time_left_s: float) -> Terms:
        """What a request that is sent now is admitted by."""
        return Terms(lane, self._rate(lane), self._max_wait_s, time_left_s, self.lane_limit_bytes(lane))

    def wait_s(self, lane: Lane) -> float:
        """Predicted wait of a request that comes now; 0 while nothing is known of the fleet's speed."""
        rate = self._rate(lane)
        if rate <= 0:
            return 0.0
        own = self._lanes[lane].on_lane().tokens
        if lane is Lane.BULK:
            own = min(own + self._lanes[Lane.INTERACTIVE].on_lane().tokens, int(own / self._bulk_share))
        return own / rate

    def lane_limit_bytes(self, lane: Lane) -> int:
        """Most bytes of jobs on a lane."""
        if self._max_lane_bytes:
            return self._max_lane_bytes
        return int(MEMORY_SHARES[lane] * self.maxmemory_bytes) or UNBOUNDED_LANE_BYTES

    def _rate(self, lane: Lane) -> float:
        """Tokens a second for the work ahead of a request: bulk work that waits takes its share of them."""
        yields = lane is Lane.INTERACTIVE and self._lanes[Lane.BULK].waiting > 0
        return self.tokens_per_s * (1 - self._bulk_share if yields else 1)


TOTALS_FIELDS = tuple(f"{lane.value[0]}:{what}" for lane in LANES for what in ("jobs", "tokens", "bytes"))
"""The fields of `Keys.totals`."""


def _count(value: bytes | None) -> int:
    return int(value) if value is not None and value.isdigit() else 0


class Undelivered:
    """Bounds the bytes of results that one process has asked for and not yet got.

    Consumers write results to Redis whether or not they are read there, so a process that stalls could fill it.

    Args:
        limit_bytes: most bytes of results under way; a single request may exceed it when nothing else is.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._bytes = 0

    @contextmanager
    def expecting(self, result_bytes: int) -> Iterator[None]:
        """Hold room for the results of a request while it is under way.

        Raises:
            Overloaded: there is none.
        """
        if self._bytes and self._bytes + result_bytes > self._limit_bytes:
            raise Overloaded(
                f"This process waits for {self._bytes:,} bytes of results; with the {result_bytes:,} of this request "
                f"it would exceed its limit of {self._limit_bytes:,} bytes (--max-undelivered-bytes).",
                retry_after_s=_spread(MIN_RETRY_S),
            )
        self._bytes += result_bytes
        metrics.UNDELIVERED_BYTES.inc(result_bytes)
        try:
            yield
        finally:
            self._bytes -= result_bytes
            metrics.UNDELIVERED_BYTES.dec(result_bytes)


def result_bytes(options: VectorOptions, n_inputs: int, n_tokens: int, dimension: int) -> int:
    """Bytes of the vectors a request will bring.

    Args:
        options: size and number format asked for.
        n_inputs: of the request.
        n_tokens: of the request; counts when each token gets a vector.
        dimension: components of the model's full vector.
    """
    rows = n_tokens if options.per_token else n_inputs
    return rows * (options.dimensions or dimension) * options.dtype.numpy.itemsize
