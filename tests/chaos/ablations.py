"""Guards of the production code taken out, by name, to see that the scenarios notice.

It is done from here, by replacing methods: the production code has no switches for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from redis.asyncio import Redis

from embedstream.consumer import leases
from embedstream.consumer.entries import RawEntry
from embedstream.consumer.leases import Leases
from embedstream.consumer.publisher import Publisher
from embedstream.consumer.reader import LaneReader
from embedstream.consumer.worker import Worker


def apply(name: str) -> None:
    """Take a guard out of this consumer.

    Raises:
        KeyError: there is no ablation of this name.
    """
    ABLATIONS[name]()


def no_own_pending_sweep() -> None:
    """Nobody looks for entries whose read lost its reply."""

    async def astray(self: Leases) -> list[RawEntry]:
        del self
        return []

    replace_in(Leases, "astray", astray)


def one_shot_sweep() -> None:
    """One look, as soon as entries can count as astray after a failed read; then none until another one fails."""
    due_s: list[float] = []
    recover, astray = LaneReader._recover, Leases.astray

    async def recover_and_note(self: LaneReader, error: Exception) -> None:
        due_s[:] = [time.monotonic() + leases.ASTRAY_MS / 1000]
        await recover(self, error)

    async def astray_once(self: Leases) -> list[RawEntry]:
        if not due_s or time.monotonic() < due_s[0]:
            return []
        due_s.clear()
        return await astray(self)

    replace_in(LaneReader, "_recover", recover_and_note)
    replace_in(Leases, "astray", astray_once)


def dead_letter_on_delivery_count() -> None:
    """Whatever a dead consumer had in hand counts as delivered once more, runs as all else, and is given up by that."""
    most, take_in = 4, Worker._take_in

    async def take_in_by_count(self: Worker, raws: Sequence[RawEntry]) -> None:
        counted = [raw for raw in raws if raw.deaths]
        if counted:
            await self._leases.book(counted)
        given_up = self._hand.take([raw for raw in counted if raw.deaths >= most])
        for raw in given_up:
            await self._suspects._give_up(raw)
        await take_in(self, [replace(raw, deaths=0) for raw in raws if raw.deaths < most])

    replace_in(Worker, "_take_in", take_in_by_count)


def pipeline_instead_of_multi() -> None:
    """Reply, acknowledgement and deletion go together, but not all or none."""
    start = Publisher.__init__

    def start_without_multi(self: Publisher, redis: Redis, *arguments: Any, **named: Any) -> None:
        start(self, redis, *arguments, **named)
        pipeline = redis.pipeline
        replace_in(redis, "pipeline", lambda transaction=True, shard_hint=None: pipeline(False, shard_hint))

    replace_in(Publisher, "__init__", start_without_multi)


def replace_in(where: object, name: str, by: Callable[..., Any]) -> None:
    """Put something else in the place of a method or function.

    Raises:
        AttributeError: there is none of this name.
    """
    if not hasattr(where, name):
        raise AttributeError(f"{where} has no {name} any more: the ablation must follow the code")
    setattr(where, name, by)


ABLATIONS: dict[str, Callable[[], None]] = {
    "no_own_pending_sweep": no_own_pending_sweep,
    "one_shot_sweep": one_shot_sweep,
    "dead_letter_on_delivery_count": dead_letter_on_delivery_count,
    "pipeline_instead_of_multi": pipeline_instead_of_multi,
}
