"""Deliveries: the results in an inbox, shared by its receivers, each one's until it is acknowledged.

An inbox is a stream with a consumer group. A receiver renews its claim on what it has in hand; what a dead one had is
claimed by another. Each answer has a note beside it, which goes when the answer is acknowledged: so an answer that
comes twice, or again after its receiver had done with it, is not given a second time.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from redis.asyncio import Redis
from redis.exceptions import RedisError

from embedstream.shared import results
from embedstream.shared.connections import BLOCK_MS, Arg, Script, after_failure, backoff_s, is_missing_group, pause
from embedstream.shared.errors import MalformedMessage, Unavailable
from embedstream.shared.keys import FIELD_PARTS, GROUP, Keys
from embedstream.shared.logs import get_logger, told
from embedstream.shared.results import ResultPart, Status

from .failures import InputFailure, failure_of
from .inbox_keys import RowId, field_of, inbox_keys, read_note
from .sessions import start
from .unbroken import Unbroken

READ_COUNT = 8
"""Entries of one read: at most 1 MiB each, so at most 8 MiB, which arrives well within the read's timeout."""
CLAIM_AFTER_S = 30.0
LOOK_S = 1.0
"""Between two looks for what others had."""
FORGOTTEN_MS = 3_600_000
RELEASED_MS = 31 * 86_400_000
"""Idle time given to what a receiver hands back, more than any may claim after: others take it at their next look."""
ACK_TRIES_S = 5.0

log = get_logger()
_KEEP = Script("embedstream.producer", "inbox.lua")
_FORGET = Script("embedstream.producer", "acknowledge.lua")

Entry = tuple[bytes, dict[bytes, bytes] | None, int]
"""Its id, its fields, which are None when it was deleted, and how often it was given to a receiver."""


@dataclass(frozen=True, slots=True)
class Delivered:
    """The results of some inputs that follow one another in a forwarded request, at most 64.

    Args:
        request_id: what `forward` returned.
        tag: what its sender said.
        ids: (inputs,) what its sender said of each, or None.
        first: place in the request of the first input.
        vectors: (inputs, dim) of the number format asked for; a row without vector is zero.
        failures: why inputs have no vector, by their row.
        attempt: 1, and one more for each receiver that had it and did not acknowledge it.
    """

    request_id: str
    tag: str
    ids: tuple[RowId, ...] | None
    first: int
    vectors: NDArray[Any]
    failures: Mapping[int, InputFailure]
    attempt: int
    _acknowledge: Callable[[], Coroutine[Any, Any, None]] = field(repr=False, compare=False)


class Delivery(Delivered):
    """Results as `Producer.deliveries` gives them."""

    __slots__ = ()

    async def ack(self) -> None:
        """Say that it is done with, once what was made of it is safe: nobody is given it again.

        Raises:
            Unavailable: Redis does not answer; acknowledge it again, or it will be delivered again.
        """
        await self._acknowledge()


