"""Dead letters in Redis: read page by page without their bodies, put back on their lane, dropped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import redis as redis_sync

from embedstream.producer.admission import tokens_of
from embedstream.shared import jobs
from embedstream.shared.cards import Announcement, ModelEntry
from embedstream.shared.connections import Arg, Script
from embedstream.shared.errors import MalformedJob, MalformedMessage, Unavailable
from embedstream.shared.jobs import Job
from embedstream.shared.keys import FIELD_BODY, FIELD_HEADER, FIELD_JOBS, FIELD_REPLY, FIELD_WAS_CANCELLED, Keys, models
from embedstream.shared.lanes import Lane

PAGE_ENTRIES = 64
"""Entries of one read: with full bodies they take 16 MiB of the server's memory for a moment, none of them ours."""
LONGEST_VALUE_BYTES = 2048
DROP_ENTRIES = 512
"""Entries of one XDEL."""

_PAGE = Script("embedstream.deploy", "dead_letter_page.lua")
_REPLAY = Script("embedstream.deploy", "dead_letter_replay.lua")


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A job given up, without its body. What a damaged one does not tell is None.

    Args:
        id: of the dead letter.
        reason: why it was given up.
        lane: where it came from.
        source: its id on that lane.
        deaths: consumers that died with it.
        row: place in the request of the input under suspicion.
        reply_to: the reply stream of its caller.
        header: as it was sent.
        body_bytes: size of its body.
    """

    id: str
    reason: str
    lane: Lane | None
    source: str
    deaths: int | None
    row: int | None
    reply_to: str
    header: bytes
    body_bytes: int

    @classmethod
    def of(cls, entry_id: bytes, fields: dict[bytes, bytes], body_bytes: int) -> DeadLetter:
        """From the fields of its stream entry."""
        lane = _text(fields.get(b"lane"))
        return cls(
            entry_id.decode(),
            _text(fields.get(b"why")),
            Lane(lane) if lane in set(Lane) else None,
            _text(fields.get(b"src")),
            _number(fields.get(b"n")),
            _number(fields.get(b"row")),
            _text(fields.get(FIELD_REPLY)),
            fields.get(FIELD_HEADER, b""),
            body_bytes,
        )

    @property
    def when(self) -> datetime | None:
        """When it was given up, on Redis's clock."""
        try:
            return datetime.fromtimestamp(int(self.id.partition("-")[0]) / 1000, UTC)
        except (OverflowError, ValueError, OSError):  # an id that somebody made up
            return None

    @property
    def sender(self) -> jobs.Sender | None:
        """Its request and its place in it."""
        return jobs.sender_of(self.header)

    @property
    def tokens(self) -> int | None:
        """Its number of token ids; 0 for texts."""
        try:
            return jobs.decode_header(self.header).n_tokens
        except MalformedJob:
            return None


