"""Suspects: entries that a consumer had in hand when it died. One of them may have killed it.

A death proves nothing about a job, and a delivery even less. So suspects are not given up, they are run apart: first
in small groups, then alone, row by row, each attempt booked in Redis before it begins. What is on the device at death
after death is the culprit; its neighbours have their vectors by then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from embedstream.shared import metrics
from embedstream.shared.keys import Keys
from embedstream.shared.logs import get_logger, told
from embedstream.shared.results import Status

from .entries import Entry, RawEntry
from .intake import Intake, Refused
from .leases import Leases

GROUP_SIZE = 8
"""Jobs that run together after their first death: small enough that few are alone after a second one."""
GROUPS = 16
"""Of more suspects than so many groups hold, the groups are larger: a device with thousands of small jobs in hand has
died, and its callers shall not wait for thousands of passes."""
MOST_WAITING = 1024
"""Suspects that one consumer takes over at a time: others may be there to run the rest."""
TRIALS_TTL_S = 86_400

log = get_logger()

Finish = Callable[[Entry | Refused], Awaitable[None]]
"""Takes what needs no device: an entry all of whose rows have failed, or one that is refused."""


@dataclass(slots=True)
class SuspectTrial:
    """One attempt at some suspects; see `device_thread.Trial`."""

    suspects: Suspects
    raws: list[RawEntry]
    alone: bool
    suspected_row: int | None = None
    begun: bool = False
    _rows_before: list[int] = field(default_factory=list)

    async def begin(self) -> list[Entry]:
        """Book the attempt, then look into the jobs: even that may have killed."""
        return await self.suspects.begin(self)

    async def mark(self, row: int) -> None:
        """Note which row runs next."""
        await self.suspects.mark(self.raws[0], [*self._rows_before, row])

    def remember(self, rows: Sequence[int]) -> None:
        """Take over what earlier attempts noted."""
        self._rows_before = list(rows)
        self.suspected_row = rows[-1] if rows else None


class Suspects:
    """The suspects of one consumer, one trial at a time.

    Args:
        redis: client for short commands.
        keys: of the model.
        leases: books attempts.
        intake: looks into jobs.
        now_ms: the time on Redis's clock.
        cancelled: abandoned requests, and when that was said.
        most_deaths: consumers that may die with a job on their device before it is given up.
        finish: takes what needs no device.
        lost: takes entries that are not ours any more.
    """

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        leases: Leases,
        intake: Intake,
        now_ms: Callable[[], float],
        cancelled: Mapping[bytes, int],
        most_deaths: int,
        finish: Finish,
        lost: Callable[[list[RawEntry]], None],
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._leases = leases
        self._intake = intake
        self._now_ms = now_ms
        self._cancelled = cancelled
        self._most_deaths = most_deaths
        self._finish = finish
        self._lost = lost
        self._waiting: deque[RawEntry] = deque()
        self._running: SuspectTrial | None = None

    @property
    def room(self) -> int:
        """How many more may be taken over now."""
        return max(0, MOST_WAITING - len(self._waiting))

    def add(self, raws: Sequence[RawEntry]) -> None:
        """Let entries wait for their trial."""
        self._waiting += raws

    def release(self) -> list[RawEntry]:
        """Remove and return those that wait."""
        released = list(self._waiting)
        self._waiting.clear()
        return released

    def next_trial(self) -> SuspectTrial | None:
        """The next trial, unless one is under way or nothing waits."""
        if self._running is not None or not self._waiting:
            return None
        first = self._waiting.popleft()
        if self._is_for_alone(first):
            self._running = SuspectTrial(self, [first], alone=True)
            return self._running
        raws = [first]
        kept: deque[RawEntry] = deque()
        size = max(GROUP_SIZE, len(self._waiting) // GROUPS)
        while self._waiting and len(raws) < size:
            raw = self._waiting.popleft()
            (kept if self._is_for_alone(raw) else raws).append(raw)
        self._waiting.extendleft(reversed(kept))
        self._running = SuspectTrial(self, raws, alone=False)
        return self._running

    def ended(self, trial: SuspectTrial) -> None:
        """A trial is over. Where Redis could not be asked nothing was run, and the suspects wait again."""
        self._running = None
        if not trial.begun:
            self._waiting.extendleft(reversed(trial.raws))

    async def begin(self, trial: SuspectTrial) -> list[Entry]:
        """Book the attempt and look into the jobs.

        Returns:
            The jobs to run; none when all are settled, or Redis cannot be asked.
        """
        try:
            rows = await self._rows_of(trial.raws[0]) if trial.alone else []
            given_up = trial.alone and trial.raws[0].deaths >= self._most_deaths
            row = _culprit(rows)
            ours = await self._leases.book(trial.raws)
            if given_up and ours and (row is None or ours[0].deaths > self._most_deaths):
                trial.begun = True
                await self._give_up(ours[0])
                return []
        except (RedisError, OSError) as error:
            log.warning("suspects.not_booked", jobs=len(trial.raws), error=told(error))
            return []
        trial.begun = True
        trial.remember(rows)
        self._lost([raw for raw in trial.raws if raw not in ours])
        metrics.SUSPECT_RUNS.labels("alone" if trial.alone else "group").inc(len(ours))
        log.warning("suspects.run_apart", jobs=len(ours), alone=trial.alone, deaths=trial.raws[0].deaths)
        entries = [entry for raw in ours if (entry := await self._entry(raw)) is not None]
        if given_up and row is not None and entries:
            self._give_up_row(entries[0], row)
            if entries[0].done:
                await self._finish(entries[0])
                return []
        return entries

    async def mark(self, raw: RawEntry, rows: list[int]) -> None:
        """Keep the rows that ran in each attempt. Without it a death still counts, it only tells less."""
        try:
            async with self._redis.pipeline(transaction=False) as pipe:
                trials: Any = {raw.entry_id: ",".join(map(str, rows))}
                pipe.hset(self._keys.trials, mapping=trials)
                pipe.expire(self._keys.trials, TRIALS_TTL_S)
                await pipe.execute()
        except (RedisError, OSError) as error:
            log.warning("suspects.not_marked", error=told(error))

    def _is_for_alone(self, raw: RawEntry) -> bool:
        """After a second death; sooner where the limit leaves no room for a group."""
        return raw.deaths >= min(2, self._most_deaths - 1)

    async def _rows_of(self, raw: RawEntry) -> list[int]:
        noted: Any = await self._redis.hget(self._keys.trials, raw.entry_id.decode())
        rows = noted.split(b",") if noted else []
        return [int(row) for row in rows] if all(row.isdigit() for row in rows) else []  # damaged: it tells nothing

    async def _entry(self, raw: RawEntry) -> Entry | None:
        taken = await self._intake.accept(raw, self._now_ms())
        if isinstance(taken, Entry) and taken.is_called_off(self._cancelled):
            taken.cancel()
        if isinstance(taken, Refused) or taken.done:
            await self._finish(taken)
            return None
        return taken

    async def _give_up(self, raw: RawEntry) -> None:
        reason = f"The job was on the device when {raw.deaths} consumers died, the most allowed: it is given up."
        await self._finish(self._intake.give_up(raw, reason))

    @staticmethod
    def _give_up_row(entry: Entry, row: int) -> None:
        """All rows but one have run and harmed nobody: that one alone is given up, the others run once more."""
        reason = f"The input was on the device when {entry.raw.deaths} consumers died: it is given up."
        rows = entry.waiting_rows()
        entry.fail(rows[rows == row], Status.FAILED, reason)
        entry.dead_letter, entry.dead_row = reason, int(entry.places()[row])


def _culprit(rows: list[int]) -> int | None:
    """The row that ran at each death alone, when it was the same one."""
    return rows[0] if len(rows) > 1 and len(set(rows)) == 1 else None