class Inbox:
    """One receiver of an inbox.

    Args:
        redis: client for short commands.
        reader: client of one connection, for the blocking reads of this receiver.
        keys: of the model.
        name: of the inbox.
        claim_after_s: after so long without a sign of life, what a receiver had is claimed by others.
        ttl_s: how long the inbox is to outlive its senders and receivers.
        stopping: set when the producer is closed.
    """

    def __init__(
        self,
        redis: Redis,
        reader: Redis,
        keys: Keys,
        name: str,
        *,
        claim_after_s: float,
        ttl_s: int,
        stopping: asyncio.Event,
    ) -> None:
        self._redis = redis
        self._reader = reader
        self._keys = inbox_keys(keys, name)
        self._me = os.urandom(8).hex()
        self._claim_after_s = claim_after_s
        self._ttl_s = ttl_s
        self._stopping = stopping
        self._in_hand: dict[bytes, set[bytes]] = {}
        """Entries, and in each the fields of the answers that are not acknowledged."""
        self._names: set[bytes] = set()
        """The fields of all of them."""
        self._looked_s = float("-inf")
        self._unbroken = Unbroken()
        self._left = asyncio.Event()

    async def deliveries(self) -> AsyncGenerator[Delivery, None]:
        """Deliveries as they come, until the receiver leaves.

        What is not acknowledged when the generator is closed goes to other receivers at once.
        """
        keeping = start(self._keep(), "inbox")
        pauses = backoff_s()
        entries: deque[Entry] = deque()
        opened: list[Delivery] = []
        try:
            while not self._left.is_set():
                try:
                    entries.extend([] if entries else await self._next())
                    while entries:  # what fails is opened again: it is ours, and no read brings it a second time
                        opened += await self._open(*entries[0])
                        entries.popleft()
                    pauses = backoff_s()
                except Exception as error:
                    if self._left.is_set():
                        return  # a connection that closes while it opens fails in ways that are no RedisError
                    if not isinstance(error, RedisError | OSError):
                        raise
                    log.warning("deliveries.read_failed", error=told(error))
                    await after_failure(self._reader, error)
                    await after_failure(self._redis, error)
                    if is_missing_group(error):
                        self._looked_s = float("-inf")  # make the inbox anew
                    await pause(next(pauses), self._stopping)
                    continue
                given, opened = opened, []
                for delivery in given:
                    yield delivery
        finally:
            await self.leave()
            await asyncio.wait([keeping])

    async def leave(self) -> None:
        """Read no more, and hand back what is in hand: others take it at their next look."""
        if not self._left.is_set():
            self._left.set()
            await self._reader.aclose()  # first: what it may still read would be nobody's
            await self._unbroken.join()
            await self._hand_back()

    async def _next(self) -> list[Entry]:
        """What dead receivers had, when it is time to look; else what is new."""
        now = asyncio.get_running_loop().time()
        if now - self._looked_s >= min(LOOK_S, self._claim_after_s / 2):
            if self._looked_s == float("-inf"):
                await self._renew()  # there is an inbox from now on
            claimed = await self._claim()
            if claimed:
                return claimed  # and look again
            self._looked_s = now
        block_ms = min(BLOCK_MS, max(1, int(self._claim_after_s * 500)))
        reply: Any = await self._reader.xreadgroup(GROUP, self._me, {self._keys[0]: ">"}, READ_COUNT, block_ms)
        return [(entry_id, fields, 1) for _, entries in reply or () for entry_id, fields in entries]

    async def _claim(self) -> list[Entry]:
        idle_ms = int(self._claim_after_s * 1000)
        pending: Any = await self._redis.xpending_range(
            self._keys[0], GROUP, "-", "+", READ_COUNT + len(self._in_hand), idle=idle_ms
        )
        given = {said["message_id"]: said["times_delivered"] for said in pending}
        wanted = [entry_id for entry_id in given if entry_id not in self._in_hand][:READ_COUNT]
        if not wanted:
            return []
        claimed: Any = await self._redis.xclaim(self._keys[0], GROUP, self._me, idle_ms, wanted)
        return [(entry_id, fields, given[entry_id] + 1) for entry_id, fields in claimed if entry_id is not None]

    async def _open(self, entry_id: bytes, fields: dict[bytes, bytes] | None, attempt: int) -> list[Delivery]:
        """The answers in an entry that were not acknowledged yet."""
        parts = {field_of(part.request_id, part.job): part for part in _parts((fields or {}).get(FIELD_PARTS, b""))}
        notes: Any = await self._redis.hmget(self._keys[1], list(parts)) if parts else []
        opened: list[Delivery] = []
        for (name, part), said in zip(parts.items(), notes, strict=True):
            if said is None or name in self._names:
                continue  # it was acknowledged before, or came twice
            try:
                tag, ids = read_note(said)
            except MalformedMessage as error:
                log.error("deliveries.malformed_note", error=str(error), request=part.request_id.hex())
                tag, ids = "", None
            opened.append(_delivery(part, tag, ids, attempt, self._acknowledger(entry_id, name)))
            self._in_hand.setdefault(entry_id, set()).add(name)
            self._names.add(name)
        if not opened:
            await self._forget(entry_id, [])
        return opened

    def _acknowledger(self, entry_id: bytes, name: bytes) -> Callable[[], Coroutine[Any, Any, None]]:
        async def acknowledge() -> None:
            await self._unbroken.run(self._acknowledge(entry_id, name))

        return acknowledge

    async def _acknowledge(self, entry_id: bytes, name: bytes) -> None:
        left = self._in_hand.get(entry_id)
        if left is None or name not in left:
            return  # it was before
        if self._stopping.is_set():
            raise Unavailable("The producer was closed.")
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + ACK_TRIES_S
        for pause_s in backoff_s():
            with_entry = left == {name}
            try:
                await self._forget(entry_id if with_entry else b"", [name])
            except (RedisError, OSError) as error:
                await after_failure(self._redis, error)
                if loop.time() + pause_s > deadline_s:
                    raise Unavailable("Redis does not take the acknowledgement.", retry_after_s=2.0) from error
                await asyncio.sleep(pause_s)
            else:
                break
        left.discard(name)
        self._names.discard(name)
        if not left and self._in_hand.pop(entry_id, None) is not None and not with_entry:
            await self._drop(entry_id)

    async def _drop(self, entry_id: bytes) -> None:
        """Forget an entry whose last answers were acknowledged at one time; else it is found empty in the end."""
        try:
            await self._forget(entry_id, [])
        except (RedisError, OSError) as error:
            await after_failure(self._redis, error)

    async def _forget(self, entry_id: bytes, names: list[bytes]) -> None:
        args: list[Arg] = [GROUP, entry_id, *names]
        await _FORGET.run(self._redis, self._keys, args)

    async def _keep(self) -> None:
        """Renew the inbox and the claim on what is in hand, until the receiver leaves."""
        while not self._left.is_set():
            await pause(self._claim_after_s / 3, self._left)
            if not self._left.is_set():
                try:
                    await self._renew()
                except (RedisError, OSError) as error:
                    log.warning("deliveries.renewal_failed", error=told(error))
                    await after_failure(self._redis, error)

    async def _renew(self) -> None:
        args: list[Arg] = [GROUP, self._ttl_s * 1000, self._me, FORGOTTEN_MS, *self._in_hand]
        for lost in await _KEEP.run(self._redis, self._keys, args):
            log.warning("deliveries.lost_claim", entry=lost.decode())
            self._names -= self._in_hand.pop(lost, set())

    async def _hand_back(self) -> None:
        try:
            pending: Any = await self._redis.xpending_range(self._keys[0], GROUP, "-", "+", 1000, self._me)
            ids = [said["message_id"] for said in pending]
            if ids:
                await self._redis.xclaim(self._keys[0], GROUP, self._me, 0, ids, idle=RELEASED_MS, justid=True)
            else:
                await self._redis.xgroup_delconsumer(self._keys[0], GROUP, self._me)
        except (RedisError, OSError) as error:  # then they are claimed when their time is over
            log.warning("deliveries.not_handed_back", error=told(error))
            await after_failure(self._redis, error)


