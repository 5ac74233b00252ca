"""The heartbeat: says that this consumer is alive and what it serves, and learns Redis's time.

It runs in a thread with a connection of its own, so that a busy event loop does not look like a dead consumer.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from embedstream.shared.cards import Announcement, ModelCard
from embedstream.shared.connections import COMMAND_TIMEOUT_S, Script, connect_sync
from embedstream.shared.keys import Keys, models
from embedstream.shared.logs import get_logger

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
    """

    def __init__(
        self, url: str, keys: Keys, card: ModelCard, announcement: Announcement, interval_ms: int, ttl_ms: int
    ) -> None:
        self._redis: Redis = connect_sync(url)
        self._keys = keys
        self._fingerprint = card.fingerprint
        self._card_pieces = card.encode()
        self._announcement = replace(announcement, pieces=len(self._card_pieces))
        self._table: dict[Any, Any] = dict.fromkeys(announcement.names, self._announcement.card.encode())
        self._interval_s = interval_ms / 1000
        self._ttl_ms = ttl_ms
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
        self._thread.start()

    def stop(self) -> None:
        """Stop beating and say so: the consumer counts as gone at once."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(COMMAND_TIMEOUT_S)
        try:
            self._redis.delete(self._keys.heartbeat(self._announcement.consumer))
            self._redis.zrem(self._keys.live, self._announcement.consumer)
        except (RedisError, OSError) as error:
            log.warning("heartbeat.not_removed", error=repr(error))  # it expires by itself
        self._redis.close()

    def redis_now_ms(self) -> float:
        """The time on Redis's clock, in milliseconds, as of the last beat."""
        return time.time() * 1000 + (self._offset_ms or 0.0)

    def _run(self) -> None:
        beat = 0
        while not self._stopping.wait(self._interval_s):
            beat += 1
            try:
                self._beat()
                if beat % _NAMES_EVERY == 0:
                    for name, entry in self._table.items():
                        self._redis.hsetnx(models(self._keys.prefix), name, entry)
            except (RedisError, OSError) as error:
                log.warning("heartbeat.failed", error=repr(error))

    def _beat(self) -> None:
        before_ms = time.time() * 1000
        keys = [
            self._keys.heartbeat(self._announcement.consumer),
            self._keys.live,
            self._keys.card(self._fingerprint, 0),
        ]
        args = (self._announcement.encode(), self._ttl_ms, self._announcement.consumer)
        now_ms, card_there = _SCRIPT.run_sync(self._redis, keys, args)
        after_ms = time.time() * 1000
        if after_ms - before_ms < _SLOW_BEAT_MS or self._offset_ms is None:
            self._offset_ms = now_ms - (before_ms + after_ms) / 2
        if not card_there:
            self._publish_card()

    def _publish_card(self) -> None:
        # The first piece goes last: where it is, the whole card is.
        for number, piece in reversed(list(enumerate(self._card_pieces))):
            self._redis.set(self._keys.card(self._fingerprint, number), piece)
