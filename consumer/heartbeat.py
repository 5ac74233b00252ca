"""The heartbeat: says that this consumer is alive and what it serves, and learns Redis's time.

It runs in a thread with a connection of its own, so that a busy event loop does not look like a dead consumer. It asks
the watchdog before each beat, so that a hung one does not look alive.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from redis import Redis
from redis.exceptions import RedisError, ResponseError

from embedstream.shared import load_failures
from embedstream.shared.cards import Announcement, ModelCard
from embedstream.shared.connections import COMMAND_TIMEOUT_S, Script, connect_sync
from embedstream.shared.keys import Keys, models
from embedstream.shared.logs import get_logger, told

from .watchdog import State, Watchdog

_NAMES_EVERY = 10
"""Beats between two looks at the table of models, which a FLUSHALL may have emptied."""

_SLOW_BEAT_MS = 100
"""A beat that took longer says too little about Redis's clock."""

log = get_logger()
_SCRIPT = Script("embedstream.consumer", "heartbeat.lua")


class Heartbeat:
    """Announces a consumer until it is stopped.

    Args:
        url: of Redis.
        keys: of the model.
        card: published under its fingerprint, and again whenever Redis has lost it.
        announcement: what the consumer says of itself.
        interval_ms: between two beats.
        ttl_ms: after which a silent consumer counts as dead.
        watchdog: asked before each beat.
        tokens_per_s: what the consumer gets done, told with each beat.
        moved: called on this thread when the watchdog's opinion changes; beats are given up before it hears of `HUNG`.
    """

    def __init__(
        self,
        url: str,
        keys: Keys,
        card: ModelCard,
        announcement: Announcement,
        interval_ms: int,
        ttl_ms: int,
        watchdog: Watchdog | None = None,
        tokens_per_s: Callable[[], float] = lambda: 0.0,
        moved: Callable[[State], None] = lambda _: None,
    ) -> None:
        self._redis: Redis = connect_sync(url)
        self._keys = keys
        self._fingerprint = card.fingerprint
        self._card_pieces = card.encode()
        self._announcement = replace(announcement, pieces=len(self._card_pieces))
        self._table: dict[Any, Any] = dict.fromkeys(announcement.names, self._announcement.card.encode())
        self._interval_s = interval_ms / 1000
        self._ttl_ms = ttl_ms
        self._watchdog = watchdog
        self._tokens_per_s = tokens_per_s
        self._moved = moved
        self._state = State.MOVING
        self._beat_at_s = self._looked_at_s = time.monotonic()
        self._steady_since_s = float("-inf")
        self._offset_ms: float | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Publish the card, take the names, and begin to beat.

        Raises:
            RedisError: Redis cannot be reached; call it again later.
        """
        self._publish_card()
        # The newest consumer decides which card is current; later beats only fill gaps.
        self._redis.hset(models(self._keys.prefix), mapping=self._table)
        self._beat()
        load_failures.forget(self._redis, self._keys.prefix, self._announcement.names)
        if self._redis_is_young():
            self._steady_since_s = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        """Stop beating and say so: the consumer counts as gone at once."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(COMMAND_TIMEOUT_S)
        self._give_up()
        self._redis.close()

    def redis_now_ms(self) -> float:
        """The time on Redis's clock, in milliseconds. Between beats it runs on: no clock that anybody sets is asked."""
        return time.time() * 1000 if self._offset_ms is None else time.monotonic() * 1000 + self._offset_ms

    def is_steady(self) -> bool:
        """Whether beats have reached Redis without a gap for as long as a consumer may be silent.

        After an outage all heartbeats have expired, those of the living too: who takes over work at once steals it.
        """
        now_s, ttl_s = time.monotonic(), self._ttl_ms / 1000
        beats = now_s - self._beat_at_s <= max(ttl_s / 2, 2 * self._interval_s)
        return beats and now_s - self._steady_since_s > ttl_s

    def _redis_is_young(self) -> bool:
        """Whether Redis came back just now: then the heartbeats of the living have expired, and are not renewed yet."""
        try:
            said: Any = self._redis.info("server")
        except ResponseError:  # not for this user
            return False
        return int(said.get("uptime_in_seconds", self._ttl_ms)) * 1000 < self._ttl_ms

    def _run(self) -> None:
        beat = 0
        while not self._stopping.wait(self._interval_s):
            if not self._is_moving():
                continue
            beat += 1
            try:
                self._beat()
                if beat % _NAMES_EVERY == 0:
                    self._fill_in_names()
            except (RedisError, OSError) as error:
                self._steady_since_s = time.monotonic()
                log.warning("heartbeat.failed", error=told(error))
            except Exception:  # a defect; a consumer without a heart would be robbed of all it does
                self._steady_since_s = time.monotonic()
                log.exception("heartbeat.failed")

    def _is_moving(self) -> bool:
        """Ask the watchdog, and act on a change of its mind."""
        if self._watchdog is None:
            return True
        # What lies beyond the interval and one slow command is time in which the process was stopped.
        now_s = time.monotonic()
        passed_s = min(now_s - self._looked_at_s, self._interval_s + COMMAND_TIMEOUT_S)
        self._looked_at_s = now_s
        state = self._watchdog.look(passed_s)
        if state is not self._state:
            if state is State.HUNG:
                self._give_up()
            self._state = state
            self._moved(state)
        return state is State.MOVING

    def _give_up(self) -> None:
        """Count as gone at once, rather than when the last beat expires."""
        try:
            self._redis.delete(self._keys.heartbeat(self._announcement.consumer))
            self._redis.zrem(self._keys.live, self._announcement.consumer)
        except (RedisError, OSError) as error:
            log.warning("heartbeat.not_removed", error=told(error))  # it expires by itself

    def _beat(self) -> None:
        before_ms = time.monotonic() * 1000
        said = replace(self._announcement, tokens_per_s=round(self._tokens_per_s(), 1))
        keys = [
            self._keys.heartbeat(self._announcement.consumer),
            self._keys.live,
            self._keys.card(self._fingerprint, 0),
        ]
        args = (said.encode(), self._ttl_ms, self._announcement.consumer)
        now_ms, card_there = _SCRIPT.run_sync(self._redis, keys, args)
        after_ms = time.monotonic() * 1000
        if after_ms - self._beat_at_s * 1000 > self._ttl_ms:
            self._steady_since_s = after_ms / 1000  # this process or Redis stood still
        self._beat_at_s = after_ms / 1000
        if after_ms - before_ms < _SLOW_BEAT_MS or self._offset_ms is None:
            offset_ms = now_ms - (before_ms + after_ms) / 2
            if self._offset_ms is not None and abs(offset_ms - self._offset_ms) > self._ttl_ms / 2:
                self._steady_since_s = after_ms / 1000  # Redis's clock was set, and heartbeats expired by that
            self._offset_ms = offset_ms
        if not card_there:  # Redis has lost everything, most likely
            self._publish_card()
            self._fill_in_names()

    def _fill_in_names(self) -> None:
        for name, entry in self._table.items():
            self._redis.hsetnx(models(self._keys.prefix), name, entry)

    def _publish_card(self) -> None:
        # The first piece goes last: where it is, the whole card is.
        for number, piece in reversed(list(enumerate(self._card_pieces))):
            self._redis.set(self._keys.card(self._fingerprint, number), piece)