def _parts(data: bytes) -> Iterator[ResultPart]:
    """The answers in an entry; one that cannot be read is left out."""
    pieces = results.unframe(data)
    while True:
        try:
            part = results.decode(next(pieces))
        except StopIteration:
            return
        except MalformedMessage as error:
            log.error("deliveries.malformed", error=str(error), bytes=len(data))
            continue
        if part.n_parts > 1:  # its sender has made jobs of more inputs than an inbox takes
            log.error("deliveries.in_several_parts", request=part.request_id.hex(), parts=part.n_parts)
        elif (part.rows["vectors"] != (part.rows["status"] == Status.OK)).any():
            log.error("deliveries.not_one_vector_each", request=part.request_id.hex())
        else:
            yield part


def _delivery(
    part: ResultPart,
    tag: str,
    ids: tuple[RowId, ...] | None,
    attempt: int,
    acknowledge: Callable[[], Coroutine[Any, Any, None]],
) -> Delivery:
    good = part.rows["status"] == Status.OK
    vectors = np.zeros((part.n_rows, part.vectors.shape[1]), part.vectors.dtype)
    vectors[good] = part.vectors
    failures = {row: failure_of(part, row) for row in np.flatnonzero(~good).tolist()}
    return Delivery(part.request_id.hex(), tag, ids, part.first_row, vectors, failures, attempt, acknowledge)