@dataclass(frozen=True, slots=True)
class Filter:
    """Which dead letters are meant: those that meet all that is given.

    Args:
        lane: where they came from.
        reason: a part of their reason, in any case.
        older_than_s: seconds since they were given up, at least.
    """

    lane: Lane | None = None
    reason: str | None = None
    older_than_s: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether all are meant."""
        return self == Filter()

    def takes(self, letter: DeadLetter) -> bool:
        """Whether lane and reason are those asked for; age is a matter of the range that is read."""
        if self.lane is not None and letter.lane is not self.lane:
            return False
        return self.reason is None or self.reason.casefold() in letter.reason.casefold()


@dataclass(frozen=True, slots=True)
class Replayed:
    """A dead letter that is on its lane again."""

    job: Job
    lane: Lane
    entry_id: str
    result_key: str


class DeadLetterStore:
    """The dead letters of one model.

    Args:
        redis: a blocking client.
        keys: of the model.
    """

    def __init__(self, redis: redis_sync.Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys

    @property
    def model(self) -> str:
        """The model's first served name."""
        return self._keys.model

    def count(self) -> int:
        """How many there are."""
        return int(self._redis.xlen(self._keys.dead_letters))

    def scan(self, wanted: Filter, *, newest_first: bool = False) -> Iterator[DeadLetter]:
        """All that are wanted, in order; only one page is held at a time."""
        first, last = "-", "+"
        if wanted.older_than_s is not None:
            seconds, micros = self._redis.time()
            last = str(max(0, int((seconds + micros / 1e6 - wanted.older_than_s) * 1000)))
        command = "XREVRANGE" if newest_first else "XRANGE"
        start, end = (last, first) if newest_first else (first, last)
        while True:
            args: list[Arg] = [command, start, end, PAGE_ENTRIES, LONGEST_VALUE_BYTES]
            page = _PAGE.run_sync(self._redis, [self._keys.dead_letters], args)
            for entry_id, flat in page:
                fields = dict(zip(flat[::2], flat[1::2], strict=True))
                letter = DeadLetter.of(entry_id, fields, int(fields.get(FIELD_BODY, 0)))
                if wanted.takes(letter):
                    yield letter
            if len(page) < PAGE_ENTRIES:
                return
            start = f"({page[-1][0].decode()}"

    def get(self, letter_id: str) -> tuple[DeadLetter, bytes] | None:
        """One dead letter and its body, or None."""
        found: Any = self._redis.xrange(self._keys.dead_letters, letter_id, letter_id)
        if not found:
            return None
        ((entry_id, fields),) = found
        body = fields.get(FIELD_BODY, b"")
        return DeadLetter.of(entry_id, fields, len(body)), body

    def drop(self, letter_ids: Sequence[str]) -> int:
        """Delete dead letters; returns how many of them were there."""
        return sum(
            int(self._redis.xdel(self._keys.dead_letters, *letter_ids[start : start + DROP_ENTRIES]))
            for start in range(0, len(letter_ids), DROP_ENTRIES)
        )

    def served(self) -> frozenset[bytes]:
        """Fingerprints of the cards served now; while no consumer lives, that of the one announced last."""
        names: Any = self._redis.zrange(self._keys.live, 0, -1)
        beats: Any = self._redis.mget([self._keys.heartbeat(name.decode()) for name in names]) if names else ()
        living = {said.fingerprint for beat in beats if (said := _read_beat(beat)) is not None}
        if not living:
            entries = _table(self._redis, self._keys.prefix).values()
            living = {entry.fingerprint for entry in entries if entry.model == self.model}
        return frozenset(map(bytes.fromhex, living))

    def replay(self, letter: DeadLetter, job: Job, *, ttl_s: int, result_ttl_s: int) -> Replayed | None:
        """Put a job back on its lane, to be computed within `ttl_s`; its result is kept under its request id.

        Args:
            letter: the dead letter.
            job: what it holds.
            ttl_s: seconds that it may take until it is computed.
            result_ttl_s: seconds that the result is kept.

        Returns:
            None when somebody else has replayed or dropped it meanwhile.
        """
        lane = letter.lane or job.lane
        # What was asked for stays; only its two times begin anew.
        header, _ = replace(job, ttl_ms=ttl_s * 1000, result_ttl_s=result_ttl_s).encode()
        result_key = self._keys.result(job.request_id)
        keys = [self._keys.dead_letters, self._keys.lane(lane), self._keys.totals, result_key]
        args: list[Arg] = [letter.id, header, "i" if lane is Lane.INTERACTIVE else "b", tokens_of(job)]
        args += [f"{job.index}:", FIELD_JOBS, job.count, FIELD_WAS_CANCELLED, result_ttl_s]
        entry_id = _REPLAY.run_sync(self._redis, keys, args)
        return Replayed(job, lane, entry_id.decode(), result_key) if entry_id is not None else None


def open_store(redis: redis_sync.Redis, prefix: str, model: str | None) -> DeadLetterStore:
    """The dead letters of a served name, or of the only model there is.

    Raises:
        Unavailable: nobody has announced the model, or several are there and none was named.
    """
    table = _table(redis, prefix)
    announced = ", ".join(f"`{name}`" for name in sorted(table))
    if model is not None:
        keys = Keys(prefix, table[model].model if model in table else model)
        if model not in table and not redis.exists(keys.dead_letters):
            raise Unavailable(f"No consumer has announced the model `{model}` (announced: {announced or 'none'}).")
        return DeadLetterStore(redis, keys)
    distinct = {entry.model for entry in table.values()}
    if not distinct:
        raise Unavailable("No consumer has announced a model yet; name one with --model.")
    if len(distinct) > 1:
        raise Unavailable(f"Several models have dead letters of their own; name one of them with --model: {announced}.")
    return DeadLetterStore(redis, Keys(prefix, distinct.pop()))


def _table(redis: redis_sync.Redis, prefix: str) -> dict[str, ModelEntry]:
    """The table of models, less what cannot be read."""
    table: Any = redis.hgetall(models(prefix))
    found = {}
    for name, value in table.items():
        try:
            found[_text(name)] = ModelEntry.decode(value)
        except MalformedMessage:
            continue
    return found


def _read_beat(beat: bytes | None) -> Announcement | None:
    try:
        return Announcement.decode(beat) if beat else None
    except MalformedMessage:
        return None


def _text(value: bytes | None) -> str:
    return (value or b"").decode(errors="replace")


def _number(value: bytes | None) -> int | None:
    return int(value) if value is not None and value.isdigit() else None
