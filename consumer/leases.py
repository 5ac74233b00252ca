"""Leases: taking over what nobody works on any more, and giving back what we will not do.

An entry belongs to the consumer that read it for as long as that consumer's heart beats. There is no lock to be left
behind and no idle time to wait out: each consumer looks after all others, and the look itself is one script.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from embedstream.shared import metrics
from embedstream.shared.connections import Arg, Script, is_missing_group
from embedstream.shared.keys import GROUP, Keys
from embedstream.shared.lanes import LANES, Lane
from embedstream.shared.logs import get_logger, told

from .entries import RawEntry
from .hand import Hand

ASTRAY_MS = 1500
"""An entry that is pending for us for so long and not in hand was read by a call whose reply was lost. A call that a
stalled server carries out late leaves such entries at any time, so looking once after an error is not enough."""
PAGE = 500
RELEASED_IDLE_MS = 2 * 86_400_000
"""Entries given back look idle for longer than any backstop."""
CALL_BYTES = 4 * 1024 * 1024
"""What one call should bring at most, as a read from the lanes; what it leaves the next one brings."""

log = get_logger()
_REAP = Script("embedstream.consumer", "reap.lua")
_CLAIM = Script("embedstream.consumer", "claim.lua")
_SUSPECT = Script("embedstream.consumer", "suspect.lua")
_RELEASE = Script("embedstream.consumer", "release.lua")


class Leases:
    """The leases of one consumer.

    Args:
        redis: client for short commands.
        keys: of the model.
        consumer: name in the group.
        hand: what it has in hand.
        backstop_ms: time in one consumer's hands after which an entry is taken from it, though its heart beats.
    """

    def __init__(self, redis: Redis, keys: Keys, consumer: str, hand: Hand, backstop_ms: int) -> None:
        self._redis = redis
        self._keys = keys
        self._consumer = consumer
        self._hand = hand
        self._backstop_ms = backstop_ms

    async def astray(self) -> list[RawEntry]:
        """Entries that are pending for us and were never seen, taken up.

        Raises:
            RedisError: Redis cannot be asked now.
        """
        entries = []
        for lane in LANES:
            ids = await self._unseen(lane)
            for start in range(0, len(ids), PAGE):
                some = ids[start : start + PAGE]
                args: list[Arg] = [GROUP, self._consumer, CALL_BYTES, *some]
                found: Any = await _CLAIM.run(self._redis, [self._keys.lane(lane)], args)
                entries += [_entry(lane, entry_id, count, fields) for entry_id, count, fields in found]
        if entries:
            metrics.JOBS_TAKEN_OVER.labels("lost_reply").inc(len(entries))
            log.info("leases.found_astray", jobs=len(entries))
        return entries

    async def abandoned(self, most: int, *, given_back: bool = True) -> list[RawEntry]:
        """Entries of consumers that are gone, or that were given back, taken over.

        Args:
            most: entries to take at most; what is left others can take.
            given_back: whether to look for what living consumers gave back or hold for too long: for that Redis walks
                through all that is pending.

        Raises:
            RedisError: Redis cannot be asked now.
        """
        entries: list[RawEntry] = []
        for lane in LANES:
            if most <= len(entries):
                break
            keys = [self._keys.lane(lane), self._keys.live]
            args: list[Arg] = [GROUP, self._consumer, most - len(entries), CALL_BYTES]
            args += [self._backstop_ms if given_back else 0, RELEASED_IDLE_MS // 2]
            found: Any = await _REAP.run(self._redis, keys, args)
            for entry_id, reason, count, fields in found:
                entries.append(_entry(lane, entry_id, count, fields))
                metrics.JOBS_TAKEN_OVER.labels(reason.decode()).inc()
        if entries:
            log.info("leases.taken_over", jobs=len(entries), suspects=sum(raw.deaths > 0 for raw in entries))
        return entries

    async def book(self, entries: Sequence[RawEntry]) -> list[RawEntry]:
        """Count one more death for entries that are about to run apart; should we live, they leave their lane anyway.

        Returns:
            Those that are still ours.

        Raises:
            RedisError: Redis cannot be asked now; nothing must be run.
        """
        ours: set[tuple[Lane, bytes]] = set()
        for lane in LANES:
            some = [raw for raw in entries if raw.lane is lane]
            if not some:
                continue
            args: list[Arg] = [GROUP, self._consumer]
            for raw in some:
                args += [raw.entry_id, _count_of(raw.deaths + 1)]
            found: Any = await _SUSPECT.run(self._redis, [self._keys.lane(lane)], args)
            ours |= {(lane, entry_id) for entry_id in found}
        return [raw for raw in entries if raw.place in ours]

    async def give_back(self, entries: Sequence[RawEntry]) -> None:
        """Let others have entries that were not begun, at once and without suspicion."""
        for lane, ids in _by_lane(entries):
            keys = [self._keys.lane(lane), self._keys.notices]
            try:
                for start in range(0, len(ids), PAGE):
                    args: list[Arg] = [GROUP, self._consumer, RELEASED_IDLE_MS, *ids[start : start + PAGE]]
                    released = await _RELEASE.run(self._redis, keys, args)
                    log.info("leases.given_back", jobs=released, lane=lane.value)
            except (RedisError, OSError) as error:  # then they are taken over when our heartbeat is gone
                log.warning("leases.not_given_back", jobs=len(ids), error=told(error))

    async def _unseen(self, lane: Lane) -> list[bytes]:
        """Ids pending for us that are not in hand, page by page."""
        unseen, start = [], "-"
        while True:
            try:
                page: Any = await self._redis.xpending_range(
                    self._keys.lane(lane), GROUP, start, "+", PAGE, consumername=self._consumer, idle=ASTRAY_MS
                )
            except RedisError as error:
                if is_missing_group(error):
                    return []  # nothing is pending on a lane that is not there
                raise
            unseen += [item["message_id"] for item in page if (lane, item["message_id"]) not in self._hand]
            if len(page) < PAGE:
                return unseen
            start = f"({page[-1]['message_id'].decode()}"


def _count_of(deaths: int) -> int:
    """The delivery count of an entry with which so many consumers have died."""
    return deaths + 1


def _entry(lane: Lane, entry_id: bytes, count: int, fields: list[bytes]) -> RawEntry:
    """An entry as a script returns it."""
    return RawEntry(lane, entry_id, dict(zip(fields[::2], fields[1::2], strict=True)), max(0, count - 1))


def _by_lane(entries: Iterable[RawEntry]) -> list[tuple[Lane, list[bytes]]]:
    lanes: dict[Lane, list[bytes]] = {}
    for raw in entries:
        lanes.setdefault(raw.lane, []).append(raw.entry_id)
    return list(lanes.items())
