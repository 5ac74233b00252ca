"""The publisher: reply, acknowledge, delete, in one transaction.

All parts of an answer but the last are plain additions, which callers recognise when they come twice. The transaction
then holds the last part, the acknowledgement and the deletion: a job is either on its lane or answered, never neither.
It is repeated until Redis confirms it; a repetition changes nothing. A reply that Redis refuses for good, because the
caller's key is no stream, is given up with a log line: it must not hold back the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import RedisError

from embedstream.shared import metrics
from embedstream.shared.connections import after_failure, backoff_s, is_transient
from embedstream.shared.keys import FIELD_PARTS, GROUP, Keys
from embedstream.shared.lanes import LANES
from embedstream.shared.logs import get_logger, told
from embedstream.shared.results import MAX_PART_BYTES, ResultPart, Status, frame, split

from .entries import Entry, RawEntry
from .intake import Refused

MAX_TRANSACTION_JOBS = 256
MAX_WRITE_BYTES = 8 * 1024 * 1024
MOST_WAITING_BYTES = 64 * 1024 * 1024
ANSWER_BYTES = 1024
"""What an answer weighs beside its parts."""

log = get_logger()


@dataclass(slots=True)
class Answer:
    """A job that leaves its lane, with what its caller is told.

    Args:
        raw: the stream entry.
        reply_to: the caller's reply stream, or "".
        parts: encoded parts, in order.
        numbers: `<job>:<part>` of each part.
        request_id: of the job.
        result_ttl_s: seconds to keep the parts under the result key; 0 for not at all.
        dead_letter: why the entry is kept as a dead letter, or "".
        dead_row: place in the request of the input that was given up alone, or None for the whole job.
        sent: parts that Redis has confirmed.
    """

    raw: RawEntry
    reply_to: str
    parts: tuple[bytes, ...]
    numbers: tuple[str, ...]
    request_id: bytes
    result_ttl_s: int = 0
    dead_letter: str = ""
    dead_row: int | None = None
    sent: int = 0

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(map(len, self.parts))


def answer_of(entry: Entry, fingerprint: bytes) -> Answer:
    """The answer to a finished entry."""
    whole = entry.result(fingerprint)
    return _answer(entry.raw, entry.reply_to, whole, entry.job.result_ttl_s, entry.dead_letter, entry.dead_row)


def answer_to_refused(refused: Refused) -> Answer:
    """The answer to an entry that was not computed."""
    reason = refused.reason if refused.dead_letter else ""
    return _answer(refused.raw, refused.reply_to, refused.answer, refused.result_ttl_s, reason)


def _answer(
    raw: RawEntry,
    reply_to: str,
    whole: ResultPart | None,
    result_ttl_s: int,
    dead_letter: str,
    dead_row: int | None = None,
) -> Answer:
    parts = split(whole) if whole is not None else []
    worst = Status(int(whole.rows["status"].max())) if whole is not None else Status.INVALID_INPUT
    metrics.JOBS.labels(raw.lane.value, worst.name.lower()).inc()
    return Answer(
        raw,
        reply_to if parts else "",
        tuple(part.encode() for part in parts),
        tuple(f"{part.job}:{part.part}" for part in parts),
        whole.request_id if whole is not None else b"",
        result_ttl_s,
        dead_letter,
        dead_row,
    )


@dataclass(frozen=True, slots=True)
class DeadLetterBounds:
    """How many dead letters are kept, and for how long."""

    most: int = 100_000
    ttl_s: int = 7 * 86_400


class Publisher:
    """Sends answers, coalescing all that are ready into few transactions.

    Args:
        redis: client for short commands.
        keys: of the model.
        confirmed: called with the entries that have left their lane.
        bounds: of the dead letters.
        most_waiting_bytes: answers that may wait here before `put` makes its caller wait.
    """

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        confirmed: Callable[[list[RawEntry]], None] = lambda _: None,
        bounds: DeadLetterBounds | None = None,
        most_waiting_bytes: int = MOST_WAITING_BYTES,
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._confirmed = confirmed
        self._bounds = bounds or DeadLetterBounds()
        self._most_waiting_bytes = most_waiting_bytes
        self._queue: asyncio.Queue[Answer] = asyncio.Queue()
        self._waiting_bytes = 0
        self._room = asyncio.Event()

    async def put(self, answer: Answer) -> None:
        """Hand over an answer; waits while too much is undelivered."""
        while self._waiting_bytes > self._most_waiting_bytes:
            self._room.clear()
            await self._room.wait()
        self._waiting_bytes += answer.size + ANSWER_BYTES
        self._queue.put_nowait(answer)

    async def flush(self) -> None:
        """Wait until everything handed over is confirmed by Redis."""
        await self._queue.join()

    async def run(self) -> None:
        """Publish for ever."""
        while True:
            answers = [await self._queue.get()]
            size = answers[0].size
            while len(answers) < MAX_TRANSACTION_JOBS and size < MAX_PART_BYTES and not self._queue.empty():
                answers.append(self._queue.get_nowait())
                size += answers[-1].size
            reasons = [answer.dead_letter for answer in answers]
            await self._until_confirmed(answers)
            self._confirmed([answer.raw for answer in answers])
            _note_dead_letters(answers, reasons)
            for answer in answers:
                self._waiting_bytes -= answer.size + ANSWER_BYTES
                self._queue.task_done()
            self._room.set()

    async def _until_confirmed(self, answers: list[Answer]) -> None:
        unsure = False
        for pause_s in backoff_s():
            try:
                if unsure:
                    await self._forget_kept(answers)
                await self._publish(answers)
            except (RedisError, OSError) as error:
                # The answers are held until Redis takes them; their leases stay ours meanwhile.
                log.warning("publisher.failed", error=told(error), jobs=len(answers))
                unsure = True
                await after_failure(self._redis, error)
                await asyncio.sleep(pause_s)
            else:
                return

    async def _forget_kept(self, answers: list[Answer]) -> None:
        """Of a transaction that was carried out though its reply was lost, write no dead letter a second time."""
        for answer in answers:
            if answer.dead_letter:
                lane, entry_id = self._keys.lane(answer.raw.lane), answer.raw.entry_id.decode()
                if not await self._redis.xrange(lane, entry_id, entry_id):
                    answer.dead_letter = ""

    async def _publish(self, answers: list[Answer]) -> None:
        for answer in answers:
            while answer.sent < len(answer.parts) - 1:
                await self._send_parts(answer)
        async with self._redis.pipeline(transaction=True) as pipe:
            for reply_to, parts in _last_parts(answers):
                for piece in _within(parts, MAX_PART_BYTES):
                    pipe.xadd(reply_to, {FIELD_PARTS: frame(piece)}, nomkstream=True)
            for answer in answers:
                if answer.parts:
                    self._store(pipe, answer, answer.numbers[-1], answer.parts[-1])
                if answer.dead_letter:
                    self._keep(pipe, answer)
            for lane in LANES:
                ids = [answer.raw.entry_id for answer in answers if answer.raw.lane is lane]
                if ids:
                    pipe.xack(self._keys.lane(lane), GROUP, *ids)
                    pipe.xdel(self._keys.lane(lane), *ids)
            suspects: list[Any] = [answer.raw.entry_id for answer in answers if answer.raw.deaths]
            if suspects:
                pipe.hdel(self._keys.trials, *suspects)
            # Refused as a whole (out of memory, read-only) it raises, and nothing of it was done.
            _check(await pipe.execute(raise_on_error=False))

    async def _send_parts(self, answer: Answer) -> None:
        """The next parts of an answer, but not its last: so many as one write takes well within its timeout."""
        waiting = list(zip(answer.numbers, answer.parts, strict=True))[answer.sent : -1]
        some = next(_within([part for _, part in waiting], MAX_WRITE_BYTES))
        async with self._redis.pipeline(transaction=False) as pipe:
            for number, part in waiting[: len(some)]:
                self._store(pipe, answer, number, part)
                if answer.reply_to:
                    pipe.xadd(answer.reply_to, {FIELD_PARTS: frame([part])}, nomkstream=True)
            _check(await pipe.execute(raise_on_error=False) if len(pipe) else [])
        answer.sent += len(some)

    def _store(self, pipe: Pipeline, answer: Answer, number: str, part: bytes) -> None:
        if answer.result_ttl_s:
            key = self._keys.result(answer.request_id)
            pipe.hset(key, number, part)
            pipe.expire(key, answer.result_ttl_s)

    def _keep(self, pipe: Pipeline, answer: Answer) -> None:
        fields: dict[Any, Any] = {
            **answer.raw.fields,
            "why": answer.dead_letter,
            "src": answer.raw.entry_id,
            "lane": answer.raw.lane.value,
            "n": answer.raw.deaths,
            **({} if answer.dead_row is None else {"row": answer.dead_row}),
        }
        pipe.xadd(self._keys.dead_letters, fields, maxlen=self._bounds.most)
        # The ids of dead letters are times of Redis's clock, and so is that of the entry: no clock of ours is asked.
        pipe.xtrim(self._keys.dead_letters, minid=str(answer.raw.enqueued_ms - self._bounds.ttl_s * 1000))


def _note_dead_letters(answers: list[Answer], reasons: list[str]) -> None:
    for answer, reason in zip(answers, reasons, strict=True):
        if reason:
            log.error("publisher.dead_letter", entry=answer.raw.entry_id.decode(), reason=reason)
            metrics.DEAD_LETTERS.labels("killed_consumers" if answer.raw.deaths else "malformed").inc()


def _check(outcomes: list[Any]) -> None:
    """Raise what is worth another try; log what never will be, and let it go."""
    errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    for error in errors:
        if is_transient(error):
            raise error
    for error in errors:
        log.error("publisher.reply_refused", error=told(error))


def _last_parts(answers: Iterable[Answer]) -> Iterator[tuple[str, list[bytes]]]:
    """For each reply stream the last parts of its answers: one caller's results travel in one entry."""
    streams: dict[str, list[bytes]] = {}
    for answer in answers:
        if answer.reply_to:
            streams.setdefault(answer.reply_to, []).append(answer.parts[-1])
    yield from streams.items()


def _within(parts: list[bytes], most_bytes: int) -> Iterator[list[bytes]]:
    """Groups of parts of at most so many bytes; a larger part is a group alone."""
    group: list[bytes] = []
    size = 0
    for part in parts:
        if group and size + len(part) > most_bytes:
            yield group
            group, size = [], 0
        group.append(part)
        size += len(part)
    if group:
        yield group
